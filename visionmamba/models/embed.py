"""Pictures to tokens: patches at any stride, class tokens in place, positions for any grid."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers.weight_init import lecun_normal_
from torch import Tensor, nn

from visionmamba.models.config import PartialPatches, RopeLayout, VimConfig
from visionmamba.ops import activation_dtype, cut_patches

CACHED_GRIDS = 8


class PatchEmbedding(nn.Module):
    """Cut pictures into (overlapping) patches and project each to d_model.

    Args:
        in_channels: channels of the pictures.
        d_model: width of the tokens.
        patch_size: side of a patch in pixels.
        stride: distance of neighbouring patches in pixels.
        partial_patches: what to do with sides that do not fit: "pad" with zeros below and to the
            right, or "refuse".
    """

    def __init__(
        self,
        in_channels: int,
        d_model: int,
        *,
        patch_size: int,
        stride: int,
        partial_patches: PartialPatches = "pad",
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride
        self.partial_patches = partial_patches
        self.weight = nn.Parameter(torch.empty(d_model, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        lecun_normal_(self.weight)  # type: ignore[no-untyped-call]
        nn.init.zeros_(self.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches for a picture of this many pixels.

        Raises:
            ValueError: the sides do not fit the grid and partial_patches is "refuse".
        """
        fitting = self._fit(height), self._fit(width)
        if self.partial_patches == "refuse" and fitting != (height, width):
            raise ValueError(
                f"image side {height}x{width} does not fit patches of {self.patch_size} at stride "
                f"{self.stride}; resize or pad it to {fitting[0]}x{fitting[1]}, or set "
                'partial_patches="pad"'
            )
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in fitting)
        return rows, columns

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens (B, h * w, D) in row-major order and the grid (h, w).

        Args:
            images: (B, C, H, W).

        Raises:
            ValueError: shape, dtype or device of the pictures is not what the weights take.
        """
        self._check(images)
        grid = self.grid(*images.shape[-2:])
        dtype = activation_dtype(images)
        # A matrix product on every backend: convolution kernels are slow at this shape.
        patches = cut_patches(images, self.patch_size, self.stride, grid, dtype)
        return F.linear(patches, self.weight.flatten(1), self.bias), grid

    def _check(self, images: Tensor) -> None:
        channels = self.weight.shape[1]
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be (batch, {channels}, height, width); got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floating point and normalised; got {images.dtype}: divide by 255 "
                "and subtract the mean, or use Classifier, which takes pictures as they are"
            )
        if images.device != self.weight.device:
            raise ValueError(
                f"images are on {images.device} but the model is on {self.weight.device}; "
                f'move them with images.to("{self.weight.device}")'
            )
        if images.dtype != self.weight.dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"images are {images.dtype} but the model is {self.weight.dtype}; convert one of "
                "them with .to(dtype), or run under torch.autocast"
            )

    def _fit(self, side: int) -> int:
        beyond_first = max(side - self.patch_size, 0)
        return self.patch_size + -(-beyond_first // self.stride) * self.stride


def class_token_positions(config: VimConfig, num_patches: int) -> tuple[int, ...]:
    """Return where class tokens or registers stand in the whole sequence, ascending, if any."""
    readout = config.readout
    if readout == "registers":
        return register_positions(num_patches, config.num_registers)
    if readout == "middle":
        return (num_patches // 2,)
    if readout == "head":
        return (0,)
    if readout == "double":
        return (0, num_patches + 1)
    return ()


def num_class_tokens(config: VimConfig) -> int:
    """Return how many class tokens or registers there are."""
    return len(class_token_positions(config, 0))


def register_positions(num_patches: int, num_registers: int) -> tuple[int, ...]:
    """Return where registers stand in the whole sequence, ascending.

    They cut the patches into num_registers + 1 runs: before register k of R, counted from 1, are
    k N / (R + 1) of the N patches, rounded to the nearest, a half away from the middle. So runs
    differ by one patch at most, and the places are the same from either end; only where registers
    and patches are both odd in number does the middle register stand half a patch before the
    middle, as the class token of readout "middle" does. Mamba-Reg's code gives N // (R + 1) patches
    to every run and the rest to the last.
    """
    runs = num_registers + 1
    first_half = [
        (2 * k * num_patches + num_registers) // (2 * runs) for k in range(1, runs // 2 + 1)
    ]
    second_half = [num_patches - before for before in reversed(first_half[: num_registers // 2])]
    return tuple(before + k for k, before in enumerate((*first_half, *second_half)))


def insert_tokens(patches: Tensor, tokens: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Return (B, L, D) with tokens (B or 1, len(positions), D) put at `positions` of the result."""
    if not positions:
        return patches
    tokens = tokens.expand(patches.shape[0], -1, -1)
    pieces, start = [], 0
    for i, position in enumerate(positions):
        end = position - i
        pieces += [patches[:, start:end], tokens[:, i : i + 1]]
        start = end
    return torch.cat([*pieces, patches[:, start:]], dim=1)


def split_tokens(sequence: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return patches (B, L - n, D) and the tokens (B, n, D) at the ascending `positions`."""
    if not positions:
        return sequence, sequence[:, :0]
    bounds = (-1, *positions, sequence.shape[1])
    patches = [sequence[:, a + 1 : b] for a, b in pairwise(bounds)]
    tokens = [sequence[:, position : position + 1] for position in positions]
    return torch.cat(patches, dim=1), torch.cat(tokens, dim=1)


class PositionEmbedding(nn.Module):
    """A learned row for every token of a native grid, resized for any other grid.

    Rows stand in the order of the sequence, class tokens' rows among them. For another grid the
    patches' rows are interpolated (bicubic) and the class tokens' rows put back where the class
    tokens stand then.
    """

    def __init__(self, grid: tuple[int, int], config: VimConfig) -> None:
        super().__init__()
        self.grid = grid
        self.config = config
        num_tokens = grid[0] * grid[1] + num_class_tokens(config)
        self.weight = nn.Parameter(torch.empty(1, num_tokens, config.d_model))
        self._resized: dict[tuple[object, ...], Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return (1, L, D) for a grid of patches (h, w); cached while no gradient is needed."""
        if grid == self.grid:
            return self.weight
        needs_grad = torch.is_grad_enabled() and self.weight.requires_grad
        if needs_grad or torch.compiler.is_compiling():
            return self._resize(grid)
        weight = self.weight
        key = (
            grid,
            weight.data_ptr(),
            weight._version,
            weight.dtype,
            torch.is_inference_mode_enabled(),
        )
        if key not in self._resized:
            if len(self._resized) >= CACHED_GRIDS:
                self._resized.clear()
            self._resized[key] = self._resize(grid)
        return self._resized[key]

    def _resize(self, grid: tuple[int, int]) -> Tensor:
        positions = class_token_positions(self.config, self.grid[0] * self.grid[1])
        patches, tokens = split_tokens(self.weight, positions)
        resized = resize_grid(patches, self.grid, grid)
        return insert_tokens(resized, tokens, class_token_positions(self.config, grid[0] * grid[1]))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_resized": {}}  # caches are not copied or pickled


def resize_grid(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return (1, h' * w', D) interpolated (bicubic) from (1, h * w, D) in row-major order."""
    dtype = rows.dtype
    picture = rows.float().transpose(1, 2).reshape(1, -1, *old)  # (1, D, h, w)
    picture = F.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    return picture.flatten(2).transpose(1, 2).to(dtype)


def rotate_tokens(
    sequence: Tensor,
    grid: tuple[int, int],
    positions: tuple[int, ...],
    *,
    layout: RopeLayout,
    reference_grid: int,
) -> Tensor:
    """Rotate pairs of features by each patch's row and column (rotary embedding, as in EVA-02).

    Half of the features turn with the row, half with the column; frequencies are
    10000^(-2i / (D / 2)) over positions scaled to `reference_grid` cells a side.

    Args:
        sequence: (B, L, D) with D a multiple of 4.
        grid: rows and columns of patches.
        positions: where class tokens stand.
        layout: "grid" leaves class tokens alone; "published" leaves token 0 alone when L is odd and
            rotates the others in order.
        reference_grid: cells a side that positions are scaled to.

    Raises:
        ValueError: "published" with a count of tokens that it cannot lay on the grid.
    """
    length, num_patches = sequence.shape[1], grid[0] * grid[1]
    skipped: tuple[int, ...] = positions
    if layout == "published":
        skipped = (0,) if length % 2 else ()
        if length - len(skipped) != num_patches:
            raise ValueError(
                f'rope_layout "published" cannot place {length} tokens on a grid of '
                f'{grid[0]}x{grid[1]}; use rope_layout="grid"'
            )
    cos, sin = _rotation(grid, sequence.shape[2], reference_grid, sequence.device)
    # class tokens get the angle 0
    cos = insert_tokens(cos, torch.ones_like(cos[:, :1]).expand(-1, len(skipped), -1), skipped)
    sin = insert_tokens(sin, torch.zeros_like(sin[:, :1]).expand(-1, len(skipped), -1), skipped)
    even, odd = sequence[..., 0::2], sequence[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(sequence.dtype)


def _rotation(
    grid: tuple[int, int], d_model: int, reference_grid: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    half = d_model // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    rows, columns = (
        torch.arange(side, device=device, dtype=torch.float32) / side * reference_grid
        for side in grid
    )
    by_row = torch.outer(rows, frequencies)[:, None].expand(-1, grid[1], -1)
    by_column = torch.outer(columns, frequencies)[None].expand(grid[0], -1, -1)
    angle = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)[None]  # (1, h * w, D / 2)
    return angle.cos(), angle.sin()

"""One case of the comparison: a model at a resolution, loaded and ready to run a pass.

Used by the side-by-side timing and, in a process of its own, by the memory measurement.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

ModelName = Literal["vim", "deit"]
Size = Literal["tiny", "small", "base"]
Mode = Literal["infer", "train"]
Precision = Literal["float32", "bfloat16"]

PATCH_SIDE_PX = 16


class OutOfMemory(Exception):
    """A pass needed more memory than there is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a resolution and what is done with them."""

    model: ModelName
    """Vim, or timm's DeiT with fused attention."""
    size: Size
    """tiny, small or base, as both papers name them."""
    resolution: int
    """Side of the square input in pixels; the position embedding is made for it."""
    batch: int
    """Images in one pass."""
    mode: Mode
    """infer: forward without gradients; train: forward, cross-entropy and backward."""
    device: str
    """cpu or cuda."""
    precision: Precision
    """float32 throughout, or autocast to bfloat16."""
    image: Path | None
    """A picture resized to the input; None takes noise."""

    @property
    def num_tokens(self) -> int:
        """Patches of one image, without the class token."""
        return (self.resolution // PATCH_SIDE_PX) ** 2

    def load(self) -> "LoadedCase":
        """Build the model and the input on the device.

        Raises:
            OutOfMemory: they do not fit.
        """
        import torch

        try:
            torch.manual_seed(0)
            model = self._build_model().to(self.device).train(self.mode == "train")
            return LoadedCase(self, model, self._load_images())
        except (RuntimeError, MemoryError) as error:
            raise_if_out_of_memory(error)
            raise

    def _build_model(self) -> "torch.nn.Module":
        from visionmamba.models.config import VimConfig
        from visionmamba.models.deit import DeiTConfig

        if self.model == "vim":
            vim = {"tiny": VimConfig.tiny, "small": VimConfig.small, "base": VimConfig.base}
            return vim[self.size](image_size=self.resolution).build()
        deit = {"tiny": DeiTConfig.tiny, "small": DeiTConfig.small, "base": DeiTConfig.base}
        return deit[self.size](image_size=self.resolution).build()

    def _load_images(self) -> "torch.Tensor":
        import torch

        shape = (self.batch, 3, self.resolution, self.resolution)
        if self.image is None:
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        import numpy as np
        from PIL import Image

        with Image.open(self.image) as picture:
            resized = picture.convert("RGB").resize((self.resolution, self.resolution))
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, H, W)
        return (pixels / 127.5 - 1).expand(shape).contiguous().to(self.device)


class LoadedCase:
    """A case with its model and input in memory."""

    def __init__(self, case: Case, model: "torch.nn.Module", images: "torch.Tensor") -> None:
        self.case = case
        self.model = model
        self.images = images

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and input."""
        held = [*self.model.parameters(), *self.model.buffers(), self.images]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def run(self) -> None:
        """Run one pass and wait for its end.

        Raises:
            OutOfMemory: it needs more memory than there is.
        """
        import torch

        device = torch.device(self.case.device)
        half = self.case.precision == "bfloat16"
        try:
            if self.case.mode == "infer":
                with (
                    torch.inference_mode(),
                    torch.autocast(device.type, torch.bfloat16, enabled=half),
                ):
                    self.model(self.images)
            else:
                self._train(torch.autocast(device.type, torch.bfloat16, enabled=half))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RuntimeError, MemoryError) as error:
            raise_if_out_of_memory(error)
            raise

    def _train(self, autocast: "torch.autocast") -> None:
        import torch

        targets = torch.zeros(len(self.images), dtype=torch.long, device=self.images.device)
        with autocast:
            loss = torch.nn.functional.cross_entropy(self.model(self.images), targets)
        torch.autograd.backward(loss)
        self.model.zero_grad(set_to_none=True)


def raise_if_out_of_memory(error: RuntimeError | MemoryError) -> None:
    """Raise OutOfMemory when an error of PyTorch or Python says that memory ran out."""
    import torch

    said = ("can't allocate memory", "bad_alloc", "out of memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        s in str(error) for s in said
    ):
        raise OutOfMemory from error

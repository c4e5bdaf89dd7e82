"""Inference at a GPU's speed: fused blocks with packed weights, replayed as CUDA graphs."""

import copy
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionmamba.models.mixer import BidirectionalMixer, DirectionalSSM
from visionmamba.models.vim import ResidualNorm, Vim, VimBlock
from visionmamba.ops import can_fuse_mixer, fused_block, pack_mixer

_WARM_UP_RUNS = 2


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    cuda_graphs: bool = True,
    max_shapes: int = 8,
    max_pixels: int = 1 << 25,
) -> nn.Module:
    """Return a frozen copy of a model for inference that gives the same outputs faster.

    On GPUs in bfloat16 or float16 every standard block of a Vim runs as a few fused kernels with
    weights packed once. With cuda_graphs the whole forward is recorded at the first picture of a
    shape and replayed after that, so that launches cost nothing; elsewhere the copy just runs.

    Args:
        model: a Vim, or any module with Vims inside that maps one tensor to tensors.
        dtype: dtype of the activations and the weights of matrix products; decay rates, step
            sizes, convolutions, norms and the residual stream stay in float32. None keeps the
            model's own.
        cuda_graphs: record and replay; the outputs are copies and may be kept.
        max_shapes: shapes of the input whose recordings are kept, the most recent ones. They share
            their working memory.
        max_pixels: batches of more pixels run in equal slices on GPUs, which bounds the memory
            and costs no time: eight pictures of 2048 px fill the largest GPU.

    Returns:
        A module called with one tensor (B, C, H, W), which is cast to the model's dtype. It stays
        on its device and is neither trained nor saved; change the original and optimize that.

    Raises:
        ValueError: max_shapes or max_pixels is below 1, or the model flips sequences at random,
            which a recording would freeze.
    """
    for name, value in (("max_shapes", max_shapes), ("max_pixels", max_pixels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    flips = [one for one in model.modules() if isinstance(one, Vim) and one.flips_at_random]
    if flips and cuda_graphs:
        raise ValueError(
            'a Vim with bidirectional="sequence" flips sequences at random, which a CUDA graph '
            "would freeze; pass cuda_graphs=False"
        )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        _convert(frozen, dtype)
    _fuse_blocks(frozen)
    return _Optimized(frozen, cuda_graphs=cuda_graphs, max_shapes=max_shapes, max_pixels=max_pixels)


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, ResidualNorm | DirectionalSSM | BidirectionalMixer):
            continue  # float32 by policy; their projections are modules of their own
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _fuse_blocks(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, VimBlock) and _FusedBlock.takes(child):
                setattr(module, name, _FusedBlock(child))


class _FusedBlock(nn.Module):
    """A VimBlock for inference: the same face, weights packed for the fused kernels."""

    def __init__(self, block: VimBlock) -> None:
        super().__init__()
        mixer = block.mixer
        assert isinstance(mixer, BidirectionalMixer)
        parameters = mixer.parameters_to_fuse()
        assert parameters is not None
        self.packed = pack_mixer(
            [tensor.float().contiguous() for tensor in parameters], dtype=mixer.in_proj.weight.dtype
        )
        self.scale = mixer.scale
        self.layer_scale = None if mixer.layer_scale is None else mixer.layer_scale.float()
        self.norm_weight = block.norm.weight.float()
        self.eps = block.norm.eps

    @staticmethod
    def takes(block: VimBlock) -> bool:
        """Return whether there are kernels for this block where it lies."""
        mixer = block.mixer
        if not isinstance(mixer, BidirectionalMixer) or block.norm.bias is not None:
            return False
        parameters = mixer.parameters_to_fuse()
        if parameters is None:
            return False
        weight = mixer.in_proj.weight
        hidden = weight.new_empty(1, 1, weight.shape[1])
        return can_fuse_mixer(hidden, [tensor.float().contiguous() for tensor in parameters])

    def forward(self, branch: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mixer's output (B, L, D) and the residual stream before it, float32.

        Both may lie in the memory of what is given.
        """
        return fused_block(
            branch.contiguous(),
            residual,
            self.norm_weight,
            self.eps,
            self.packed,
            scale=self.scale,
            layer_scale=self.layer_scale,
        )


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """A forward recorded for one shape."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    outputs: Any


class _Optimized(nn.Module):
    """Runs a frozen model, on GPUs by replaying recordings."""

    def __init__(
        self, model: nn.Module, *, cuda_graphs: bool, max_shapes: int, max_pixels: int
    ) -> None:
        super().__init__()
        self.model = model
        self.max_shapes = max_shapes
        self.max_pixels = max_pixels
        tensor = next(model.parameters(), None)
        self.dtype = torch.float32 if tensor is None else tensor.dtype
        self.cuda_graphs = cuda_graphs and tensor is not None and tensor.is_cuda
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._pool: Any = None
        self._lock = threading.Lock()

    def forward(self, images: Tensor) -> Any:
        """Return what the model returns for one tensor, without gradients."""
        with torch.no_grad():
            if not images.is_cuda:
                return self._run(images)
            slices = torch.split(images, self._images_at_once(images))
            if not self.cuda_graphs:
                return _join([self._run(part) for part in slices])
            with self._lock, torch.cuda.device(images.device):
                return _join([self._replay(part) for part in slices])

    def _images_at_once(self, images: Tensor) -> int:
        pixels = images.shape[-2] * images.shape[-1]
        most = max(1, self.max_pixels // max(pixels, 1))
        num_slices = -(-len(images) // most)
        return max(1, -(-len(images) // max(num_slices, 1)))

    def _replay(self, images: Tensor) -> Any:
        recording = self._recording(images)
        recording.images.copy_(images)
        recording.graph.replay()
        return _copy(recording.outputs)

    def train(self, mode: bool = True) -> "_Optimized":
        """Stay in evaluation mode.

        Raises:
            ValueError: training was asked for.
        """
        if mode:
            raise ValueError("an optimized model is for inference; train the original")
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise ValueError(
            "an optimized model stays as it is; move or convert the original and optimize that"
        )

    def _run(self, images: Tensor) -> Any:
        return self.model(images.to(self.dtype) if images.is_floating_point() else images)

    def _recording(self, images: Tensor) -> _Recording:
        key = (tuple(images.shape), images.dtype)
        if key in self._recordings:
            self._recordings.move_to_end(key)
            return self._recordings[key]
        while len(self._recordings) >= self.max_shapes:
            self._recordings.popitem(last=False)
        static = images.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):  # kernels are compiled and workspaces made outside
                self._run(static)
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._run(static)
        self._recordings[key] = _Recording(graph=graph, images=static, outputs=outputs)
        return self._recordings[key]


def _copy(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.clone()
    if isinstance(outputs, dict):
        return {name: _copy(value) for name, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return type(outputs)(_copy(value) for value in outputs)
    return outputs


def _join(parts: list[Any]) -> Any:
    """Return the outputs of slices of a batch as those of the batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {name: _join([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(_join(list(values)) for values in zip(*parts, strict=True))
    return first

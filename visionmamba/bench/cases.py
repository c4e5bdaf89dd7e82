"""One case of the comparison: which model at which size, and how it is built.

Running it is passes.py's part, its peak memory memory.py's.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from visionmamba.models.config import VimConfig
    from visionmamba.models.deit import DeiT, DeiTConfig

ModelName = Literal[
    "vim",
    "vim-lean",
    "vim-mamba-ssm",
    "deit",
    "deit-eager",
    "deit-compile",
    "deit-checkpoint",
    "deit-window",
]
"""vim: this package's Vim; vim-lean: the same, keeping the input of each block alone for the
backward; vim-mamba-ssm: the same around the published kernels. deit: timm's DeiT with fused
attention; deit-eager: with attention as separate products and a softmax, the paper's setting;
deit-compile: under torch.compile; deit-checkpoint: keeping the input of each block alone;
deit-window: of detectors alone, attention in ViTDet's windows with four global blocks."""
Size = Literal["tiny", "small", "base"]
Mode = Literal["infer", "train"]
Precision = Literal["float32", "bfloat16"]
SegmenterHead = Literal["upernet", "segmenter"]
DetectorHead = Literal["cascade", "mask"]

PATCH_SIDE_PX = 16
NUM_REFERENCE_IMAGES = 2
"""Images of a batch whose output is compared with float32."""
TRAINING_ONLY: tuple[ModelName, ...] = ("vim-lean", "deit-checkpoint")
"""Models that differ from vim and deit in training alone."""
_WINDOW_SIZE = 14
_PUBLISHED_PACKAGES = ("mamba_ssm", "causal_conv1d")
_SIZE_NAMES: dict[Size, str] = {"tiny": "Ti", "small": "S", "base": "B"}
_VARIANTS: dict[ModelName, str] = {
    "vim": "",
    "vim-lean": " lean",
    "vim-mamba-ssm": " mamba_ssm",
    "deit": "",
    "deit-eager": " eager",
    "deit-compile": " compile",
    "deit-checkpoint": " checkpoint",
    "deit-window": " windows",
}


class OutOfMemory(Exception):
    """A pass needed more memory than there is."""


@contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Turn what PyTorch and Python raise when memory runs out into OutOfMemory."""
    import torch

    said = ("can't allocate memory", "bad_alloc", "out of memory")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_lack = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_lack or any(words in str(error) for words in said):
            raise OutOfMemory from None
        raise


def is_vim(model: ModelName) -> bool:
    """Whether a model is a Vim; otherwise it is a DeiT."""
    return model.startswith("vim")


def display_name(model: ModelName, size: Size) -> str:
    """Return a model's name as in the papers, with what is special about it."""
    return f"{'Vim' if is_vim(model) else 'DeiT'}-{_SIZE_NAMES[size]}{_VARIANTS[model]}"


def check_available(model: ModelName) -> None:
    """Raise ImportError when a model needs packages that are not installed."""
    missing = [name for name in _PUBLISHED_PACKAGES if importlib.util.find_spec(name) is None]
    if model == "vim-mamba-ssm" and missing:
        raise ImportError(
            f"vim-mamba-ssm runs the published kernels and needs {' and '.join(missing)}; install "
            "mamba-ssm and causal-conv1d as their authors describe, or leave the model out"
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, an input and what is done with them."""

    model: ModelName
    """Which model."""
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
    """float32 throughout; or bfloat16: weights and input in inference, autocast in training."""
    pyramid: bool = False
    """Whether feature maps at strides 4, 8, 16 and 32 are made instead of logits."""
    segmenter: SegmenterHead | None = None
    """The head of a segmenter, which scores every pixel; None leaves the classifier."""
    detector: DetectorHead | None = None
    """The heads of a detector, which find boxes and masks; None leaves the classifier."""
    num_classes: int = 1000
    """Outputs of the classifier, or of every pixel, or classes of the objects."""
    cuda_graphs: bool = True
    """Whether passes on a GPU are replayed from CUDA graphs."""
    image: Path | None = None
    """A picture resized to the input; None takes noise."""

    def to_json(self) -> str:
        """Return the case as text for another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """Rebuild a case from `to_json`."""
        fields = json.loads(text)
        image = fields.pop("image")
        return cls(**fields, image=Path(image) if image else None)

    @property
    def num_tokens(self) -> int:
        """Patches of one image, without the class token."""
        return (self.resolution // PATCH_SIDE_PX) ** 2

    @property
    def is_on_gpu(self) -> bool:
        """Whether it runs on a CUDA device."""
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the input."""
        import torch

        is_half = self.precision == "bfloat16" and self.mode == "infer" and self.detector is None
        return torch.bfloat16 if is_half else torch.float32

    def build_model(self) -> "nn.Module":
        """Return the model on the device in float32; variants of one model have equal weights."""
        import torch

        torch.manual_seed(0)
        with torch.device(self.device):
            model = self._build_vim() if is_vim(self.model) else self._build_deit()
        if self.model == "deit-compile":
            model = _compiled(model)
        return model.train(self.mode == "train")

    def build_images(self) -> "torch.Tensor":
        """Return the input (batch, 3, resolution, resolution) on the device."""
        import torch

        shape = (self.batch, 3, self.resolution, self.resolution)
        if self.image is None:
            generator = torch.Generator(self.device).manual_seed(0)
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        import numpy as np
        from PIL import Image

        with Image.open(self.image) as picture:
            resized = picture.convert("RGB").resize((self.resolution, self.resolution))
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, H, W)
        return (pixels / 127.5 - 1).expand(shape).to(self.device, self.dtype)

    def _build_vim(self) -> "nn.Module":
        from visionmamba.models.config import VimConfig

        sizes = {"tiny": VimConfig.tiny, "small": VimConfig.small, "base": VimConfig.base}
        config = sizes[self.size](
            image_size=self.resolution,
            num_classes=self.num_classes,
            activation_checkpointing=self.model == "vim-lean",
            # no class token below a segmenter or a detector, as published
            readout="middle" if self.segmenter is None and self.detector is None else "mean",
        )
        model = self._with_head(config)
        if self.model == "vim-mamba-ssm":
            from visionmamba.bench.published import use_published_kernels
            from visionmamba.models.vim import Vim

            for module in list(model.modules()):
                if isinstance(module, Vim):
                    use_published_kernels(module)
        return model

    def _build_deit(self) -> "nn.Module":
        from timm.layers.config import set_fused_attn

        from visionmamba.models.deit import DeiT, DeiTConfig

        sizes = {"tiny": DeiTConfig.tiny, "small": DeiTConfig.small, "base": DeiTConfig.base}
        config = sizes[self.size](image_size=self.resolution, num_classes=self.num_classes)
        set_fused_attn(enable=self.model != "deit-eager")  # read when attention is built
        try:
            model = self._with_head(config)
        finally:
            set_fused_attn(enable=True)
        if self.model == "deit-checkpoint":
            for module in list(model.modules()):
                if isinstance(module, DeiT):
                    _checkpoint_blocks(module)
        return model

    def _with_head(self, config: "VimConfig | DeiTConfig") -> "nn.Module":
        """Return the backbone with what the case puts on it."""
        if self.segmenter is not None:
            from visionmamba.models.segmentation import SegmenterConfig

            return SegmenterConfig(
                backbone=config,
                num_classes=self.num_classes,
                head=self.segmenter,
                dropout=0.0,  # else a training step's error to float32 could not be told
            ).build()
        if self.detector is not None:
            from visionmamba.models.detection import DetectorConfig

            return DetectorConfig(
                backbone=config,
                num_classes=self.num_classes,
                head=self.detector,
                window_size=_WINDOW_SIZE if self.model == "deit-window" else None,
                score_threshold=0.0,
            ).build()
        if self.pyramid:
            from visionmamba.models.pyramid import PyramidBackbone

            return PyramidBackbone(config.build())
        return config.build()


def _compiled(model: "nn.Module") -> "nn.Module":
    """Return a model that is compiled at its first call, so that copies made before are too."""
    import torch
    from torch import nn

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.is_compiled = False

        def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            if not self.is_compiled:
                self.model.compile(dynamic=False)
                self.is_compiled = True
            output: torch.Tensor | tuple[torch.Tensor, ...] = self.model(images)
            return output

    torch.compiler.reset()  # else shapes of earlier cases count as reasons for dynamic ones
    return Compiled()


def _checkpoint_blocks(model: "DeiT") -> None:
    """Let a DeiT keep the input of each block alone for its backward."""
    from torch import Tensor, nn
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            # nothing in a block is random, and saving the generator cannot be captured
            out: Tensor = checkpoint(
                self.block, x, use_reentrant=False, preserve_rng_state=False, **options
            )
            return out

    model.blocks = nn.Sequential(*map(Checkpointed, model.blocks))

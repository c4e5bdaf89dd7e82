"""The authors' released checkpoints: where they are, how accurate, under which licence."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One checkpoint of the authors; accuracies are theirs, on ImageNet-1k's validation set."""

    name: str
    """What Vim.from_pretrained and `visionmamba convert` know it by."""
    repository: str
    """Repository on the Hugging Face Hub."""
    filename: str
    """File in the repository."""
    top1: float
    """Per cent."""
    top5: float
    """Per cent."""
    size_mb: int
    """Size of the file: weights, their average and the optimizer's moments."""
    license: str = "apache-2.0"
    """As the repository says."""

    @property
    def url(self) -> str:
        """Where a browser finds the file."""
        return f"https://huggingface.co/{self.repository}/resolve/main/{self.filename}"


PUBLISHED_MODELS: tuple[PublishedModel, ...] = (
    PublishedModel(
        name="vim_tiny_patch16_224",
        repository="hustvl/Vim-tiny-midclstok",
        filename="vim_t_midclstok_76p1acc.pth",
        top1=76.1,
        top5=93.0,
        size_mb=115,
    ),
    PublishedModel(
        name="vim_tiny_patch16_stride8_224",
        repository="hustvl/Vim-tiny-midclstok",
        filename="vim_t_midclstok_ft_78p3acc.pth",
        top1=78.3,
        top5=94.2,
        size_mb=117,
    ),
    PublishedModel(
        name="vim_small_patch16_224",
        repository="hustvl/Vim-small-midclstok",
        filename="vim_s_midclstok_80p5acc.pth",
        top1=80.5,
        top5=95.1,
        size_mb=413,
    ),
    PublishedModel(
        name="vim_small_patch16_stride8_224",
        repository="hustvl/Vim-small-midclstok",
        filename="vim_s_midclstok_ft_81p6acc.pth",
        top1=81.6,
        top5=95.4,
        size_mb=417,
    ),
    PublishedModel(
        name="vim_base_patch16_224",
        repository="hustvl/Vim-base-midclstok",
        filename="vim_b_midclstok_81p9acc.pth",
        top1=81.9,
        top5=95.8,
        size_mb=1562,
    ),
    PublishedModel(
        name="vim_tiny_patch16_224_rope",  # January 2024, superseded by the first
        repository="hustvl/Vim-tiny",
        filename="vim_tiny_73p1.pth",
        top1=73.1,
        top5=91.1,
        size_mb=116,
    ),
)


def models_table() -> str:
    """Return PUBLISHED_MODELS as text, one line a model."""
    rows = [("name", "top-1", "top-5", "MB", "licence", "repository and file on the Hub")]
    rows += [
        (
            model.name,
            f"{model.top1:.1f}",
            f"{model.top5:.1f}",
            str(model.size_mb),
            model.license,
            f"{model.repository} {model.filename}",
        )
        for model in PUBLISHED_MODELS
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

"""The picture of a run: losses and the monitored metric over the epochs."""

import io
from pathlib import Path

from visionmamba.training.checkpoint import replace_file
from visionmamba.training.metrics import read_metrics


def draw_curves(metrics_file: Path, target: Path, *, monitor: str, title: str) -> None:
    """Draws metrics.csv as a PNG: training loss, validation loss if any, the monitored metric.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "curves need matplotlib; install it with: pip install 'visionmamba[train]'"
        ) from error
    rows = read_metrics(metrics_file)
    trained = [row for row in rows if "train_loss" in row]
    judged = [row for row in rows if monitor in row]
    steps_per_epoch = judged[0]["step"] / judged[0]["epoch"] if judged else 1.0
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, metric = figure.subplots(1, 2)
    losses.plot(
        [row["step"] / steps_per_epoch for row in trained],
        [row["train_loss"] for row in trained],
        color="#9db7d5",
        linewidth=0.8,
        label="training (single steps)",
    )
    epochs = [row["epoch"] for row in judged]
    if any("val_loss" in row for row in judged):  # detection has none
        losses.plot(
            epochs, [row["val_loss"] for row in judged], color="#d1495b", label="validation"
        )
    losses.set(xlabel="epoch", ylabel="loss", title=title)
    losses.legend(frameon=False)
    marker = "o" if len(judged) == 1 else None  # a line through one point is not seen
    metric.plot(epochs, [row[monitor] for row in judged], color="#00798c", marker=marker)
    metric.set(xlabel="epoch", ylabel=monitor.replace("_", " "))
    if judged:
        metric.set_title(f"last epoch: {judged[-1][monitor]:.4f}")
    for axes in (losses, metric):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_file(target, lambda file: file.write(picture.getvalue()))

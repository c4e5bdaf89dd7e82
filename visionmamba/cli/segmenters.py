"""`visionmamba eval` and `visionmamba predict` with the weights of a segmenter."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visionmamba.cli.messages import complain
from visionmamba.cli.options import MAX_SHOWN_CLASSES, NUM_WORST_CLASSES, num_workers_for
from visionmamba.cli.pictures import inference_of, tell_each

if TYPE_CHECKING:
    from visionmamba.cli.use import Eval, Predict
    from visionmamba.tasks import Inference, Segmentation, SegmentationEvaluation


def eval_segmenter(options: "Eval") -> int:
    """Prints and saves how well a segmenter does; returns the exit code."""
    from visionmamba.tasks import evaluate_segmentation

    evaluation = evaluate_segmentation(
        options.weights,
        options.data,
        split=options.split,
        inference=_inference_of(options),
        short_side=options.short_side,
        precision=options.precision,
        device=options.device,
        batch_size=4 if options.batch_size is None else options.batch_size,
        num_workers=num_workers_for(options.device, options.num_workers),
        on_unreadable=options.on_unreadable,
        max_pixels=options.max_pixels,
        progress=True,
    )
    if options.out is not None:
        print(evaluation.save(options.out))
    _print_evaluation(evaluation)
    return 0


def predict_segments(options: "Predict", files: Sequence[Path]) -> int:
    """Tells what every pixel of pictures shows; returns the exit code."""
    from visionmamba.tasks import Segmenter

    segmenter = Segmenter.load(
        options.weights, device=options.device, inference=_inference_of(options)
    )

    def text(found: "Segmentation") -> str:
        shares = list(zip(found.classes, found.shares, strict=True))[: options.top_k]
        return f"{found.file}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares)

    return tell_each(
        options,
        files,
        find=lambda file: segmenter(file, max_pixels=options.max_pixels),
        text=text,
    )


def _inference_of(options: "Eval | Predict") -> "Inference":
    from visionmamba.tasks import Inference

    return inference_of(
        options,
        Inference,
        task="segmentation",
        trained="segmenter",
        names=("mode", "crop_size", "stride", "num_windows", "scales", "flip"),
        stride_share=2 / 3,
    )


def _print_evaluation(evaluation: "SegmentationEvaluation") -> None:
    print(
        f"mIoU {evaluation.miou:.2%}, mAcc {evaluation.macc:.2%}, aAcc {evaluation.aacc:.2%} of "
        f"{evaluation.num_images} images, {evaluation.num_pixels:,} labelled pixels; "
        f"{evaluation.images_per_second:.3g} images/s, "
        f"the model alone {evaluation.model_images_per_second:.3g}"
    )
    rows = evaluation.classes()
    if len(rows) > MAX_SHOWN_CLASSES:
        print(f"the {NUM_WORST_CLASSES} worst of {len(rows)} classes; --out DIR writes all:")
        rows = sorted(rows, key=lambda row: row.iou)[:NUM_WORST_CLASSES]
    for row in rows:
        accuracy = "       -" if row.accuracy is None else f"{row.accuracy:8.2%}"
        mixed_up = f", most often taken for {row.taken_for}" if row.taken_for else ""
        print(
            f"  {row.name:24} IoU {row.iou:7.2%}, accuracy{accuracy} of {row.share:.2%} of the "
            f"pixels{mixed_up}"
        )
    for reason in evaluation.unreadable:
        complain(f"left out: {reason}")

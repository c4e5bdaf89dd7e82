"""`visionmamba eval` and `visionmamba predict` with the weights of a detector."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from visionmamba.cli.messages import complain
from visionmamba.cli.options import MAX_SHOWN_CLASSES, NUM_WORST_CLASSES, num_workers_for
from visionmamba.cli.pictures import inference_of, tell_each

if TYPE_CHECKING:
    from visionmamba.cli.use import Eval, Predict
    from visionmamba.tasks import DetectionEvaluation, DetectionInference, Detections
    from visionmamba.tasks.detection_metrics import AveragePrecision

_COLUMNS = ("AP", "AP50", "AP75", "small", "medium", "large")


def eval_detector(options: "Eval") -> int:
    """Prints and saves how well a detector does; returns the exit code."""
    from visionmamba.tasks import evaluate_detection

    if options.split == "test":
        raise ValueError("images with objects have no split test; use --split train or --split val")
    evaluation = evaluate_detection(
        options.weights,
        options.data,
        split=options.split,
        images=options.images,
        inference=_inference_of(options),
        max_detections=options.max_detections,
        precision=options.precision,
        device=options.device,
        batch_size=1 if options.batch_size is None else options.batch_size,
        num_workers=num_workers_for(options.device, options.num_workers),
        on_unreadable=options.on_unreadable,
        max_pixels=options.max_pixels,
        progress=True,
    )
    if options.out is not None:
        print(evaluation.save(options.out))
    _print_evaluation(evaluation)
    return 0


def predict_objects(options: "Predict", files: Sequence[Path]) -> int:
    """Tells which objects pictures show; returns the exit code."""
    from visionmamba.tasks import Detector
    from visionmamba.tasks.coco_files import IMAGES_NAME, RESULTS_NAME, CocoFiles

    detector = Detector.load(
        options.weights, device=options.device, inference=_inference_of(options)
    )

    def find(file: Path) -> "Detections":
        found = detector(file, min_score=options.min_score, max_pixels=options.max_pixels)
        if results is not None:
            results.add(found)
        return found

    def text(found: "Detections") -> str:
        counts = list(found.counts.items())[: options.top_k]
        return f"{found.file}: " + (", ".join(f"{n} {name}" for name, n in counts) or "nothing")

    with nullcontext() if options.out is None else CocoFiles(options.out) as results:
        return tell_each(options, files, find=find, text=text, taken=(RESULTS_NAME, IMAGES_NAME))


def _inference_of(options: "Eval | Predict") -> "DetectionInference":
    from visionmamba.tasks import DetectionInference

    return inference_of(
        options,
        DetectionInference,
        task="detection",
        trained="detector",
        names=("mode", "crop_size", "stride", "num_windows"),
        stride_share=3 / 4,
    )


def _print_evaluation(evaluation: "DetectionEvaluation") -> None:
    print(" " * 5 + "".join(f"{column:>8}" for column in _COLUMNS))
    print("boxes" + _cells(evaluation.boxes))
    if evaluation.masks is not None:
        print("masks" + _cells(evaluation.masks))
    print(
        f"of {evaluation.num_images} images with {evaluation.num_objects:,} objects, the best "
        f"{evaluation.max_detections} of an image and class judged; "
        f"{evaluation.images_per_second:.3g} images/s, the model alone "
        f"{evaluation.model_images_per_second:.3g}"
    )
    rows = [row for row in evaluation.classes() if row.box_ap is not None]
    if len(rows) > MAX_SHOWN_CLASSES:
        print(f"the {NUM_WORST_CLASSES} worst of {len(rows)} classes; --out DIR writes all:")
        rows = sorted(rows, key=lambda row: row.box_ap or 0.0)[:NUM_WORST_CLASSES]
    for row in rows:
        masks = "" if row.mask_ap is None else f", masks {row.mask_ap:7.2%}"
        print(
            f"  {row.name:24} AP of boxes {row.box_ap:7.2%}{masks} of {row.num_objects:,} objects"
        )
    for reason in evaluation.unreadable:
        complain(f"left out: {reason}")


def _cells(precision: "AveragePrecision") -> str:
    values = precision.to_dict().values()
    return "".join(f"{'-' if value is None else f'{value:.2%}':>8}" for value in values)

"""The same pictures as every variant of a study sees them, chosen by what is in them alone."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from visionmamba.data import DetectionSet
from visionmamba.recipes.detection import DetectionRecipe
from visionmamba.tasks.detector import Detector
from visionmamba.tasks.files import replace_file
from visionmamba.tasks.overlay import draw_objects, draw_rows, palette_of

if TYPE_CHECKING:
    from visionmamba.studies.results import StudyResult

_SIDE_PX = 384


def choose_largest(pictures: DetectionSet, count: int) -> list[int]:
    """Returns the pictures whose largest object's box covers the largest share of them.

    The largest share first, the earlier picture where two are equal. Crowds do not count, and no
    model has a say.

    Args:
        pictures: the set.
        count: how many, at most.
    """
    shares = []
    for index in range(len(pictures)):
        objects = pictures.objects(index)
        boxes = objects.boxes[~objects.is_crowd]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        shares.append(areas.max(initial=0.0) / (objects.height * objects.width))
    order = np.argsort(-np.array(shares), kind="stable")
    return [int(index) for index in order[:count] if shares[index] > 0]


def draw_largest_objects(result: "StudyResult", count: int, *, device: str = "auto") -> Path:
    """Draws the objects of some pictures, and beside them what each variant finds; returns the PNG.

    The pictures are those of the validation split that `choose_largest` names; the weights those
    which count, of the first seed that has a result; the detections those with their min_score.

    Args:
        result: of a study of detectors.
        count: how many pictures, at most.
        device: where the detectors run.
    """
    study = result.study
    recipe = study.variants[0].recipe
    assert isinstance(recipe, DetectionRecipe)
    pictures = recipe.data.open("val")
    chosen = choose_largest(pictures, count)
    titles = ["objects"]
    columns = [[_truth(pictures, index) for index in chosen]]
    for variant in study.variants:
        runs = result.runs_that_count(variant)
        done = [run for run in runs if result.outcomes[run].failure is None]
        if done:
            weights = study.folder_of(done[0]) / f"{study.judged}.safetensors"
            detector = Detector.load(weights, device=device)
            columns.append([_found(detector, pictures, index) for index in chosen])
            titles.append(f"{variant.name}, seed {done[0].seed}")
    sheet = draw_rows(list(zip(*columns, strict=True)), titles, side=_SIDE_PX)
    path = study.out / f"{study.name}_overlays.png"
    replace_file(path, sheet)
    return path


def _truth(pictures: DetectionSet, index: int) -> Image.Image:
    image, objects = pictures.image(index), pictures.objects(index)
    return draw_objects(
        image,
        boxes=objects.boxes,
        labels=objects.labels,
        class_names=pictures.class_names,
        palette=palette_of(None, len(pictures.class_names)),
        masks=objects.masks,
        scale=_scale(image),
    )


def _found(detector: Detector, pictures: DetectionSet, index: int) -> Image.Image:
    image = pictures.image(index)
    found = detector(image)
    return draw_objects(
        image,
        boxes=found.boxes,
        labels=found.labels,
        class_names=found.class_names,
        palette=found.palette,
        masks=found.run_lengths,
        scores=found.scores,
        scale=_scale(image),
    )


def _scale(image: Image.Image) -> int:
    """Returns how many times a picture is enlarged, so that names do not hide a small one."""
    return max(1, _SIDE_PX // max(image.size))

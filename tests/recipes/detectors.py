"""Recipes that learn drawn objects in seconds, for tests of what happens around the training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from visionmamba.data import DrawnObjects
from visionmamba.models import VimConfig
from visionmamba.recipes import DetectionRecipe, vim_objects
from visionmamba.tasks.run_lengths import compress

STEPS_PER_EPOCH = 2


def small_recipe(**changes: Any) -> DetectionRecipe:
    """Returns two epochs, of two steps each, of a tiny Vim with Mask R-CNN."""
    recipe = vim_objects()
    backbone = VimConfig(
        image_size=32, patch_size=8, d_model=16, depth=2, readout="mean", drop_path=0.2
    )
    recipe = replace(
        recipe,
        data=replace(recipe.data, num_train=8, num_val=4, image_size=32),
        model=replace(
            recipe.model,
            backbone=backbone,
            channels=8,
            box_width=8,
            num_proposals=20,
            num_sampled=8,
        ),
        preprocessing=replace(recipe.preprocessing, image_size=32),
        augmentation=replace(recipe.augmentation, min_scale=0.5, max_scale=1.5),
        epochs=2,
        epoch_steps=STEPS_PER_EPOCH,
        batch_size=4,
        log_every_steps=1,
    )
    return replace(recipe, **changes)


def folder_in_coco_format(
    root: Path, *, num_train: int = 4, num_val: int = 2, image_size: int = 32, masks: bool = True
) -> Path:
    """Writes drawn objects as any user's folder in COCO's format; returns it."""
    drawn = DrawnObjects(num_train=num_train, num_val=num_val, image_size=image_size)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        pictures = drawn.open(split)
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(len(pictures)):
            objects, name = pictures.objects(index), f"{index}.png"
            pictures.image(index).save(root / split / name)
            size = [objects.height, objects.width]
            images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
            for number, (left, top, right, bottom) in enumerate(objects.boxes.tolist()):
                one = {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(objects.labels[number]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(objects.areas[number]),
                    "iscrowd": 0,
                }
                if masks:
                    assert objects.masks is not None
                    counts = compress(objects.masks[number])
                    one["segmentation"] = {"size": size, "counts": counts}
                annotations.append(one)
        categories = [{"id": k, "name": name} for k, name in enumerate(pictures.class_names, 1)]
        table = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(table))
    return root

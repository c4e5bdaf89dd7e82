"""What a detector found in many pictures, as files that COCO's tools read."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from visionmamba.tasks.detector import Detections
from visionmamba.tasks.files import replace_file

RESULTS_NAME = "coco_results"
IMAGES_NAME = "coco_images"


class CocoFiles:
    """Writes coco_results.json and coco_images.json into a folder, picture after picture.

    The first lists the objects of all pictures in COCO's results format, with masks as run lengths;
    the second says which pictures and classes its numbers mean, so that
    `COCO("coco_images.json").loadRes("coco_results.json")` works. Pictures are numbered from 1.
    Both appear whole at the end of the context, or not at all when it fails.
    """

    def __init__(self, folder: str | Path) -> None:
        """Takes the folder, which is made when missing."""
        self._folder = Path(folder)
        self._images: list[dict[str, Any]] = []
        self._categories: list[dict[str, Any]] = []
        self._num_rows = 0
        self._temporary = self._folder / f".{RESULTS_NAME}.json.tmp"
        self._results: TextIO | None = None

    def __enter__(self) -> "CocoFiles":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._results = self._temporary.open("w", encoding="utf-8")
        return self

    def add(self, found: Detections) -> None:
        """Takes the objects of the next picture."""
        assert self._results is not None
        image_id = len(self._images) + 1
        self._images.append(
            {
                "id": image_id,
                "file_name": found.file or "",
                "height": found.picture.height,
                "width": found.picture.width,
            }
        )
        self._categories = [
            {"id": category_id, "name": name}
            for category_id, name in zip(found.category_ids, found.class_names, strict=True)
        ]
        for row in found.coco_results(image_id):
            self._results.write((",\n" if self._num_rows else "[\n") + json.dumps(row))
            self._num_rows += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._results is not None
        with self._results:
            self._results.write("\n]\n" if self._num_rows else "[]\n")
        if error is not None:
            self._temporary.unlink(missing_ok=True)
            return
        content = {
            "info": {},
            "images": self._images,
            "categories": self._categories,
            "annotations": [],
        }
        text = json.dumps(content, indent=2) + "\n"
        replace_file(self._folder / f"{IMAGES_NAME}.json", text)
        os.replace(self._temporary, self._folder / f"{RESULTS_NAME}.json")

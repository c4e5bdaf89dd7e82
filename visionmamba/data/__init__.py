"""From files to batches: image sets, their preparation for a model, loaders that can be resumed."""

from visionmamba.data.batches import Batch, EvalBatches, TrainBatches
from visionmamba.data.box_batches import (
    DetectionBatch,
    DetectionEvalBatches,
    DetectionTrainBatches,
)
from visionmamba.data.box_transforms import (
    BoxTransform,
    DetectionAugmentation,
    DetectionPreprocessing,
    DetectionTarget,
)
from visionmamba.data.coco import Coco, DetectionSet, DetectionSplits, FileObjects, Objects
from visionmamba.data.coco_json import AnnotationError
from visionmamba.data.drawn_objects import ArrayObjects, DrawnObjects
from visionmamba.data.image_files import (
    MAX_PIXELS,
    UnreadableImageError,
    as_upright_eight_bit,
    decode_image,
    open_image,
)
from visionmamba.data.libraries import HuggingFaceData, TimmData
from visionmamba.data.loading import PADDING, derive_seed
from visionmamba.data.memory import BatchTooLargeError, explain_out_of_memory
from visionmamba.data.mixing import Mixing
from visionmamba.data.sets import (
    ArrayImages,
    Digits,
    FileImages,
    ImageFolder,
    ImageSet,
    ImageSplits,
    image_files_in,
    open_images,
    split_readable,
)
from visionmamba.data.shards import WebShards
from visionmamba.data.transforms import Augmentation, ImageTransform, Preprocessing

DataSource = Digits | ImageFolder | WebShards | HuggingFaceData | TimmData
"""What a recipe can learn from; each has `build() -> ImageSplits`."""

DetectionSource = Coco | DrawnObjects
"""What a detector can learn from; each has `build() -> DetectionSplits` and `open(split)`."""

__all__ = [
    "MAX_PIXELS",
    "PADDING",
    "AnnotationError",
    "ArrayImages",
    "ArrayObjects",
    "Augmentation",
    "Batch",
    "BatchTooLargeError",
    "BoxTransform",
    "Coco",
    "DataSource",
    "DetectionAugmentation",
    "DetectionBatch",
    "DetectionEvalBatches",
    "DetectionPreprocessing",
    "DetectionSet",
    "DetectionSource",
    "DetectionSplits",
    "DetectionTarget",
    "DetectionTrainBatches",
    "Digits",
    "DrawnObjects",
    "EvalBatches",
    "FileImages",
    "FileObjects",
    "HuggingFaceData",
    "ImageFolder",
    "ImageSet",
    "ImageSplits",
    "ImageTransform",
    "Mixing",
    "Objects",
    "Preprocessing",
    "TimmData",
    "TrainBatches",
    "UnreadableImageError",
    "WebShards",
    "as_upright_eight_bit",
    "decode_image",
    "derive_seed",
    "explain_out_of_memory",
    "image_files_in",
    "open_image",
    "open_images",
    "split_readable",
]

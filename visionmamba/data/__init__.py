"""From files to batches: image sets, their preparation for a model, loaders that can be resumed."""

from visionmamba.data.batches import Batch, ChangedImages, EvalBatches, TrainBatches
from visionmamba.data.box_batches import (
    DetectionBatch,
    DetectionCuts,
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
from visionmamba.data.joint_transforms import (
    JointTransform,
    SegmentationAugmentation,
    SegmentationPreprocessing,
)
from visionmamba.data.libraries import HuggingFaceData, TimmData
from visionmamba.data.loading import PADDING, derive_seed
from visionmamba.data.mask_batches import (
    SegmentationBatch,
    SegmentationCuts,
    SegmentationEvalBatches,
    SegmentationTrainBatches,
)
from visionmamba.data.mask_check import ClassCounts, MaskReport, check_masks
from visionmamba.data.mask_folders import (
    ADE20K,
    Cityscapes,
    MaskFolder,
    MaskFormat,
    MaskSplit,
    SegmentationSource,
    mask_source,
    open_masks,
)
from visionmamba.data.masks import (
    IGNORE,
    ArrayMasks,
    FileMasks,
    MaskError,
    MaskProblem,
    SegmentationSet,
    SegmentationSplits,
)
from visionmamba.data.memory import BatchTooLargeError, explain_out_of_memory
from visionmamba.data.mixing import Mixing
from visionmamba.data.object_check import ObjectCounts, ObjectReport, check_objects
from visionmamba.data.object_sources import DetectionSource, open_objects
from visionmamba.data.resident import KeptEvalBatches, ResidentTrainBatches
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
from visionmamba.data.shapes import Shapes
from visionmamba.data.shards import WebShards
from visionmamba.data.transforms import (
    Augmentation,
    ImageTransform,
    Preprocessing,
    restore_image,
)

DataSource = Digits | ImageFolder | WebShards | HuggingFaceData | TimmData
"""What a recipe can learn from; each has `build() -> ImageSplits`."""

__all__ = [
    "ADE20K",
    "IGNORE",
    "MAX_PIXELS",
    "PADDING",
    "AnnotationError",
    "ArrayImages",
    "ArrayMasks",
    "ArrayObjects",
    "Augmentation",
    "Batch",
    "BatchTooLargeError",
    "BoxTransform",
    "ChangedImages",
    "Cityscapes",
    "ClassCounts",
    "Coco",
    "DataSource",
    "DetectionAugmentation",
    "DetectionBatch",
    "DetectionCuts",
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
    "FileMasks",
    "FileObjects",
    "HuggingFaceData",
    "ImageFolder",
    "ImageSet",
    "ImageSplits",
    "ImageTransform",
    "JointTransform",
    "KeptEvalBatches",
    "MaskError",
    "MaskFolder",
    "MaskFormat",
    "MaskProblem",
    "MaskReport",
    "MaskSplit",
    "Mixing",
    "ObjectCounts",
    "ObjectReport",
    "Objects",
    "Preprocessing",
    "ResidentTrainBatches",
    "SegmentationAugmentation",
    "SegmentationBatch",
    "SegmentationCuts",
    "SegmentationEvalBatches",
    "SegmentationPreprocessing",
    "SegmentationSet",
    "SegmentationSource",
    "SegmentationSplits",
    "SegmentationTrainBatches",
    "Shapes",
    "TimmData",
    "TrainBatches",
    "UnreadableImageError",
    "WebShards",
    "as_upright_eight_bit",
    "check_masks",
    "check_objects",
    "decode_image",
    "derive_seed",
    "explain_out_of_memory",
    "image_files_in",
    "mask_source",
    "open_image",
    "open_images",
    "open_masks",
    "open_objects",
    "restore_image",
    "split_readable",
]

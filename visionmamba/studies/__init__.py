"""Studies: variants of a recipe trained side by side, compared under the same rules.

Not for measurements of speed and memory; those are in bench.
"""

from visionmamba.studies.jobs import Outcome
from visionmamba.studies.results import Run, StudyResult
from visionmamba.studies.study import RunOptions, Study, Variant

__all__ = ["Outcome", "Run", "RunOptions", "Study", "StudyResult", "Variant"]

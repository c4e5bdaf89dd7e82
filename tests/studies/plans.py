"""Small studies, and trainings that are made up, for tests of what happens around the training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.small import small_recipe
from visionmamba.studies import Outcome, Study, Variant, plots, pool
from visionmamba.studies.jobs import Job


def small_study(out: Path, **changes: Any) -> Study:
    """Returns Vim against Vim that reads forward only, on the digits; an epoch has two steps."""
    recipe = small_recipe(batch_size=512, epochs=2)
    forward = replace(recipe, model=replace(recipe.model, bidirectional="none"))
    variants = (
        Variant(name="Both ways", recipe=recipe, compared_with="Forward", paper={"top-1": "73.9"}),
        Variant(name="Forward", recipe=forward, paper={"top-1": "73.2"}),
    )
    study = Study(
        name="small",
        title="Small",
        variants=variants,
        learning_rates=(1e-3, 4e-3),
        seeds=(0, 1),
        sweep_epochs=1,
        command="visionmamba ablate small",
        out=out,
    )
    return replace(study, **changes)


def make_up(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Job], Outcome]) -> list[Job]:
    """Lets a function say what each training came to; returns the list that the jobs go into.

    Pictures are left empty, as drawing them takes longer than all else.
    """
    jobs: list[Job] = []

    def run(job: Job) -> Outcome:
        jobs.append(job)
        return answer(job)

    monkeypatch.setattr(pool, "run_job", run)
    for name in ("plot_curves", "plot_rates"):
        monkeypatch.setattr(plots, name, lambda result, theme: b"")
    return jobs

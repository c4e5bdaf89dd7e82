"""A study: the sweep, the runs that count, what is said of them, and taking it up again."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.studies.plans import make_up, small_study
from visionmamba.data import Augmentation
from visionmamba.studies import Outcome, RunOptions
from visionmamba.studies.jobs import Job
from visionmamba.studies.plots import _curves_of, plot_curves, plot_rates
from visionmamba.studies.results import Scores
from visionmamba.studies.study import alone_in
from visionmamba.training import fit
from visionmamba.training.folder import METRICS

pytestmark = pytest.mark.once

CPU = RunOptions(device="cpu")
QUIET = Console(quiet=True)


def test_trains_all_seeds_at_the_best_rate_of_the_sweep_and_is_taken_up(tmp_path: Path) -> None:
    study = small_study(tmp_path, seeds=(0,))
    (variant,) = study.variants[1:]
    study = replace(study, variants=(variant,))
    result = study.run(CPU, console=QUIET)
    sweep = {lr: scores.mean for lr, scores in result.sweep(variant).items()}
    best = max(sweep, key=lambda lr: sweep[lr])
    assert result.row(variant).best_rate == best
    run = study.runs_at(variant, best)[0]
    alone = fit(study.recipe_of(run), study.folder_of(run), device="cpu", progress=False)
    assert alone.was_finished
    assert result.scores([run]) == Scores(values=(alone.metrics["val_accuracy"],))
    with Image.open(tmp_path / "small_curves_dark.png") as picture:
        assert picture.width > 500
    assert (tmp_path / "small_rates_light.png").is_file()
    again = study.run(CPU, console=QUIET)
    assert again.outcomes == result.outcomes  # the seconds too, so nothing was trained


def accuracy_of(job: Job) -> float:
    """Returns made-up accuracies: a rate of 4e-3 is better by a tenth, forward alone by 0.02."""
    recipe = job.recipe
    better = 0.02 * (recipe.model.bidirectional == "none")  # type: ignore[union-attr]
    return 0.5 + 0.1 * (recipe.optimizer.lr == 4e-3) + better + 0.01 * recipe.seed


def made_up_outcome(job: Job) -> Outcome:
    return Outcome(metrics={"val_accuracy": accuracy_of(job)}, seconds=60.0, parameters=1000)


def test_short_sweep_has_a_short_warm_up_and_only_its_best_rate_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_up(monkeypatch, made_up_outcome)
    study = small_study(tmp_path)
    study.run(CPU, console=QUIET)
    plan = [(job.recipe.epochs, job.recipe.optimizer.lr, job.recipe.seed) for job in jobs]
    assert sorted(plan) == sorted(
        [(1, 1e-3, 0), (1, 4e-3, 0), (2, 4e-3, 0), (2, 4e-3, 1)] * len(study.variants)
    )
    whole = study.variants[0].recipe.optimizer.warmup_epochs
    warmups = {job.recipe.epochs: job.recipe.optimizer.warmup_epochs for job in jobs}
    assert warmups == {1: whole / 2, 2: whole}
    assert len({job.out for job in jobs}) == len(jobs)


def test_runs_of_a_sweep_at_full_length_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_up(monkeypatch, made_up_outcome)
    small_study(tmp_path, sweep_epochs=None).run(CPU, console=QUIET)
    assert len(jobs) == 2 * 3


def test_one_rate_needs_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_up(monkeypatch, made_up_outcome)
    study = small_study(tmp_path, learning_rates=(1e-3,))
    result = study.run(CPU, console=QUIET)
    assert [job.recipe.epochs for job in jobs] == [2] * 4
    assert not any(row.is_at_edge for row in result.rows())
    assert not (tmp_path / "small_rates_dark.png").exists()


def test_difference_keeps_its_sign_and_the_edge_of_the_rates_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, made_up_outcome)
    result = small_study(tmp_path).run(CPU, console=QUIET)
    first, second = result.rows()
    assert first.validation is not None
    assert first.validation.mean == pytest.approx(0.605)
    assert first.validation.deviation == pytest.approx(0.01 / 2**0.5)
    assert str(first.validation) == "60.50 ± 0.71"
    assert first.difference is not None
    assert first.difference.points == pytest.approx(-2)
    assert first.difference.standard_error == pytest.approx(0.7071, abs=1e-3)
    assert second.difference is None
    said = " ".join(result.sentences())
    assert "Both ways is 2.00 points below Forward (top-1, validation split" in said
    assert "The best learning rate of Forward, 0.004, is at the edge" in said
    assert "validation split also chose the learning rates" in said


def test_writes_json_csv_and_markdown_with_their_circumstances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, made_up_outcome)
    small_study(tmp_path).run(CPU, console=QUIET)
    record = json.loads((tmp_path / "small.json").read_text())
    assert record["machine"]["command"] == "visionmamba ablate small"
    assert record["machine"]["versions"]["torch"]
    assert record["study"]["variants"]["Forward"]["model"]["bidirectional"] == "none"
    assert [row["paper"] for row in record["rows"]] == [{"top-1": "73.9"}, {"top-1": "73.2"}]
    with open(tmp_path / "small.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["runs"]) == 8
    assert [row["val_accuracy"] for row in rows[:2]] == ["0.5", "0.6"]
    table = (tmp_path / "small.md").read_text()
    assert "| Both ways | 0.004 | 60.50 ± 0.71 | 2 | -2.00 ± 0.71 to Forward | 1,000 |" in table
    assert "`visionmamba ablate small`" in table


def test_loss_that_is_not_finite_is_a_rate_without_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(job: Job) -> Outcome:
        is_high = job.recipe.optimizer.lr == 4e-3
        return Outcome(failure="loss is inf at step 3") if is_high else made_up_outcome(job)

    make_up(monkeypatch, answer)
    result = small_study(tmp_path).run(CPU, console=QUIET)
    assert [row.best_rate for row in result.rows()] == [1e-3] * 2
    assert "not finite in 2 runs: Both ways at 0.004, Forward at 0.004" in result.to_markdown()


def test_a_variant_without_any_result_keeps_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda job: Outcome(failure="loss is inf at step 3"))
    result = small_study(tmp_path).run(CPU, console=QUIET)
    assert [(row.best_rate, row.validation) for row in result.rows()] == [(None, None)] * 2
    assert "Forward has no result." in result.sentences()
    for plot in (plot_curves, plot_rates):
        assert plot(result, "light").startswith(b"\x89PNG")


def test_interruption_leaves_the_table_of_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(job: Job) -> Outcome:
        if job.recipe.optimizer.lr == 4e-3:
            raise KeyboardInterrupt
        return made_up_outcome(job)

    make_up(monkeypatch, answer)
    with pytest.raises(KeyboardInterrupt, match="1 runs are finished, the same command goes on"):
        small_study(tmp_path).run(CPU, console=QUIET)
    assert len((tmp_path / "small.csv").read_text().splitlines()) == 2


def test_test_split_decides_the_difference_and_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(job: Job) -> Outcome:
        test = {"accuracy": 1 - accuracy_of(job)} if job.test_split else {}
        return replace(made_up_outcome(job), test=test)

    jobs = make_up(monkeypatch, answer)
    result = small_study(tmp_path, test_split="test").run(CPU, console=QUIET)
    assert {job.test_split for job in jobs if job.recipe.epochs == 1} == {None}
    first, _ = result.rows()
    assert first.best_rate == 4e-3
    assert first.test is not None
    assert first.test.mean == pytest.approx(0.395)
    assert "2.00 points above Forward (top-1, test split" in " ".join(result.sentences())


def test_second_study_in_a_folder_is_refused_while_the_first_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_up(monkeypatch, made_up_outcome)
    with alone_in(tmp_path), pytest.raises(ValueError, match="another study is running in"):
        small_study(tmp_path).run(CPU, console=QUIET)
    assert not jobs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": ()}, "learning_rates must be at least one"),
        ({"learning_rates": (1e-3, 1e-3)}, "each different"),
        ({"learning_rates": (0.0,)}, "learning rates must be positive"),
        ({"seeds": (0, 0)}, "seeds must be at least one, each different"),
        ({"sweep_seeds": 3}, "number of seeds, 2; got 3"),
        ({"sweep_epochs": 3}, "epochs of a run, 2; got 3"),
        ({"variants": ()}, "variants must be at least one"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small_study(tmp_path, **changes)


def test_unequal_epochs_are_refused(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    longer = replace(study.variants[1].recipe, epochs=9)
    variants = (study.variants[0], replace(study.variants[1], recipe=longer))
    with pytest.raises(ValueError, match="equal epochs; Both ways has 2 and Forward 9"):
        replace(study, variants=variants)


@pytest.mark.parametrize("name", ["data", "augmentation"])
def test_unequal_pictures_are_refused(name: str, tmp_path: Path) -> None:
    study = small_study(tmp_path)
    first, second = study.variants
    other = {"data": "elsewhere", "augmentation": Augmentation(zoom=0.5)}[name]
    changed = replace(second, recipe=replace(second.recipe, **{name: other}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"must have equal {name}; Both ways has"):
        replace(study, variants=(first, changed))


def test_variants_have_rates_of_their_own_when_those_compared_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_up(monkeypatch, made_up_outcome)
    study = small_study(tmp_path)
    first, second = study.variants
    with pytest.raises(ValueError, match="equal learning rates; Both ways has"):
        replace(study, variants=(replace(first, learning_rates=(1e-4,)), second))
    with pytest.raises(ValueError, match="each different; got"):
        replace(study, variants=(first, replace(second, learning_rates=(1e-4, 1e-4))))
    lower = tuple(
        replace(one, name=f"{one.name} to be", learning_rates=(2e-4, 3e-4), compared_with=None)
        for one in study.variants
    )
    study = replace(study, variants=(*study.variants, *lower), seeds=(0,))
    result = study.run(CPU, console=QUIET)
    assert {job.recipe.optimizer.lr for job in jobs if "to_be" in str(job.out)} == {2e-4, 3e-4}
    assert result.rows()[2].best_rate == 2e-4
    assert (
        "learning rates 0.001, 0.004 (Both ways and Forward); "
        "0.0002, 0.0003 (Both ways to be and Forward to be) tried for 1 epochs"
    ) in result.to_markdown()
    assert list(result.to_table().columns[0].cells)[2] == "Both ways to be"
    assert plot_rates(result, "light").startswith(b"\x89PNG")


def test_a_run_without_result_does_not_shorten_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(job: Job) -> Outcome:
        failed = job.recipe.seed == 1
        job.out.mkdir(parents=True)
        rows = "1,0.5\n" if failed else "1,0.5\n2,0.6\n"
        (job.out / METRICS).write_text("epoch,val_accuracy\n" + rows)
        return Outcome(failure="loss is inf") if failed else made_up_outcome(job)

    make_up(monkeypatch, answer)
    result = small_study(tmp_path, learning_rates=(1e-3,)).run(CPU, console=QUIET)
    assert _curves_of(result, result.study.variants[0]) == ([1, 2], [[0.5], [0.6]])


def test_comparison_with_nobody_is_refused(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    with pytest.raises(ValueError, match="no variant 'Forward' in this study; it has Both ways"):
        replace(study, variants=study.variants[:1])


@pytest.mark.parametrize(("option", "value"), [("jobs", 0), ("num_workers", -1)])
def test_wrong_numbers_of_processes_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least"):
        RunOptions(**{option: value})  # type: ignore[arg-type]

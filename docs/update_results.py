"""Copies the tables of docs/results into the documents, between the markers that name them.

`gpu_models` and `gpu_scans` are put together from the measurements on a GPU and what the published
code reaches there, `table4` from the paper's table and a study on CamVid. Run by `make results`
after the measurements; tests/test_readme.py checks that nobody forgot.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
DOCUMENTS = (
    DOCS.parent / "README.md",
    *(DOCS / f"{page}.md" for page in ("reproduction", "kernels", "segmentation", "detection")),
)
SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
TASKS = {"infer_cases": "inference", "train_cases": "training"}


def with_results(text: str) -> str:
    """Return a document's text with every marked section replaced by its table."""
    return SECTION.sub(lambda found: f"{found[1]}\n{_section(found[2])}\n{found[3]}", text)


def gpu_models() -> str:
    """Return Vim-Ti's cases beside the published code, the best DeiT-Ti and the floor."""
    lines = [
        "| case | Vim-Ti, ms | GB | published Vim-Ti, ms | GB | best DeiT-Ti, ms | GB "
        "| floor, ms | share of floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for published in _read("published_h200.json")["models"]:
        rows = [
            row
            for row in _read(f"efficiency_cuda_tiny_{published['file']}.json")["measurements"]
            if (row["resolution"], row["batch"]) == (published["resolution"], published["batch"])
        ]
        ours = next(row for row in rows if row["model"] == "vim")
        compared = [row for row in rows if row["model"].startswith("deit") and row["milliseconds"]]
        best = min(compared, key=lambda row: float(row["milliseconds"]))
        cells = [
            f"{TASKS[published['file']]} {ours['resolution']} px, batch {ours['batch']}",
            f"{ours['milliseconds']:.3g}",
            f"{ours['peak_memory_gb']:.3g}",
            f"{published['milliseconds']:.3g}",
            f"{published['gigabytes']:.3g}" if "gigabytes" in published else "",
            f"{best['milliseconds']:.3g}",
            f"{best['peak_memory_gb']:.3g}",
            f"{published['floor']:.3g}",
            f"{published['floor'] / ours['milliseconds']:.2f}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def gpu_scans() -> str:
    """Return both scans of Vim-Ti beside the published kernels and the floor."""
    timings = {
        (row["op"], row["shape"], row["direction"]): row
        for row in _read("kernels_cuda.json")["timings"]
    }
    lines = [
        "| (B, L) | pass | step sizes made inside, us | step sizes given, us | published, us "
        "| floor, us | share of floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for published in _read("published_h200.json")["scans"]:
        batch, length = published["shape"]
        shape = f"({batch}, {length}, 384, N 16) both directions"
        inside = timings["both scans of the mixer", shape, published["direction"]]
        given = timings.get(("both scans, step sizes given", shape, published["direction"]))
        cells = [
            f"({batch}, {length})",
            published["direction"],
            f"{1e3 * inside['milliseconds']:.0f}",
            f"{1e3 * given['milliseconds']:.0f}" if given else "",
            f"{published['microseconds']}",
            f"{1e3 * inside['floor_milliseconds']:.0f}",
            f"{inside['floor_milliseconds'] / inside['milliseconds']:.2f}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def table4() -> str:
    """Return the paper's table 4 beside the mIoU of the same variants on CamVid."""
    study = _read("camvid_bidirectional.json")
    lines = [
        "| variant | option | top-1 published | mIoU published, ADE20K | test mIoU here, CamVid "
        "| to none | validation | learning rate | parameters here | status |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in study["rows"]:
        recipe = study["study"]["variants"][row["variant"]]
        difference = row["difference"]
        cells = [
            row["variant"],
            f'`"{recipe["model"]["backbone"]["bidirectional"]}"`',
            row["paper"]["ImageNet top-1"],
            row["paper"]["ADE20K mIoU"],
            _mean_and_deviation(row["test"]["values"]),
            f"{difference['points']:+.2f} ± {difference['standard_error']:.2f}"
            if difference
            else "",
            _mean_and_deviation(row["validation"]["values"]),
            f"{row['best_rate']:g}",
            f"{row['parameters']:,}",
            "top-1 not run; mIoU partly",
        ]
        lines.append(_line(cells))
    notes = (RESULTS / "camvid_bidirectional.md").read_text().split("\n\n", 1)[1]
    return "\n".join(lines) + f"\n\n{notes}"


MADE: dict[str, Callable[[], str]] = {
    "gpu_models": gpu_models,
    "gpu_scans": gpu_scans,
    "table4": table4,
}


def main() -> None:
    """Update every document in place."""
    for document in DOCUMENTS:
        document.write_text(with_results(document.read_text()))
        print(f"updated {document.name}", file=sys.stderr)


def _section(name: str) -> str:
    return MADE[name]() if name in MADE else (RESULTS / f"{name}.md").read_text()


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _mean_and_deviation(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

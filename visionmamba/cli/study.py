"""`visionmamba ablate`: variants trained side by side, with the paper's numbers beside."""

from visionmamba.cli.messages import EXIT_WRONG_INPUT
from visionmamba.cli.options import choose, num_workers_for, parse


def ablate(given: list[str]) -> int:
    """Runs `visionmamba ablate`."""
    from visionmamba.studies.backbone import BackboneComparison
    from visionmamba.studies.bidirectional import BidirectionalAblation
    from visionmamba.studies.choices import ChoicesAblation
    from visionmamba.studies.readout import ReadoutAblation
    from visionmamba.studies.settings import StudySettings
    from visionmamba.studies.stride import StrideComparison

    studies: dict[str, type[StudySettings]] = {
        "bidirectional": BidirectionalAblation,
        "readout": ReadoutAblation,
        "backbone": BackboneComparison,
        "stride": StrideComparison,
        "choices": ChoicesAblation,
    }
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: visionmamba ablate {{{','.join(studies)}}} [--help] ...")
        return 0 if given else EXIT_WRONG_INPUT
    chosen = choose(studies, given[0], what="study")
    options = parse(chosen, given[1:], prog=f"visionmamba ablate {given[0]}")
    from rich.console import Console

    console = Console()
    num_workers = num_workers_for(options.device, options.num_workers, num_devices=options.jobs)
    result = options.run(num_workers=num_workers, console=console)
    for table in (result.to_table(), *result.metric_tables()):
        console.print(table)
    for sentence in result.sentences():
        console.print(sentence, highlight=False, markup=False)
    paths = result.save()
    print(f"wrote {len(paths)} files: {options.out}/{paths[0].stem}*")
    return 0

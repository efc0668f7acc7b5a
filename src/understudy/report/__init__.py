"""The report: what runs did and what came of them, as one page, pictures and numbers.

folders.py              what the runs' folders hold     charts.py, positions.py, sweeps.py   what is drawn of it
content.py, curves.py   all of it as one dictionary     drawing.py, page.py, page.*           pictures, one file of HTML
verdict.py              a sentence, numbers in words    answers.py                            the same prompts, answered
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REFRESH = 10  # seconds between two writings of a report that watches, at least


def write_report(
    places: Sequence[Path],
    output: Path | None = None,
    prompts: int = 4,
    models: bool = True,
    again: int | None = None,
) -> tuple[Path, bool]:
    """Write report.html, report.json and png/ about the runs in `places`.

    Args:
        places: folders of runs, or folders that hold some.
        output: where to; by default `report` in the place, and `runs/report` for several.
        prompts: how many prompts are answered side by side.
        models: whether models may be loaded for it.
        again: the page loads itself anew after so many seconds, as long as a run is not finished.

    Returns the page's path, and whether all runs have come to their end.

    Raises:
        ValueError: for a place without a run, and a run's file that cannot be read.
    """
    from .. import mark
    from .folders import read

    runs = read(places)
    # What takes seconds to import waits until the places are known to be right.
    from ..run.folder import write
    from .answers import side_by_side
    from .charts import charts
    from .content import content
    from .drawing import png
    from .page import page

    output = output or (places[0] / "report" if len(places) == 1 else Path("runs/report"))
    mark.check(output, "report", "give another --output")
    found = content(runs, places)
    ended = not found["unfinished"]
    ranking = (
        found["comparison"]["contest"]["ranking"] if found["comparison"] and found["comparison"]["contest"] else []
    )
    ranked = sorted(runs, key=lambda run: ranking.index(run.name) if run.name in ranking else len(ranking))
    found["answers"] = side_by_side(ranked, places, prompts, _why_not(models, ended or again is None))
    drawn = charts(found)
    output.mkdir(parents=True, exist_ok=True)
    mark.mark(output, "report")
    (output / "png").mkdir(exist_ok=True)
    for chart in (chart for section in drawn.values() for chart in section):
        png(chart, output / "png" / f"{chart.name}.png")
    write(output / "report.json", json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    write(output / "report.html", page(found, drawn, None if ended else again))
    return output / "report.html", ended


def _why_not(models: bool, calm: bool) -> str:
    """Why no models are asked, if they are not: nobody wants them, or the runs need the machine."""
    return "--no-models was given" if not models else "" if calm else "they are, when all runs have ended"


def watch(
    places: Sequence[Path],
    output: Path | None = None,
    prompts: int = 4,
    models: bool = True,
    wrote: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write the report again and again until all runs have ended; models are asked in the last one only."""
    while True:
        start = time.monotonic()
        path, ended = write_report(places, output, prompts, models, again=REFRESH)
        wrote(path)
        if ended:
            return path
        time.sleep(max(REFRESH, 4 * (time.monotonic() - start)))  # the runs need the machine

"""Write a report about runs or a comparison: one HTML page, charts as pictures, and all numbers as JSON.

folders.py              read the runs' folders          charts.py, positions.py, sweeps.py   which charts are drawn
content.py, curves.py   all numbers in a dictionary     drawing.py, page.py, page.*          SVG and PNG, the HTML page
text.py                 a summary, numbers as text      responses.py                 the same prompts, side by side
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REFRESH = 10  # seconds between two reports in `watch`, at least


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
        output: the report's folder; by default `report` in the place, and `runs/report` for several.
        prompts: how many prompts are shown with their responses.
        models: whether models may be loaded for it.
        again: the page reloads itself after so many seconds, as long as a run is not finished.

    Returns the page's path, and whether all runs have ended.

    Raises:
        ValueError: for a place without a run, and a run's file that cannot be read.
    """
    from .folders import read_runs

    runs = read_runs(places)
    # What takes seconds to import waits until the places are known to be right.
    from ..files import write_atomic
    from ..run import marker
    from ..run.folder import REPORT
    from .charts import charts
    from .content import content as content_of
    from .drawing import png
    from .page import page
    from .responses import side_by_side

    output = output or (places[0] / "report" if len(places) == 1 else Path("runs/report"))
    marker.check(output, REPORT, "give another --output")
    content = content_of(runs, places)
    ended = not content["unfinished"]
    ranking = (content["comparison"] or {}).get("ranking") or {"names": []}
    order = {name: place for place, name in enumerate(ranking["names"])}
    ranked = sorted(runs, key=lambda run: order.get(run.name, len(order)))
    content["responses"] = side_by_side(ranked, places, prompts, _reason_to_skip(models, ended or again is None))
    drawn = charts(content)
    output.mkdir(parents=True, exist_ok=True)
    marker.mark(output, REPORT)
    (output / "png").mkdir(exist_ok=True)
    for chart in (chart for section in drawn.values() for chart in section):
        png(chart, output / "png" / f"{chart.name}.png")
    write_atomic(output / "report.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    write_atomic(output / "report.html", page(content, drawn, None if ended else again))
    return output / "report.html", ended


def _reason_to_skip(models: bool, ended: bool) -> str:
    """Why no models are loaded, if they are not: by the caller's choice, or because the runs need the machine."""
    return "--no-models was given" if not models else "" if ended else "they are, when all runs have ended"


def watch(
    places: Sequence[Path],
    output: Path | None = None,
    prompts: int = 4,
    models: bool = True,
    on_write: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write the report again and again until all runs have ended; models are loaded for the last one only."""
    while True:
        start = time.monotonic()
        path, ended = write_report(places, output, prompts, models, again=REFRESH)
        on_write(path)
        if ended:
            return path
        time.sleep(max(REFRESH, 4 * (time.monotonic() - start)))  # the runs need the machine

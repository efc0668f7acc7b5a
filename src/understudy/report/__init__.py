"""Write a report about runs or a comparison: an HTML page, charts as PNG files, and all numbers as JSON.

folders.py              read the runs' folders          charts.py, positions.py, sweeps.py   which charts are drawn
content.py, curves.py   all numbers in a dictionary     drawing.py, page.py, page.*          SVG and PNG, the HTML page
text.py                 a summary, numbers as text      responses.py                 the same prompts, side by side
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

REFRESH = 10  # the least number of seconds between two reports in `watch`


def write_report(
    places: Sequence[Path],
    output: Path | None = None,
    prompts: int = 4,
    models: bool = True,
    again: int | None = None,
) -> tuple[Path, bool]:
    """Write report.html, report.json and png/ about the runs in `places`.

    Args:
        places: folders of runs, or folders that contain some.
        output: the report's folder; by default `report` in the place, and `runs/report` for several.
        prompts: the number of prompts whose responses are shown.
        models: may models be loaded for it?
        again: seconds after which the page reloads itself, while a run is not finished.

    Returns the page's path, and whether all runs have ended.

    Raises:
        ValueError: for a place without a run, and a run's file that cannot be read.
    """
    from .folders import read_runs

    runs = read_runs(places)
    # Slow imports come after the places are checked.
    from ..files import write_atomic
    from ..run import marker
    from ..run.folder import REPORT
    from .charts import charts
    from .content import content as content_of
    from .drawing import png
    from .page import page, visible
    from .records import dumps
    from .responses import side_by_side

    output = output or (places[0] / "report" if len(places) == 1 else Path("runs/report"))
    nearest = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"a report is a folder, and {nearest} is a file: give another --output, or move that file")
    marker.check(output, REPORT, "give another --output")
    content = content_of(runs, places)
    ended = not content["unfinished"]
    ranking = (content["comparison"] or {}).get("ranking") or {"names": []}
    order = {name: place for place, name in enumerate(ranking["names"])}
    ranked = sorted(runs, key=lambda run: order.get(run.name, len(order)))
    content["responses"] = side_by_side(ranked, places, prompts, _reason_to_skip(models, ended or again is None))
    sections = charts(visible(content))
    output.mkdir(parents=True, exist_ok=True)
    marker.mark(output, REPORT)
    (output / "png").mkdir(exist_ok=True)
    for chart in (chart for section in sections.values() for chart in section):
        png(chart, output / "png" / f"{chart.name}.png")
    write_atomic(output / "report.json", dumps(content))
    write_atomic(output / "report.html", page(content, sections, None if ended else again))
    return output / "report.html", ended


def _reason_to_skip(models: bool, ended: bool) -> str:
    """The reason why no models are loaded, empty if they are: the caller's choice, or runs that need the machine."""
    return "--no-models was given" if not models else "" if ended else "runs are in progress"


def watch(
    places: Sequence[Path],
    output: Path | None = None,
    prompts: int = 4,
    models: bool = True,
    on_write: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Rewrite the report until all runs have ended; models are loaded for the last version only."""
    while True:
        start = time.monotonic()
        path, ended = write_report(places, output, prompts, models, again=REFRESH)
        on_write(path)
        if ended:
            return path
        time.sleep(max(REFRESH, 4 * (time.monotonic() - start)))  # the runs need the machine

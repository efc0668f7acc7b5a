"""Print what `understudy doctor` found, in colour on a terminal, elsewhere as plain lines; or its findings as JSON."""

import json

from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..run.doctor.findings import Diagnosis, Finding, Level, Section
from ..run.first_example import show_first_example
from ..terminal import escape, show

# Readable on a dark and on a light background, which yellow is not; the word is printed too.
_STYLES = {Level.GREEN: "green", Level.YELLOW: "bold dark_orange3", Level.RED: "bold red"}

_VERDICTS = {
    Level.GREEN: "distill would run",
    Level.YELLOW: "distill would run, perhaps not as expected",
    Level.RED: "distill would fail",
}


def show_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print all sections, the first example, and how many findings there are of each level."""
    console = console or get_console()
    for section in diagnosis.sections:
        if section.rows or section.findings:
            console.print(Text(section.title, style="bold"))
            _show_rows(section, console)
            for finding in sorted(section.findings, key=lambda each: -list(Level).index(each.level)):
                _show_finding(finding, console)
        if section.title == "data" and diagnosis.example is not None:
            example = diagnosis.example
            show_first_example(example.train, example.authors, example.tokenizer, console)
        if section.rows or section.findings:
            console.print()
    counts = ", ".join(f"{diagnosis.count(level)} {level.value}" for level in reversed(Level))
    console.print(Text(f"{counts}: {_VERDICTS[diagnosis.level]}", style=_STYLES[diagnosis.level]))


def show_findings_as_json(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print the worst level, the number of findings of each level, and all findings, as one JSON object in ASCII."""
    findings = [
        {"level": finding.level.value, "section": section.title, "message": finding.message}
        for section in diagnosis.sections
        for finding in section.findings
    ]
    counts = {level.value: diagnosis.count(level) for level in Level}
    show(json.dumps({"level": diagnosis.level.value, "counts": counts, "findings": findings}, indent=1), console)


def _show_rows(section: Section, console: Console) -> None:
    rows = [section.heads, *section.rows] if section.heads else section.rows
    columns = max(map(len, rows), default=0)
    if not console.is_terminal:
        widths = [max(len(row[index]) for row in rows if index < len(row)) for index in range(columns)]
        for row in rows:
            cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=False))
            show("  ".join(cells).rstrip(), console)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for index in range(columns):
        table.add_column(overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
    console.print(table)


def _show_finding(finding: Finding, console: Console) -> None:
    """A finding's level and sentence; on a terminal its further lines are below the sentence."""
    if not console.is_terminal:
        return show(f"{finding.level.value:6}  {finding.message}", console)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=6)
    table.add_column(overflow="fold")
    table.add_row(Text(finding.level.value, style=_STYLES[finding.level]), Text(escape(finding.message)))
    console.print(table)

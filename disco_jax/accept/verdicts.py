"""What the checks find, and how it is shown and stored."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

MARKS = {True: "holds", False: "FAILS", None: "not run"}


class Verdict(NamedTuple):
    """One line of the report."""

    claim: str
    holds: bool | None  # None: it could not be checked here, for the reason in `found`
    found: str
    numbers: dict[str, Any]  # everything that was measured


def show(verdict: Verdict, console: Console) -> None:
    """Prints a verdict."""
    console.print(f"{MARKS[verdict.holds]:>8}  {verdict.claim}: {verdict.found}", soft_wrap=True)


def write(verdicts: list[Verdict], machine: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `check.json` with all numbers and `check.md` with a line per verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "machine": machine,
        "holds": all_hold(verdicts),
        "verdicts": [verdict._asdict() for verdict in verdicts],
    }
    data, page = folder / "check.json", folder / "check.md"
    data.write_text(json.dumps(stored, indent=1) + "\n")
    lines = [
        f"# Check on {machine['devices']} x {machine['device']}",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items()),
        "",
        "| | claim | found |",
        "|---|---|---|",
        *(f"| {MARKS[v.holds]} | {v.claim} | {v.found} |" for v in verdicts),
    ]
    page.write_text("\n".join(lines) + "\n")
    return [data, page]


def all_hold(verdicts: list[Verdict]) -> bool:
    """Whether every claim that could be checked holds."""
    return all(verdict.holds is not False for verdict in verdicts)


def summary(verdicts: list[Verdict]) -> Table:
    """Returns the counts as a table."""
    table = Table(show_header=False)
    for holds, mark in MARKS.items():
        table.add_row(mark, str(sum(verdict.holds is holds for verdict in verdicts)))
    return table

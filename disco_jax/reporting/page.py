"""A report as one HTML file that needs no other."""

import base64
from collections.abc import Sequence
from importlib.resources import files

from disco_jax.display.terminal import printable
from disco_jax.reporting import tables
from disco_jax.reporting.curves import curves
from disco_jax.reporting.run import Run

TEMPLATE = "report.html.jinja"


def as_html(runs: Sequence[Run]) -> str:
    """Returns the page: results, curves, times, differences, problems and predictions of runs."""
    from jinja2 import Environment, StrictUndefined  # lazy: other commands do without it

    script, charts = curves(runs)
    names = [printable(run.name) for run in runs]
    template = (files("disco_jax") / "assets" / TEMPLATE).read_text()
    pictures = [
        (name, base64.b64encode(run.predictions).decode())
        for name, run in zip(names, runs, strict=True)
        if run.predictions
    ]
    return (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            title=names[0] if len(names) == 1 else f"{len(names)} runs",
            results=_shown(tables.results(runs)),
            charts=charts,
            script=script,
            times=_shown(tables.times(runs)),
            differences=_shown(tables.differences(runs)) if len(runs) > 1 else [],
            problems=_shown(tables.problems(runs)),
            bad_samples=_shown(tables.bad_samples(runs)),
            predictions=pictures,
            runs=[
                (name, _shown(tables.fields(run)), _shown(tables.starts(run)))
                for name, run in zip(names, runs, strict=True)
            ],
        )
    )


def _shown(cells: tables.Cells) -> tables.Cells:
    return [[printable(cell) for cell in row] for row in cells]

"""Shows runs, and compares them: curves, results beside the paper's, times, problems, predictions.

  disco-jax report runs/shapes
  disco-jax report runs/shapes gs://bucket/run --out=compared

Writes one page, report.html, which needs no other file; the paper's two-panel figure, report.png;
and the table of results, report.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from disco_jax.display.plots import plot_runs
from disco_jax.display.terminal import say
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.reporting.page import as_html
from disco_jax.reporting.run import names_of, read_run
from disco_jax.reporting.tables import as_markdown, results, sets_of
from disco_jax.runs.places import run_place
from disco_jax.storage.urls import Place


def report(workdirs: Sequence[Place], out: Path) -> None:
    """Writes the three files.

    Raises:
      UserError: if a folder holds no run.
      DataLost: if a bucket's store does not answer.
    """
    names = names_of(workdirs)
    runs = [read_run(at)._replace(name=name) for at, name in zip(workdirs, names, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    plot_runs(
        {run.name: [{**row, "epoch": run.epochs(row["step"])} for row in run.rows] for run in runs},
        sets_of(runs),
        out / "report.png",
    )
    (out / "report.md").write_text(as_markdown(results(runs)))
    (out / "report.html").write_text(as_html(runs))
    print(as_markdown(results(runs)))
    say(f"wrote {out / 'report.html'}")


def main() -> None:
    """Runs the command; a mistake exits with 2."""
    guard(_main)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its URL")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/report"),
        help="output folder; default: %(default)s",
    )
    return parser.parse_args()


def _main() -> None:
    """Parses the command line and writes the report."""
    arguments = parse_arguments()
    report([run_place(run, "RUN") for run in arguments.runs], arguments.out)


if __name__ == "__main__":
    main()

"""Compares runs: the paper's two-panel figure, and a table of results next to the paper's numbers.

  disco-jax report runs/shapes runs/mine
  disco-jax report gs://bucket/run --out=compared

Writes the figure to report.png, the table to report.md, and both to report.html.
"""

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from disco_jax.display.plots import plot_runs
from disco_jax.display.terminal import printable, say
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.runs.jsonl import read_lines
from disco_jax.runs.metrics import METRICS_FILE, read_metrics
from disco_jax.runs.places import fetched, run_place
from disco_jax.runs.workdir import read_json, stored_config
from disco_jax.storage.urls import Place

SETS = {
    "imagenet": "ImageNet",
    "imagenet_v2": "V2",
    "imagenet_r": "R",
    "imagenet_sketch": "Sketch",
}
# DisCo-CLIP (CVPR 2023), batch size table: ViT-B/32, 100 M samples, 16 epochs. Top-1 in %.
PAPER = {
    8_192: (48.76, 41.28, 56.67, 36.65),
    16_384: (50.95, 43.07, 59.24, 38.74),
    32_768: (51.64, 43.85, 60.07, 39.25),
    65_536: (51.91, 44.19, 60.52, 39.76),
}


class Run(NamedTuple):
    """The config and metrics of a run."""

    name: str
    config: ConfigDict
    rows: list[dict[str, Any]]
    samples: int  # number of samples in its data

    def epochs(self, step: int) -> float:
        """Returns the number of passes over the data after `step` steps."""
        return step * self.config.batch_size / self.samples

    def last(self, metric: str) -> float | None:
        """Returns the newest value of a metric, or None if there is none."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def paper(self) -> dict[str, float]:
        """Returns the paper's top-1 in % by set; empty if the config is not one of the paper's."""
        c = self.config
        same = (c.model.name, c.num_epochs, c.data.num_samples) == ("ViT-B-32", 16, 100_000_000)
        return (
            dict(zip(SETS, PAPER[c.batch_size], strict=True))
            if same and c.batch_size in PAPER
            else {}
        )


def read_run(run: Place) -> Run:
    """Reads a run from its folder, including later evaluations by eval.py.

    Raises:
      UserError: if the folder holds no run, or a run without metrics.
      DataLost: if it is in a bucket whose store does not answer.
    """
    files = ("config.json", METRICS_FILE, "starts.jsonl", "eval/*.json")
    with fetched(run, *files) as folder:
        return _read_folder(folder, run)


def _read_folder(workdir: Path, name: Place) -> Run:
    if not (workdir / "config.json").is_file():
        raise UserError(f"{name} holds no run; train one there first")
    config = stored_config(workdir)
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{name} holds no metrics yet")
    for path in (workdir / "eval").glob("*.json"):
        rows.append(read_json(path))
    samples = config.data.num_samples
    if not samples:
        counts = [start.get("samples") for start in read_lines(workdir / "starts.jsonl")]
        samples = next((n for n in reversed(counts) if isinstance(n, int)), 0)
        if not samples:
            raise UserError(f"{name / 'starts.jsonl'} does not give the number of samples")
    return Run(name.name, config, sorted(rows, key=lambda row: row["step"]), samples)


def sets_of(runs: Sequence[Run]) -> list[str]:
    """Returns the labeled sets that any run was evaluated on, the paper's sets first."""
    found = {
        k.removesuffix("/top1") for run in runs for row in run.rows for k in row if "/top1" in k
    }
    found = {name for name in found if "/" not in name}
    return [name for name in SETS if name in found] + sorted(found - set(SETS))


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a header and a row per run, followed by the paper's row if it has the same config."""
    sets = sets_of(runs)
    cells = [["run", "model", "batch", "epochs", "steps", "loss", *(SETS.get(s, s) for s in sets)]]
    for run in runs:
        step = run.rows[-1]["step"]
        loss = run.last("train/loss")
        values = [run.last(f"{name}/top1") for name in sets]
        cells.append(
            [
                run.name,
                run.config.model.name,
                f"{run.config.batch_size:,}",
                f"{run.epochs(step):.1f}",
                f"{step:,}",
                "" if loss is None else f"{loss:.4f}",
                *("" if value is None else f"{value:.2%}"[:-1] for value in values),
            ]
        )
        if paper := run.paper():
            published = [f"{paper[name]:.2f}" if name in paper else "" for name in sets]
            cells.append(["the paper's", "ViT-B-32", cells[-1][2], "16.0", "", "", *published])
    return cells


def as_markdown(cells: list[list[str]]) -> str:
    """Formats the table as Markdown. Accuracies are top-1 in %."""
    texts = [[printable(html.escape(cell)).replace("|", r"\|") for cell in row] for row in cells]
    head, *rows = ["| " + " | ".join(row) + " |" for row in texts]
    rule = "|" + "|".join("---" if i < 2 else "---:" for i in range(len(cells[0]))) + "|"
    return "\n".join([head, rule, *rows]) + "\n"


def as_html(cells: list[list[str]], picture: bytes) -> str:
    """Returns a self-contained page with the figure and the table."""
    head, *rows = [
        "<tr>" + "".join(f"<{tag}>{html.escape(printable(cell))}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * len(cells)], cells, strict=False)
    ]
    data = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>DisCo-JAX: runs</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: right; }}
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) {{ text-align: left; }}
</style>
</head>
<body>
<h1>Runs</h1>
<img alt="Loss and zero-shot top-1 against epochs" src="data:image/png;base64,{data}">
<table>
<thead>{head}</thead>
<tbody>{"".join(rows)}</tbody>
</table>
<p>Zero-shot top-1 in %.</p>
</body>
</html>
"""


def report(workdirs: Sequence[Place], out: Path) -> None:
    """Writes the three files.

    Raises:
      UserError: if a folder holds no run.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    out.mkdir(parents=True, exist_ok=True)
    plot_runs(
        {run.name: [{**row, "epoch": run.epochs(row["step"])} for row in run.rows] for run in runs},
        sets_of(runs),
        out / "report.png",
    )
    cells = table(runs)
    (out / "report.md").write_text(as_markdown(cells))
    (out / "report.html").write_text(as_html(cells, (out / "report.png").read_bytes()))
    print(as_markdown(cells))
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

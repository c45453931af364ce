"""The tables of a report: cells of plain text, a header first."""

import html
from collections.abc import Sequence

from disco_jax.config import flatten
from disco_jax.data.source import KINDS
from disco_jax.display.terminal import printable
from disco_jax.reporting.run import SETS, Run

Cells = list[list[str]]
SPENT = {
    "step": "training",
    "data": "waiting for data",
    "checkpoint": "saving",
    "eval": "evaluation",
}
NONE = "–"


def sets_of(runs: Sequence[Run]) -> list[str]:
    """Returns the labeled sets that any run was evaluated on, the paper's sets first."""
    found = {
        k.removesuffix("/top1") for run in runs for row in run.rows for k in row if "/top1" in k
    }
    found = {name for name in found if "/" not in name}
    return [name for name in SETS if name in found] + sorted(found - set(SETS))


def results(runs: Sequence[Run]) -> Cells:
    """Returns a row per run, followed by the paper's row if it has the same config."""
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


def times(runs: Sequence[Run]) -> Cells:
    """Returns where the time of each run went: its total, and the shares of it.

    A row of metrics gives the seconds a step since the row before. Compilation is in the first, as
    a part of training, and the time between starts is in none.
    """
    cells = [["run", "images/s", "hours", *SPENT.values()]]
    for run in runs:
        spent, since = dict.fromkeys(SPENT, 0.0), 0
        for row in run.rows:
            if "time/step" in row:
                for what in SPENT:
                    spent[what] += (row["step"] - since) * row.get(f"time/{what}", 0.0)
                since = row["step"]
        total = sum(spent.values())
        rates = sorted(run.series("train/images_per_second")[1])
        shares = [f"{seconds / total:.1%}" if total else NONE for seconds in spent.values()]
        rate = f"{rates[len(rates) // 2]:,.0f}" if rates else NONE
        cells.append([run.name, rate, f"{total / 3600:,.2f}", *shares])
    return cells


def differences(runs: Sequence[Run]) -> Cells:
    """Returns the config fields in which the runs differ, a column per run; [] if in none."""
    configs = [flatten(run.config) for run in runs]
    fields = sorted({field for config in configs for field in config})
    rows = [[field, *(_shown(config, field) for config in configs)] for field in fields]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return [["field", *(run.name for run in runs)], *differing] if differing else []


def fields(run: Run) -> Cells:
    """Returns all config fields of a run."""
    return [["field", "value"], *([k, repr(v)] for k, v in sorted(flatten(run.config).items()))]


def _shown(config: dict[str, object], field: str) -> str:
    return repr(config[field]) if field in config else NONE


def problems(runs: Sequence[Run]) -> Cells:
    """Returns what went wrong, a row per run and kind, with the count; [] if nothing did."""
    steps = {
        "train/skipped_steps": "steps skipped: loss or gradient not finite",
        "train/loss_spikes": "spikes of the loss",
    }
    samples = {f"data/bad_{kind}": f"bad samples: {text}" for kind, text in KINDS.items()}
    found = [
        [run.name, text, f"{count:,.0f}"]
        for run in runs
        for metric, text in (samples | steps).items()
        if (count := run.last(metric))
    ]
    return [["run", "what", "count"], *found] if found else []


def bad_samples(runs: Sequence[Run]) -> Cells:
    """Returns the first bad samples of each run; [] if there are none."""
    found = [
        [run.name, *(str(line.get(name, "")) for name in ("step", "key", "detail"))]
        for run in runs
        for line in run.bad_samples
    ]
    return [["run", "step", "key", "reason"], *found] if found else []


def starts(run: Run) -> Cells:
    """Returns a row per start of a run's processes."""
    cells = [["started", "host", "devices", "processes", "JAX", "commit"]]
    for start in run.starts:
        packages = start.get("packages") or {}
        texts = [start.get(k) for k in ("time", "host", "devices", "processes")]
        texts += [packages.get("jax"), (start.get("commit") or "")[:9]]
        cells.append([NONE if text in (None, "") else str(text) for text in texts])
    return cells


def as_markdown(cells: Cells) -> str:
    """Formats a table as Markdown."""
    texts = [[printable(html.escape(cell)).replace("|", r"\|") for cell in row] for row in cells]
    head, *rows = ["| " + " | ".join(row) + " |" for row in texts]
    rule = "|" + "|".join("---" if i < 2 else "---:" for i in range(len(cells[0]))) + "|"
    return "\n".join([head, rule, *rows]) + "\n"

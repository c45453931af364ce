"""Draws the planner's rows: peak memory over the batch, and where a step's time goes."""

from pathlib import Path
from typing import Any

from disco_jax.display.plots import subplots
from disco_jax.plan.show import by_size, title

Row = dict[str, Any]


def draw_memory(rows: list[Row], path: Path) -> None:
    """Plots peak memory against batch, one line per method, and the device's capacity."""
    figure, axis = subplots(figsize=(7, 4.5), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for i, method in enumerate(methods):
        points = [(r["batch_size"], r["peak_bytes"]) for r in rows if r["method"] == method]
        known = sorted((batch, peak / 2**30) for batch, peak in points if peak is not None)
        if known:
            # Each line is thinner than the previous one, so that coinciding lines stay visible.
            width = 1.5 + 1.5 * (len(methods) - 1 - i)
            axis.plot(
                *zip(*known, strict=True),
                marker="o",
                markersize=4 + 1.5 * width,
                linewidth=width,
                label=method,
            )
    capacity, margin = rows[0]["capacity_bytes"] / 2**30, rows[0]["margin_bytes"] / 2**30
    axis.axhline(capacity, color="black", linestyle="--", label="capacity")
    axis.axhspan(capacity - margin, capacity, color="black", alpha=0.1, label="kept free")
    batches = sorted({row["batch_size"] for row in rows})
    axis.set(xlabel="global batch", ylabel="peak, GiB per device", xscale="log", yscale="log")
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.minorticks_off()
    axis.set_title(title(rows[0]))
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_time(row: Row, path: Path) -> None:
    """Plots the estimated time of a step: a bar for each part, divided by kind of kernel."""
    parts = row["seconds_by_part"]
    order = by_size({part: sum(kinds.values()) for part, kinds in parts.items()})
    figure, axis = subplots(figsize=(8, 1 + 0.4 * len(parts)), layout="constrained")
    left = [0.0] * len(order)
    for kind in by_size(row["seconds_by_kind"]):
        widths = [1e3 * parts[part].get(kind, 0.0) for part in order]
        axis.barh([part.replace("_", " ") for part in order], widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="estimated ms per step", title=f"{title(row)}, batch {row['batch_size']:,}")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

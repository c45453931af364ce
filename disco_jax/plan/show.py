"""Shows the planner's rows as tables and as a chart."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def show_one(row: Row, console: Console) -> None:
    """Prints everything known about one compiled step."""
    table = Table(show_header=False, title=f"{_title(row)}, batch {row['batch_size']:,}")
    table.add_column()
    table.add_column(justify="right")
    for label, key in (
        ("parameters", "param_bytes"),
        ("optimizer", "optimizer_bytes"),
        ("batch", "batch_bytes"),
        ("temporaries", "temp_bytes"),
        ("peak", "peak_bytes"),
        ("capacity", "capacity_bytes"),
        ("kept free", "margin_bytes"),
    ):
        if key in row:
            table.add_row(f"{label} per device", size(row[key]))
    table.add_row("headroom per device", headroom(row))
    table.add_row("verdict", verdict(row))
    table.add_section()
    table.add_row(f"the loss alone ({row['method']}): temporaries", size(row["loss_temp_bytes"]))
    table.add_row("matmul FLOPs of a step, all devices", f"{row['step_flops']:.4g}")
    bound = f"{row['bound_seconds']:.4g} s, by {row['bound_by']}" if row["bound_seconds"] else "-"
    table.add_row("lower bound on a step's time, not an estimate", bound)
    if estimated := row.get("estimated_seconds"):
        table.add_row("estimated seconds (docs/speed.md), not measured", f"{estimated:.4g}")
        for kind, spent in sorted(row["seconds_by_kind"].items(), key=lambda item: -item[1]):
            table.add_row(f"    of which {kind}", f"{spent:.4g}, {spent / estimated:.0%}")
        if images := row.get("estimated_images_per_second"):
            share = row["estimated_peak_share"]
            table.add_row("estimated images/s", f"{images:,.0f}, {share:.0%} of the peak rate")
        if hours := row.get("estimated_hours"):
            devices = row["estimated_device_hours"]
            table.add_row(
                "estimated hours of the run", f"{hours:,.1f}, {devices:,.0f} device-hours"
            )
        table.add_row(
            "kernels, and bytes they move", f"{row['kernels']:,}, {size(row['bytes_accessed'])}"
        )
    for kind, use in row.get("collectives", {}).items():
        table.add_row(f"{kind} per device and step", f"{use['count']} x, {size(use['bytes'])}")
    if not row["loss_only"]:
        settings = f"remat {row['image_remat']} (images), {row['text_remat']} (texts)"
        if row["microbatch"]:
            settings += f"; microbatches of {row['microbatch']} per device"
            settings += f", {row['microbatch_mode']}"
        if row["fsdp"] > 1:
            settings += f"; state sharded over {row['fsdp']} devices"
        if row["text_groups"]:
            groups = ", ".join(f"{count} of {n} tokens" for n, count in row["text_groups"])
            settings += f"; texts of a device at once: {groups}"
        console.print(settings)
    console.print(table)


def show_many(rows: list[Row], console: Console) -> None:
    """Prints a table with one line per row."""
    table = Table(title=f"{_title(rows[0])}; memory per device")
    whole_step = not rows[0]["loss_only"]
    for name in ("batch", "method", *(("remat", "microbatch") if whole_step else ())):
        table.add_column(name, justify="left" if name in ("method", "remat") else "right")
    for name in ("peak", "temporaries", "loss alone", "estimated", "headroom", "verdict"):
        table.add_column(name, justify="right")
    for row in rows:
        remat = " / ".join(dict.fromkeys((row["image_remat"], row["text_remat"])))
        table.add_row(
            f"{row['batch_size']:,}",
            row["method"],
            *((remat, str(row["microbatch"] or "-")) if whole_step else ()),
            size(row["peak_bytes"]),
            size(row["temp_bytes"]),
            size(row["loss_temp_bytes"]),
            seconds(row.get("estimated_seconds")),
            headroom(row),
            verdict(row),
        )
    console.print(table)


def draw(rows: list[Row], path: Path) -> None:
    """Plots peak memory against batch, one line per method, and the device's capacity."""
    from disco_jax.display.plots import subplots

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
    axis.set_title(_title(rows[0]))
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def size(count: int | None) -> str:
    """Formats bytes as GiB from 1 GiB up, and as MiB below that."""
    if count is None:
        return "unknown"
    return f"{count / 2**30:,.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:,.1f} MiB"


def seconds(count: float | None) -> str:
    """Formats an estimated time; it is not a measurement."""
    if not count:
        return "-"
    return f"{count:.3g} s" if count >= 1 else f"{1e3 * count:.3g} ms"


def headroom(row: Row) -> str:
    """Formats the usable memory that remains; negative if it is exceeded."""
    if row["peak_bytes"] is None:
        return "-"
    return size(row["capacity_bytes"] - row["margin_bytes"] - row["peak_bytes"])


def verdict(row: Row) -> str:
    """Returns `fits` or `too large`."""
    return "fits" if row["fits"] else "too large"


def _title(row: Row) -> str:
    hosts = f" on {row['hosts']} hosts" if row["hosts"] > 1 else ""
    what = "loss and gradients alone" if row["loss_only"] else "training step"
    return f"{row['topology']}{hosts}, {what}"

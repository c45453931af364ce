"""Shows the planner's rows as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def show_one(rows: list[Row], console: Console) -> None:
    """Prints everything known about one compiled step."""
    (row,) = rows
    table = Table(show_header=False, title=f"{title(row)}, batch {row['batch_size']:,}")
    table.add_column()
    table.add_column(justify="right")
    for label, key in (
        ("parameters", "param_bytes"),
        ("optimizer", "optimizer_bytes"),
        ("batch", "batch_bytes"),
        ("teacher", "teacher_bytes"),
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
    if row.get("estimated_seconds"):
        _show_times(row, console)


def _show_times(row: Row, console: Console) -> None:
    """Prints the estimated time by part and kind; the cells add up to the whole."""
    table = Table(title="Where the estimated time goes, in ms")
    kinds = by_size(row["seconds_by_kind"])
    for name in ("", "total", "share", *kinds):
        table.add_column(name, justify="right" if name else "left")
    whole = row["estimated_seconds"]
    sums = {part: sum(of_part.values()) for part, of_part in row["seconds_by_part"].items()}
    for part in by_size(sums):
        cells = row["seconds_by_part"][part]
        times = (f"{1e3 * cells[kind]:,.1f}" if kind in cells else "-" for kind in kinds)
        label = part.replace("_", " ")
        table.add_row(label, f"{1e3 * sums[part]:,.1f}", f"{sums[part] / whole:.1%}", *times)
    table.add_section()
    times = (f"{1e3 * row['seconds_by_kind'][kind]:,.1f}" for kind in kinds)
    table.add_row("all", f"{1e3 * whole:,.1f}", "100 %", *times)
    console.print(table)


def by_size(seconds: dict[str, float]) -> list[str]:
    """Returns the names, the one with the most seconds first."""
    return sorted(seconds, key=lambda name: -seconds[name])


def show_many(rows: list[Row], console: Console) -> None:
    """Prints a table with one line per row."""
    table = Table(title=f"{title(rows[0])}; memory per device")
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


def show_fastest(rows: list[Row], flags: str, console: Console) -> None:
    """Prints the settings that were compiled, the best first, and the flags that set these."""
    table = Table(title=f"{title(rows[0])}, batch {rows[0]['batch_size']:,}")
    for name in ("images", "texts", "loss", "microbatch", "fsdp", "peak", "estimated", "verdict"):
        table.add_column(name, justify="left" if name in ("images", "texts", "loss") else "right")
    for row in rows:
        table.add_row(
            row["image_remat"],
            row["text_remat"],
            row["method"] + ("" if row["keep_bytes"] else ", keeping nothing"),
            str(row["microbatch"] or "-"),
            str(row["fsdp"]),
            size(row["peak_bytes"]),
            seconds(row.get("estimated_seconds")),
            verdict(row),
        )
    console.print(table)
    best, *others = rows
    if not best["fits"]:
        console.print("nothing fits; try more devices, or a smaller batch")
        return
    console.print(f"fastest by the estimate: {flags or 'the settings of the config'}")
    for row in (row for row in others if row.get("baseline") and row["fits"]):
        saved = 1 - best["estimated_seconds"] / row["estimated_seconds"]
        console.print(
            f"    {saved:.1%} less time than full rematerialization with microbatch "
            f"{row['microbatch']}, fsdp {row['fsdp']}"
        )


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


def title(row: Row) -> str:
    """Returns the topology and what was compiled."""
    hosts = f" on {row['hosts']} hosts" if row["hosts"] > 1 else ""
    what = "loss and gradients alone" if row["loss_only"] else "training step"
    return f"{row['topology']}{hosts}, {what}"

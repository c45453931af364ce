"""Finds the fastest settings with which a batch fits, from few compiled programs.

What a rematerialization policy saves and costs is linear in the blocks that follow it and in the
samples of a pass. One small program per policy therefore predicts all combinations; only the most
promising are compiled at the full batch. `offload` is left out: its copies to host memory are not
part of the estimate.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from disco_jax.config.remat import PARTIAL

Row = dict[str, Any]
# Compiles the step with the given fields of the config changed, by dotted name. The row tells what
# was compiled; `fits` and `estimated_seconds` are compared.
CompileFn = Callable[[dict[str, Any]], Row]

MIB = 2**20
LOSSES = (("default", 512 * MIB), ("default", 2048 * MIB), ("default", 0), ("auto", 0))
TOWERS = ("image_tower", "text_tower")
PROBE = 1024  # samples per device of the small programs
SMALLEST = 32  # samples per device and microbatch
# Shares of the free memory to try to fill: in programs that nearly fill the memory, XLA recomputes
# values itself, which can take longer than what was saved.
SHARES = (1.0, 0.8, 0.6)


class Remat(NamedTuple):
    """A setting of one tower, and its effect on a sample relative to `full`."""

    setting: str
    seconds: float
    bytes: float


def find_fastest(
    compile_step: CompileFn, compile_loss: CompileFn, batch: int, devices: int, host: int
) -> list[Row]:
    """Returns the rows of the settings compiled at `batch`, the fastest that fits first.

    Among them are the rows with full rematerialization, each the `baseline` of a variant: the whole
    batch at once or, if that does not fit, microbatches of several sizes, and the best of these
    with its state sharded over the devices of a host.

    Args:
      compile_step: compiles a step.
      compile_loss: compiles only its loss.
      batch: global batch size.
      devices: number of devices.
      host: number of devices per host.
    """
    loss = _fastest_loss(compile_loss)
    rows: list[Row] = []
    options = None

    def search(variant: dict[str, Any]) -> Row:
        """Adds the rows of one variant; returns the first, with full rematerialization."""
        nonlocal options
        base = compile_step(loss | variant | _remat("full", "full"))
        rows.append(base | {"baseline": True})
        if not base["fits"]:
            return base
        at_once = base["microbatch"] or batch // devices
        if options is None:
            probe = loss | {"batch_size": min(PROBE, at_once) * devices, "microbatch": 0}
            options = _options(compile_step, probe, base["blocks"])
        room = base["capacity_bytes"] - base["margin_bytes"] - base["peak_bytes"]
        compiled = set()
        for share in SHARES:
            pair = _best_pair(options, share * room / at_once)
            predicted = base["estimated_seconds"] + sum(x.seconds for x in pair) * batch / devices
            if pair in compiled or predicted >= _in_order(rows)[0]["estimated_seconds"]:
                continue
            compiled.add(pair)
            rows.append(compile_step(loss | variant | _remat(*(x.setting for x in pair))))
        return base

    whole = search({"microbatch": 0})
    if not whole["fits"]:
        for microbatch in _microbatches(batch // devices):
            if search({"microbatch": microbatch})["fits"]:
                for less in list(_microbatches(microbatch))[:2]:
                    search({"microbatch": less})
                break
    best = _in_order(rows)[0]
    if best["fits"] and host > 1 and best["fsdp"] == 1:
        search({"microbatch": best["microbatch"], "fsdp": host})
    return _in_order(rows)


def settings_of(row: Row) -> dict[str, Any]:
    """Returns the fields of the config that a row was compiled with and the search may change."""
    return {
        "model.image_remat": row["image_remat"],
        "model.text_remat": row["text_remat"],
        "microbatch": row["microbatch"],
        "microbatch_mode": row["microbatch_mode"],
        "fsdp": row["fsdp"],
        "loss.method": row["method"],
        "loss.keep_bytes": row["keep_bytes"],
    }


def _remat(image: str, text: str) -> dict[str, Any]:
    return {"model.image_remat": image, "model.text_remat": text}


def _fastest_loss(compile_loss: CompileFn) -> dict[str, Any]:
    """Returns the method and budget of the fastest loss, the one with less memory at a tie."""
    rows = [compile_loss({"loss.method": m, "loss.keep_bytes": kept}) for m, kept in LOSSES]
    fitting = [row for row in rows if row["fits"]] or rows[2:3]
    fastest = min(row["estimated_seconds"] for row in fitting)
    near = [row for row in fitting if row["estimated_seconds"] <= 1.01 * fastest]
    row = min(near, key=lambda row: row["temp_bytes"])
    return {"loss.method": row["method"], "loss.keep_bytes": row["keep_bytes"]}


def _microbatches(share: int) -> Iterator[int]:
    """Yields the halves, quarters, ... of a device's share of the batch."""
    while share % 2 == 0 and share // 2 >= SMALLEST:
        share //= 2
        yield share


def _options(
    compile_step: CompileFn, probe: dict[str, Any], blocks: list[int]
) -> list[list[Remat]]:
    """Returns each tower's settings with their effect, from one small program per policy.

    The time of a program is known by tower. Its memory is divided between the towers like the
    values that their blocks save under `full`, as each policy saves a multiple of these.
    """
    full = compile_step(probe | _remat("full", "full"))
    samples = full["batch_size"] // full["devices"]
    elements = full["block_elements"]
    found = [[Remat("full", 0.0, 0.0)] for _ in TOWERS]
    for policy in PARTIAL:
        row = compile_step(probe | _remat(policy, policy))
        if not row["fits"]:
            continue
        more = (row["peak_bytes"] - full["peak_bytes"]) / samples
        for i, tower in enumerate(TOWERS):
            seconds = (_seconds(row, tower) - _seconds(full, tower)) / samples
            size = more * elements[i] / sum(elements)
            for last in range(1, blocks[i] + 1):
                part = last / blocks[i]
                setting = policy if last == blocks[i] else f"{policy}:{last}"
                found[i].append(Remat(setting, part * seconds, part * size))
    return found


def _seconds(row: Row, part: str) -> float:
    return sum(row["seconds_by_part"][part].values())


def _best_pair(options: list[list[Remat]], room: float) -> tuple[Remat, ...]:
    """Returns the fastest pair of settings that needs at most `room` bytes per sample."""
    pairs = (pair for pair in product(*options) if sum(x.bytes for x in pair) <= max(room, 0))
    return min(pairs, key=lambda pair: (sum(x.seconds for x in pair), sum(x.bytes for x in pair)))


def _in_order(rows: list[Row]) -> list[Row]:
    """Sorts rows: those that fit by time, then the others by memory."""
    return sorted(
        rows,
        key=lambda row: (
            (0, row["estimated_seconds"])
            if row["fits"]
            else (1, float("inf") if row["peak_bytes"] is None else row["peak_bytes"])
        ),
    )

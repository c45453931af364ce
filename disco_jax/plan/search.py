"""Finds the largest batch that fits, by compiling."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

# Candidate batches are multiples of a sixteenth of the power of two below them.
STEPS = 16
LARGEST = 2**26


def largest_batch(
    compile_batch: Callable[[int], Row], devices: int, start: int
) -> tuple[Row | None, list[Row]]:
    """Searches for the largest batch whose row `fits`.

    Args:
      compile_batch: Compiles one global batch, divisible by `devices`, and returns its row.
      devices: Every batch is a multiple of this number.
      start: Initial guess.

    Returns:
      The row of the largest batch that fits, or None if not even one sample per device does, and
      all rows in the order they were compiled. The next larger candidate, one `STEPS`-th of a power
      of two above, does not fit.
    """
    rows: list[Row] = []
    best: Row | None = None
    too_large: int | None = None
    batch = round_batch(start, devices)
    while True:
        row = compile_batch(batch)
        rows.append(row)
        if row["fits"]:
            best = row
            if batch >= LARGEST:
                return best, rows
        else:
            too_large = batch
        low = best["batch_size"] if best else 0
        if too_large is None:
            batch = round_batch(min(max(_predict(rows) or 0, 2 * low), 8 * low), devices)
            continue
        step = _step(too_large - 1, devices)
        if too_large - low <= step:
            return best, rows
        guess = _predict(rows) or (low + too_large) // 2
        batch = round_batch(min(max(guess, low + step), too_large - step), devices)
        if not low < batch < too_large:
            batch = round_batch((low + too_large) // 2, devices)
        if not low < batch < too_large:
            return best, rows


def _predict(rows: list[Row]) -> int | None:
    """Extrapolates the last two peaks linearly to the batch that fills the usable memory."""
    known = [row for row in rows if row["peak_bytes"] is not None][-2:]
    if len(known) < 2 or known[0]["peak_bytes"] == known[1]["peak_bytes"]:
        return None
    (x0, y0), (x1, y1) = ((row["batch_size"], row["peak_bytes"]) for row in known)
    usable = known[0]["capacity_bytes"] - known[0]["margin_bytes"]
    slope = (y1 - y0) / (x1 - x0)
    return int(x0 + (usable - y0) / slope) if slope > 0 else None


def _step(batch: int, devices: int) -> int:
    power = 1 << max(batch.bit_length() - 1, 0)
    return max(power // STEPS // devices, 1) * devices


def round_batch(batch: int, devices: int) -> int:
    """Rounds a batch down to a whole step, but not below one sample per device."""
    step = _step(batch, devices)
    return max(batch // step * step, devices)

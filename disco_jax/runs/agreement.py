"""What the processes of a run agree on: texts, steps, and when to continue."""

from itertools import count

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

DAY = 24 * 60 * 60  # seconds
_BARRIERS = count()  # a barrier's name can be used only once


def barrier() -> None:
    """Waits until all processes are here, for hours if need be.

    They wait at the coordinator, because a collective on CPU devices times out after half a minute.
    """
    if jax.process_count() > 1:
        # JAX's coordinator barrier is private; this is Orbax's public wrapper of it.
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        get_barrier_sync_fn()(key=f"agreement_{next(_BARRIERS)}", timeout_ms=1000 * DAY)


def of_first(text: str, longest: int = 64) -> str:
    """Returns the first process's text, of at most `longest` bytes."""
    if jax.process_count() == 1:
        return text
    sent = np.frombuffer(text.encode().ljust(longest), np.uint8)
    return bytes(np.asarray(broadcast_one_to_all(sent))).decode().strip()


def common(numbers: set[int], most: int = 64) -> list[int]:
    """Returns the numbers, e.g. steps, that all processes have, in ascending order.

    They are at least 0. Of more than `most`, only the highest count.
    """
    if jax.process_count() == 1:
        return sorted(numbers)
    padded = np.full(most, -1, np.int32)
    padded[: len(numbers)] = sorted(numbers)[-most:]
    rows = [set(row.tolist()) for row in np.asarray(process_allgather(padded))]
    return sorted(set.intersection(*rows) - {-1})

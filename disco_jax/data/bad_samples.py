"""What was wrong with the data: counted by kind, written down, and too much of it an error."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from disco_jax.data.load import Failure
from disco_jax.data.source import KINDS
from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines

WRITTEN = 10_000  # bad samples written down; beyond, they are only counted
AT_LEAST = 1_000  # samples that the share of bad ones is taken of, so that one alone is not a lot


class BadSamples:
    """Counts over a whole run: they are part of its checkpoints.

    Args:
      path: the file they are written down in.
      max_fraction: bad samples among all that were tried, above which the run stops.
      step: where the run goes on; what was written past it is dropped.
      counts: by kind, at that step.
    """

    def __init__(self, path: Path, max_fraction: float, step: int, counts: dict[str, int]):
        self._path, self._max_fraction = path, max_fraction
        self.counts = Counter(counts)
        self._lines = JsonLines(self._path, step)

    def add(self, failures: Iterable[Failure], step: int, samples: int) -> None:
        """Counts the bad samples of a step; this process has seen `samples` good ones.

        Raises:
          UserError: there are too many.
        """
        new = list(failures)
        if not new:
            return
        self.counts.update(kind for kind, _, _ in new)
        for kind, key, detail in new[: max(WRITTEN - self._lines.count, 0)]:
            self._lines.write({"step": step, "kind": kind, "key": key, "detail": detail})
        total = self.counts.total()
        if total > self._max_fraction * max(samples + total, AT_LEAST):
            raise UserError(
                f"{total} of {samples + total} samples are bad ({describe(self.counts)}), more "
                f"than data.max_bad_fraction = {self._max_fraction} allows; see {self._path}"
            )

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def total_counts(counts: Counter[str]) -> Counter[str]:
    """The counts of all processes together; all must call it."""
    import jax  # here: data workers import this file, and have no use for it
    from jax.experimental.multihost_utils import process_allgather

    own = np.array([counts[kind] for kind in KINDS], np.int32)
    every = process_allgather(own) if jax.process_count() > 1 else own[None]
    return Counter({kind: int(n) for kind, n in zip(KINDS, every.sum(axis=0), strict=True) if n})


def as_metrics(counts: Counter[str]) -> dict[str, float]:
    """`data/bad`, and `data/bad_KIND` of each kind there was; nothing where there was none."""
    kinds = {f"data/bad_{kind}": float(n) for kind, n in sorted(counts.items())}
    return {"data/bad": float(counts.total()), **kinds} if kinds else {}


def own_share(counts: dict[str, int], index: int, processes: int) -> dict[str, int]:
    """What process `index` takes up of all processes' counts, however many there were then.

    About as much each: a process compares its count with the samples it has seen itself.
    """
    return {kind: n // processes + (index < n % processes) for kind, n in counts.items()}


def describe(counts: Counter[str]) -> str:
    """`3 broken_image, 1 empty_caption`: the commonest first."""
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def check_problems(problems: Counter[str], samples: int, max_fraction: float) -> None:
    """Raises UserError where an index found more wrong than may be."""
    total = problems.total()
    if total > max_fraction * max(samples + total, AT_LEAST):
        raise UserError(
            f"data.name: {describe(problems)} beside {samples} samples, more than "
            f"data.max_bad_fraction = {max_fraction} allows"
        )

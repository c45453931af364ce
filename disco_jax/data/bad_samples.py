"""Counts bad samples by kind, logs them, and stops the run if there are too many."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from disco_jax.data.source import KINDS, Failure, describe
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines
from disco_jax.storage.files import write_whole
from disco_jax.storage.urls import Place

WRITTEN = 10_000  # bad samples logged; any further ones are only counted
AT_LEAST = 1_000  # minimum denominator of the bad fraction, so that one bad sample is not too many


class BadSamples:
    """Counts and logs the bad samples of a whole run; the counts are saved in its checkpoints.

    Args:
      path: the log file.
      max_fraction: the fraction of bad samples, among all tried, above which the run stops.
      step: the step to resume from; later lines of the log are dropped.
      counts: the counts by kind at that step.
    """

    def __init__(self, path: Path, max_fraction: float, step: int, counts: dict[str, int]):
        self._path, self._max_fraction = path, max_fraction
        self.counts = Counter(counts)
        self._lines = JsonLines(self._path, step)

    def add(self, failures: Iterable[Failure], step: int, samples: int) -> None:
        """Counts the bad samples of a step, after `samples` good ones in this process.

        Raises:
          UserError: if there are too many.
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


def list_bad(bad: Sequence[Failure], path: Place) -> None:
    """Writes bad samples to a file, a JSON object a line, and prints how many there are of a kind.

    Without any, no file is written. A file that exists is replaced.
    """
    if not bad:
        return
    lines = [json.dumps({"kind": kind, "key": key, "detail": detail}) for kind, key, detail in bad]
    write_whole(path, ("\n".join(lines) + "\n").encode())
    for kind, count in Counter(kind for kind, _, _ in bad).most_common():
        say(f"{count} {kind}: {KINDS[kind]}")
    say(f"bad samples, with reasons, are listed in {path}")


def total_counts(counts: Counter[str]) -> Counter[str]:
    """Returns the counts summed over all processes, all of which must call it."""
    import jax  # lazy: data workers import this module without needing JAX
    from jax.experimental.multihost_utils import process_allgather

    own = np.array([counts[kind] for kind in KINDS], np.int32)
    every = process_allgather(own) if jax.process_count() > 1 else own[None]
    return Counter({kind: int(n) for kind, n in zip(KINDS, every.sum(axis=0), strict=True) if n})


def as_metrics(counts: Counter[str]) -> dict[str, float]:
    """Returns `data/bad` and the `data/bad_KIND` of each kind found; empty if there are none."""
    kinds = {f"data/bad_{kind}": float(n) for kind, n in sorted(counts.items())}
    return {"data/bad": float(counts.total()), **kinds} if kinds else {}


def own_share(counts: dict[str, int], index: int, processes: int) -> dict[str, int]:
    """Returns the part of the global `counts` that process `index` resumes with.

    The counts are split evenly, for any previous number of processes, because each process compares
    its count with the samples that it has seen itself.
    """
    return {kind: n // processes + (index < n % processes) for kind, n in counts.items()}


def check_problems(problems: Counter[str], samples: int, max_fraction: float) -> None:
    """Raises UserError if indexing the source found too many problems."""
    total = problems.total()
    if total > max_fraction * max(samples + total, AT_LEAST):
        raise UserError(
            f"data.name: {describe(problems)} for {samples} usable samples, more than "
            f"data.max_bad_fraction = {max_fraction} allows"
        )

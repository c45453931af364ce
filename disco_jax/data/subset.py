"""Chooses samples of tar shards by their uids, as DataComp's filters do (Gadre et al., 2023)."""

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from disco_jax.data.source import BadSample, Failure, Sample
from disco_jax.data.tar_source import TarSource
from disco_jax.errors import UserError
from disco_jax.storage.local import cache_folder, replacing

UID = np.dtype("u8,u8")  # halves of a 128-bit hash
AT_ONCE = 50_000  # samples whose uids a process reads at a time


class Subset:
    """The samples of a source whose uids are in a file; a `Source`.

    Their order stays. A sample's uid is the 32 hexadecimal digits under `uid` in its `.json`. All
    uids are read once, a few minutes for ten million samples; what was chosen is kept in the user's
    cache.

    Args:
      source: local shards.
      file: an `.npy` file of pairs of uint64, as DataComp's filters write them.

    Raises:
      UserError: if the file is of another kind, the shards are remote, or no sample is chosen.
    """

    remote = False

    def __init__(self, source: TarSource, file: Path):
        if source.remote:
            raise UserError(
                "data.subset: the uids of shards in a bucket can't be read one by one; choose from "
                "local shards, e.g. with python -m disco_jax.data.make_tars, and upload the result"
            )
        uids = read_uids(file)
        digest = hashlib.sha256(source.fingerprint.encode() + uids.tobytes()).hexdigest()[:16]
        kept = cache_folder() / f"subset-{digest}.npy"
        if not kept.exists():
            with replacing(kept) as new:
                np.save(new, chosen(source, uids))
        self._source, self._indices = source, np.load(kept, mmap_mode="r", allow_pickle=False)
        if not len(self._indices):
            raise UserError(f"data.subset: no sample has a uid that is in {file}")
        self.problems: Counter[str] = source.problems
        self.fingerprint = f"{len(self)} of {source.fingerprint}, {digest}"

    def __len__(self) -> int:
        return len(self._indices)

    def left_out(self) -> list[Failure]:
        """Returns what the shards left out, not what was not chosen."""
        return self._source.left_out()

    def __getitem__(self, index: int) -> Sample:
        return self._source[int(self._indices[index])]


def read_uids(file: Path) -> np.ndarray:
    """Returns the sorted uids in a file, pairs of uint64.

    Raises:
      UserError: if it can't be read or holds something else.
    """
    try:
        uids = np.load(file.expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        raise UserError(f"data.subset: {file} can't be read: {reason}") from error
    if uids.dtype.names is None or [uids.dtype[i] for i in range(len(uids.dtype))] != ["<u8"] * 2:
        raise UserError(
            f"data.subset: {file} holds {uids.dtype}; it must hold pairs of uint64 (dtype u8,u8), "
            "as DataComp's filters write them"
        )
    return np.sort(uids.astype(UID))


def chosen(source: TarSource, uids: np.ndarray) -> np.ndarray:
    """Returns int64, ascending: the samples whose uids are among the sorted `uids`."""
    starts = range(0, len(source), AT_ONCE)
    pieces = [range(start, min(start + AT_ONCE, len(source))) for start in starts]
    with _mapped(len(pieces)) as found:
        each = track(
            found(partial(_chosen_of, source, uids), pieces),
            "reading uids",
            total=len(pieces),
            transient=True,
            disable=len(pieces) == 1,
        )
        return np.concatenate(list(each)) if pieces else np.empty(0, np.int64)


def _chosen_of(source: TarSource, uids: np.ndarray, indices: range) -> np.ndarray:
    own = np.array([_uid(source, index) for index in indices], UID)
    places = np.searchsorted(uids, own)
    there = places < len(uids)
    there[there] = uids[places[there]] == own[there]
    return np.asarray(indices, np.int64)[there]


def _uid(source: TarSource, index: int) -> tuple[int, int]:
    """Returns a sample's uid; zeros, which stand for none, if it has none."""
    try:
        uid = source.metadata(index).get("uid")
        return int(uid[:16], 16), int(uid[16:32], 16)
    except (BadSample, TypeError, ValueError, AttributeError):
        return 0, 0


@contextmanager
def _mapped(pieces: int) -> Iterator[Callable[..., Iterator[np.ndarray]]]:
    """Yields `map`, over processes if there are several pieces."""
    if pieces < 2:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(pieces, os.cpu_count() or 1), mp_context=context) as pool:
        yield pool.map

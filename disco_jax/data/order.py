"""The order in which training reads the samples of its sources.

An order maps the places of an endless stream, 0, 1, 2, ..., to indices of samples. It depends only
on the seed and on the lengths of the sources, and any place is found at once.
"""

import bisect
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from disco_jax.data.block_order import BlockOrder, Window
from disco_jax.data.source import Joined

ENDLESS = 2**48  # more samples than any run sees
GLOBAL = {"order": "global"}


class Order(Protocol):
    """A map from places in the stream to samples."""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `config.data` that the order depends on, and their values."""
        ...

    def indices(self, places: np.ndarray) -> np.ndarray:
        """Returns the indices of the samples at these places, both int64 `[n]`."""
        ...

    def lanes_of(self, places: np.ndarray) -> np.ndarray:
        """Returns the lane, int16 `[n]`, that each place, int64 `[n]`, takes its sample from.

        Places that share a lane read the same blocks.
        """
        ...

    def near(self, place: int) -> list[range]:
        """Returns the indices of the samples that are read along with the one at `place`."""
        ...

    def windows(self, place: int, lanes: Iterable[int] | None = None) -> Iterator[Window]:
        """Iterates over what to read for the places from `place` on, as they first need it."""
        ...


@dataclass(frozen=True)
class GlobalOrder:
    """Endless epochs, each a permutation of all samples: Grain's global shuffle.

    Args:
      length: number of samples, at least 1.
      seed: seed of the permutations, less than 2**32.
    """

    length: int
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `config.data` that the order depends on."""
        return GLOBAL

    def indices(self, places: np.ndarray) -> np.ndarray:
        """Returns the indices of the samples at these places, both int64 `[n]`."""
        indices = []
        for place in places.tolist():
            epoch, place = divmod(place, self.length)
            seed = (self.seed + epoch) % 2**32  # as in Grain's MapDataset.shuffle
            indices.append(index_shuffle(place, max_index=self.length - 1, seed=seed, rounds=4))
        return np.array(indices, np.int64)

    def lanes_of(self, places: np.ndarray) -> np.ndarray:
        """Returns zeros, int16 `[n]`: there is one lane."""
        return np.zeros(len(places), np.int16)

    def near(self, place: int) -> list[range]:
        """Returns nothing: a sample is read by itself."""
        return []

    def windows(self, place: int, lanes: Iterable[int] | None = None) -> Iterator[Window]:
        """Yields nothing: samples are read one by one."""
        return iter(())


class MixedOrder:
    """Mixes several sources in fixed proportions, each in its own order and with its own epochs.

    Args:
      orders: the order of each source.
      starts: the index at which each source begins.
      weights: the proportions, rounded down to hundredths of the smallest one.
    """

    def __init__(self, orders: Sequence[Order], starts: Sequence[int], weights: Sequence[float]):
        self._orders, self._starts = orders, starts
        scale = 100 / min(weights)
        self._shares = [int(weight * scale) for weight in weights]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `config.data` that the orders depend on."""
        return self._orders[0].fields

    def indices(self, places: np.ndarray) -> np.ndarray:
        """Returns the indices of the samples at these places, both int64 `[n]`."""
        indices = np.empty_like(places)
        for i, here, own in self._by_source(places):
            indices[here] = self._starts[i] + self._orders[i].indices(own)
        return indices

    def lanes_of(self, places: np.ndarray) -> np.ndarray:
        """Returns the lane of its source, int16 `[n]`, that each place takes its sample from."""
        lanes = np.empty(len(places), np.int16)
        for i, here, own in self._by_source(places):
            lanes[here] = self._orders[i].lanes_of(own)
        return lanes

    def near(self, place: int) -> list[range]:
        """Returns the indices of the samples that are read along with the one at `place`."""
        ((i, _, own),) = self._by_source(np.array([place]))
        return self._shifted(i, self._orders[i].near(int(own[0])))

    def windows(self, place: int, lanes: Iterable[int] | None = None) -> Iterator[Window]:
        """Iterates over the windows of these lanes of all sources, as in `BlockOrder.windows`."""
        chosen = None if lanes is None else list(lanes)
        begun = self._counts(np.array([place]))[:, 0].tolist()
        streams = [self._windows(i, own, chosen) for i, own in enumerate(begun)]
        return heapq.merge(*streams, key=lambda window: window.first)

    def _windows(self, i: int, own: int, lanes: list[int] | None) -> Iterator[Window]:
        for window in self._orders[i].windows(own, lanes):
            first, last = (self._place(i, x) for x in (window.first, window.stop - 1))
            blocks = self._shifted(i, window.blocks)
            yield window._replace(first=first, stop=last + 1, blocks=blocks)

    def _shifted(self, i: int, ranges: list[range]) -> list[range]:
        start = self._starts[i]
        return [range(r.start + start, r.stop + start) for r in ranges]

    def _by_source(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields each source that has some of the places, which, and their places in its stream."""
        before = self._counts(places)
        source = np.argmax(self._counts(places + 1) > before, axis=0)
        for i in np.unique(source).tolist():
            here = np.flatnonzero(source == i)
            yield i, here, before[i, here]

    def _counts(self, places: np.ndarray) -> np.ndarray:
        """Returns how many places before each are of each source, int64 `[sources, n]`.

        As in Grain's MapDataset.mix: of what the sources before it leave, each takes its share.
        """
        total = sum(self._shares)
        left = places.astype(np.int64 if total < 2**31 else object)  # total**2 must fit
        counts = []
        for share in self._shares:
            # left * (total - share) // total, whose product may not fit
            whole = left // total
            others = whole * (total - share) + (left - whole * total) * (total - share) // total
            counts.append(left - others)
            left, total = others, total - share
        return np.stack(counts).astype(np.int64)

    def _place(self, i: int, own: int) -> int:
        """Returns the place that takes place `own` of a source's stream."""

        def count(place: int) -> int:
            return int(self._counts(np.array([place + 1]))[i, 0])

        return bisect.bisect_left(range(ENDLESS), own + 1, key=count)


def make_order(data: ConfigDict, seed: int, source: Joined) -> Order:
    """Returns the order that the config's `data` section asks for.

    With `data.weights`, each of the joined sources has its own order; without, they form a single
    one. `auto` is `blocks` if a source is remote, where a small read takes as long as a large one.
    """

    def order(length: int) -> Order:
        if data.order == "blocks" or (data.order == "auto" and source.remote):
            return BlockOrder(length, seed, data.block_size, data.window, data.lanes)
        return GlobalOrder(length, seed)

    if not data.weights:
        return order(len(source))
    orders = [order(stop - start) for start, stop in pairwise(source.starts)]
    return MixedOrder(orders, source.starts, data.weights)


def by_lane(order: Order, first: int, size: int) -> np.ndarray:
    """Returns the places of a batch that begins at place `first`, int64 `[size]`, by its rows.

    The rows are sorted by lane, so that a process, which loads neighboring rows, reads few lanes.
    """
    places = np.arange(first, first + size)
    return places[np.argsort(order.lanes_of(places), kind="stable")]

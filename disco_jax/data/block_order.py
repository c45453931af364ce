"""The order `blocks`: reads blocks of consecutive samples, and mixes those of many blocks.

Like the global order, it is a function of the seed and the place, in closed form. An epoch is a
permutation of the blocks. They are dealt to lanes like cards, each lane shuffles the samples of a
window of its blocks, and the samples of the epoch are taken from the lanes in turn.
"""

import functools
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data.permutation import key_of, permuted

Ints = Any  # an integer, or int64 [n]


class Window(NamedTuple):
    """Blocks of a lane whose samples are shuffled together."""

    epoch: int
    lane: int
    first: int  # the first place of the stream that takes a sample from it
    stop: int  # one more than the last place that does
    blocks: list[range]  # the samples of each block, as indices


@dataclass(frozen=True)
class BlockOrder:
    """An endless stream of epochs, each a permutation of the blocks and, in windows, of samples.

    Args:
      length: number of samples, at least 1.
      seed: seed of all permutations.
      block_size: consecutive samples in a block; the last block may be shorter.
      window: blocks of a lane that are shuffled together, a power of two.
      lanes: number of lanes. With fewer blocks than lanes, some have no samples.
    """

    length: int
    seed: int
    block_size: int
    window: int
    lanes: int

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `config.data` that the order depends on, besides the seed."""
        sizes = {"block_size": self.block_size, "window": self.window, "lanes": self.lanes}
        return {"order": "blocks"} | sizes

    def indices(self, places: np.ndarray) -> np.ndarray:
        """Returns the indices of the samples at these places of the stream, both int64 `[n]`."""
        indices = np.empty_like(places)
        for epoch, here in self._by_epoch(places):
            indices[here] = epoch.index(places[here] - epoch.number * self.length)
        return indices

    def lanes_of(self, places: np.ndarray) -> np.ndarray:
        """Returns the lane, int16 `[n]`, that each place, int64 `[n]`, takes its sample from."""
        lanes = np.empty(len(places), np.int16)
        for epoch, here in self._by_epoch(places):
            lanes[here] = epoch.dealt(places[here] - epoch.number * self.length)[0]
        return lanes

    def near(self, place: int) -> list[range]:
        """Returns the blocks that are at hand when the sample at `place` is read: its window's."""
        number, place = divmod(place, self.length)
        epoch = _epoch(self, number)
        (lane,), (depth,) = epoch.dealt(np.array([place]))
        return epoch.blocks(lane, epoch.window_at(lane, depth))

    def windows(self, place: int, lanes: Iterable[int] | None = None) -> Iterator[Window]:
        """Iterates over the windows of `lanes` (default: all), from those in use at `place`.

        They come without end, in the order of the places that first need them.
        """
        chosen = range(self.lanes) if lanes is None else lanes
        streams = [self._windows(int(lane), place) for lane in chosen]
        return heapq.merge(*streams, key=lambda window: window.first)

    def _windows(self, lane: int, place: int) -> Iterator[Window]:
        number, place = divmod(place, self.length)
        epoch = _epoch(self, number)
        depth = epoch.next_depth(lane, place)
        while epoch.ends[lane]:
            if depth < epoch.ends[lane]:
                window = epoch.window_at(lane, depth)
                first, stop = epoch.span(lane, window)
                yield Window(
                    number,
                    lane,
                    number * self.length + epoch.place(lane, first),
                    number * self.length + epoch.place(lane, stop - 1) + 1,
                    epoch.blocks(lane, window),
                )
                depth = stop
            else:
                number, depth = number + 1, 0
                epoch = _epoch(self, number)

    def _by_epoch(self, places: np.ndarray) -> Iterator[tuple["_Epoch", np.ndarray]]:
        """Yields each epoch that `places` are in, and which of them are."""
        numbers = places // self.length
        for number in np.unique(numbers).tolist():
            yield _epoch(self, number), np.flatnonzero(numbers == number)


class _Epoch:
    """One epoch of a `BlockOrder`, whose places count from its start.

    The depth of a sample is the number of samples that its lane gives before it. Lanes differ in
    length by two blocks at most, so the dealing has few stages. Each ends with the shortest of the
    lanes that are left.
    """

    def __init__(self, order: BlockOrder, number: int):
        self.number, self._order = number, order
        size, lanes = order.block_size, order.lanes
        self._full, short = divmod(order.length, size)  # full blocks, samples of the short one
        self._missing = size - short if short else 0
        total = self._full + bool(short)
        self._key = key_of(order.seed, number)
        # The short block's number among the permuted ones; if there is none, that of no block.
        self._short = int(key_of(order.seed, number, total)[0]) % total if short else total
        self._counts = total // lanes + (np.arange(lanes) < total % lanes)  # blocks of each lane
        self.ends = self._counts * size  # samples of each lane, int64 [lanes]
        self.ends[self._short % lanes] -= self._missing
        stops = np.unique(self.ends[self.ends > 0])
        # Of each stage: the depth and the place at which it begins, and the lanes that are left.
        self._depth = np.array([0, *stops[:-1]])
        self._left = [np.flatnonzero(self.ends > depth) for depth in self._depth]
        self._each = np.array([len(left) for left in self._left])
        self._place = np.array([0, *np.cumsum((stops - self._depth) * self._each)[:-1]])

    def dealt(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lane and the depth, both int64 `[n]`, of each place."""
        stage = np.searchsorted(self._place, places, "right") - 1
        depth, turn = np.divmod(places - self._place[stage], self._each[stage])
        lane = np.empty_like(places)
        for number in np.unique(stage):
            here = stage == number
            lane[here] = self._left[number][turn[here]]
        return lane, self._depth[stage] + depth

    def place(self, lane: int, depth: int) -> int:
        """Returns the place that takes the sample at this depth of the lane: inverts `dealt`."""
        stage = np.searchsorted(self._depth, depth, "right") - 1
        turn = np.searchsorted(self._left[stage], lane)
        return int(self._place[stage] + (depth - self._depth[stage]) * self._each[stage] + turn)

    def next_depth(self, lane: int, place: int) -> int:
        """Returns the number of samples that the places before `place` take from the lane."""
        stage = np.searchsorted(self._place, place, "right") - 1
        depth, turn = divmod(place - int(self._place[stage]), int(self._each[stage]))
        taken = np.searchsorted(self._left[stage], lane) < turn
        return min(int(self._depth[stage]) + depth + int(taken), int(self.ends[lane]))

    def index(self, places: np.ndarray) -> np.ndarray:
        """Returns the index, int64 `[n]`, of the sample at each place, int64 `[n]`."""
        order = self._order
        lane, depth = self.dealt(places)
        window = self.window_at(lane, depth)
        first, stop = self.span(lane, window)
        key = key_of(order.seed, self.number, lane, window)
        depth = first + permuted(depth - first, stop - first, key)
        block, offset = np.divmod(self._filled(lane, depth), order.block_size)
        return self._block(block * order.lanes + lane) * order.block_size + offset

    def window_at(self, lane: Ints, depth: Ints) -> Ints:
        """Returns which window of a lane the sample at a depth is in."""
        block, largest = self._filled(lane, depth) // self._order.block_size, self._order.window
        doublings = largest.bit_length() - 1
        small = np.frexp(np.minimum(block + 1, largest))[1] - 1  # log2, rounded down
        beyond = block - (largest - 1) - self._ramp(lane)
        return np.where(beyond < 0, small, doublings + 1 + beyond // largest)

    def _first_block(self, lane: Ints, window: Ints) -> Ints:
        """Returns the first of the lane's blocks in a window; their number if they end before.

        Windows of 1, 2, 4, ... blocks let training begin before it has read a whole window for each
        lane. One of 1 to `window` blocks follows, and differs between neighboring lanes: otherwise
        all lanes would need their next windows at the same time.
        """
        largest = self._order.window
        doublings = largest.bit_length() - 1
        later = largest - 1 + self._ramp(lane) + (window - doublings - 1) * largest
        small = 2 ** np.minimum(window, doublings) - 1
        return np.minimum(np.where(window <= doublings, small, later), self._counts[lane])

    def _ramp(self, lane: Ints) -> Ints:
        return 1 + lane % self._order.window

    def span(self, lane: Ints, window: Ints) -> tuple[Ints, Ints]:
        """Returns the first depth of a window of a lane, and one more than the last."""
        return tuple(self._begin(lane, self._first_block(lane, window + i)) for i in (0, 1))

    def _begin(self, lane: Ints, block: Ints) -> Ints:
        """Returns the depth at which a block of a lane begins."""
        short, short_lane = divmod(self._short, self._order.lanes)
        after = (lane == short_lane) & (block > short)
        return block * self._order.block_size - after * self._missing

    def _filled(self, lane: Ints, depth: Ints) -> Ints:
        """Returns what the depth would be if the short block were as long as the others."""
        short, short_lane = divmod(self._short, self._order.lanes)
        after = (lane == short_lane) & (depth >= self._begin(short_lane, short + 1))
        return depth + after * self._missing

    def _block(self, numbers: np.ndarray) -> np.ndarray:
        """Returns which blocks have these numbers among the permuted ones, all int64 `[n]`.

        The full blocks are permuted, and the short one is put between two of them.
        """
        full = max(self._full, 1)
        others = np.minimum(numbers - (numbers > self._short), full - 1)
        return np.where(numbers == self._short, self._full, permuted(others, full, self._key))

    def blocks(self, lane: int, window: int) -> list[range]:
        """Returns the indices in each block of a window of a lane."""
        order = self._order
        first, stop = (int(self._first_block(lane, window + i)) for i in (0, 1))
        blocks = self._block(np.arange(first, stop) * order.lanes + lane) * order.block_size
        return [range(b, min(b + order.block_size, order.length)) for b in blocks.tolist()]


@functools.lru_cache(maxsize=64)
def _epoch(order: BlockOrder, number: int) -> _Epoch:
    return _Epoch(order, number)

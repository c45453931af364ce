"""The order `blocks` as a simulation that deals lists of samples, in Python's integers."""

import io
import itertools
from collections import Counter

from ml_collections import ConfigDict
from PIL import Image

from disco_jax.config import default
from disco_jax.data.block_order import BlockOrder, Window
from disco_jax.data.source import Sample

MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15


def naive_hash(x: int) -> int:
    """SplitMix64's, as published: https://prng.di.unimi.it/splitmix64.c."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def naive_key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = naive_hash((key + STEP & MASK) ^ part)
    return key


def naive_permuted(index: int, length: int, key: int) -> int:
    """A Feistel network on strings of bits."""
    bits = max((length - 1).bit_length(), 4)
    while True:
        text = f"{index:0{bits}b}"
        cut = bits - bits // 2
        for number in range(1, 9):
            left, right = text[:cut], text[cut:]
            hashed = f"{naive_hash((key + number * STEP & MASK) ^ int(right, 2)):064b}"[-cut:]
            text = right + "".join(str(int(a != b)) for a, b in zip(left, hashed, strict=True))
            cut = bits - cut
        index = int(text, 2)
        if index < length:
            return index


def naive_shuffle(cards: list, key: int) -> list:
    return [cards[naive_permuted(i, len(cards), key)] for i in range(len(cards))]


def naive_epoch(order: BlockOrder, number: int) -> list[tuple[int, int, int]]:
    """Returns the index, lane and window of each place of an epoch."""
    starts = range(0, order.length, order.block_size)
    blocks = [range(i, min(i + order.block_size, order.length)) for i in starts]
    short = blocks.pop() if len(blocks[-1]) < order.block_size else None
    count = len(blocks) + (short is not None)
    blocks = naive_shuffle(blocks, naive_key(order.seed, number))
    if short is not None:
        blocks.insert(naive_key(order.seed, number, count) % count, short)
    piles = []
    for lane in range(order.lanes):
        sizes = [1]
        while sizes[-1] < order.window:
            sizes.append(2 * sizes[-1])
        sizes[-1] = 1 + lane % order.window
        own, pile = blocks[lane :: order.lanes], []
        for window, size in enumerate(itertools.chain(sizes, itertools.repeat(order.window))):
            if not own:
                break
            cards = [index for block in own[:size] for index in block]
            key = naive_key(order.seed, number, lane, window)
            pile += [(index, lane, window) for index in naive_shuffle(cards, key)]
            own = own[size:]
        piles.append(pile)
    dealt = []
    while any(piles):
        dealt += [pile.pop(0) for pile in piles if pile]
    return dealt


def naive_stream(order: BlockOrder, epochs: int) -> list[tuple[int, int, int, int]]:
    """Returns the index, epoch, lane and window of each place."""
    return [
        (index, e, lane, window)
        for e in range(epochs)
        for index, lane, window in naive_epoch(order, e)
    ]


def naive_windows(order: BlockOrder, epochs: int) -> list[tuple[Window, set[int]]]:
    """Returns the windows, without their blocks, and their samples."""
    found: dict[tuple, list] = {}
    for place, (index, *where) in enumerate(naive_stream(order, epochs)):
        found.setdefault(tuple(where), []).append((place, index))
    return [
        (Window(e, lane, places[0][0], places[-1][0] + 1, []), {index for _, index in places})
        for (e, lane, _), places in found.items()
    ]


class Numbers:
    """A source whose sample k is named k. Those in `bad` are not images."""

    fingerprint = "numbers"
    problems: Counter[str] = Counter()  # noqa: RUF012

    def __init__(self, length: int, bad: frozenset[int] = frozenset()):
        encoded = io.BytesIO()
        Image.new("RGB", (4, 4)).save(encoded, "PNG")
        self._image, self._length, self._bad = encoded.getvalue(), length, bad

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        return Sample(str(i), b"?" if i in self._bad else self._image, b"a cat", i)


def small_blocks() -> ConfigDict:
    data = default().data
    data.update(order="blocks", block_size=4, window=2, lanes=4)
    return data

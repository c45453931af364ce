"""Tests the orders of samples against a simulation that deals lists of samples like cards."""

import itertools
import time
import tracemalloc
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disco_jax.config import default
from disco_jax.data.block_order import BlockOrder
from disco_jax.data.order import GlobalOrder, MixedOrder, by_lane, make_order
from disco_jax.data.permutation import key_of, permuted
from disco_jax.data.source import Joined
from tests.naive_order import (
    MASK,
    Numbers,
    naive_key,
    naive_permuted,
    naive_stream,
    naive_windows,
    small_blocks,
)

LAION = BlockOrder(400_000_000, seed=3, block_size=1024, window=8, lanes=256)
ORDERS = st.builds(
    BlockOrder,
    length=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    block_size=st.integers(1, 9),
    window=st.sampled_from([1, 2, 4]),
    lanes=st.integers(1, 7),
)
MANY = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@MANY
@given(st.integers(1, 700), st.integers(0, MASK))
def test_a_permutation_is_one_and_as_published(length, key):
    got = permuted(np.arange(length), length, np.array([key], np.uint64))
    assert sorted(got.tolist()) == list(range(length))
    for i in range(0, length, 97):
        assert got[i] == naive_permuted(i, length, key)


def test_keys_are_hashes_of_their_parts():
    many = key_of(7, np.arange(3), 2**40)
    assert many.tolist() == [naive_key(7, i, 2**40) for i in range(3)]
    assert len({*key_of(0, np.arange(1000)).tolist(), *key_of(1, np.arange(1000)).tolist()}) == 2000


@pytest.mark.parametrize("length", [5, 8, 40, 2**40])
def test_permutations_are_like_random_ones(length):
    """Where an index goes, and how far from its neighbor, is uniform over keys (chi-squared)."""
    keys = key_of(np.arange(20_000))
    first, second = (permuted(np.full(20_000, i), length, keys) for i in (2, 3))
    bins = min(length, 50)
    for values, outcomes in ((first, bins), ((second - first) % length, bins)):
        counts = np.bincount(values * bins // length, minlength=outcomes)
        if values is not first and bins == length:
            counts = counts[1:]  # neighbors go to different places
        expected = 20_000 / len(counts)
        degrees = len(counts) - 1
        squared = ((counts - expected) ** 2 / expected).sum()
        assert squared < degrees + 5 * np.sqrt(2 * degrees)


@MANY
@given(ORDERS)
def test_every_epoch_is_the_simulated_permutation(order):
    n = order.length
    stream = naive_stream(order, 3)
    got = order.indices(np.arange(3 * n))
    assert got.tolist() == [index for index, *_ in stream]
    assert order.lanes_of(np.arange(3 * n)).tolist() == [lane for _, _, lane, _ in stream]
    for epoch in got.reshape(3, n):
        assert sorted(epoch.tolist()) == list(range(n))


@pytest.mark.parametrize(
    ("length", "block_size", "window", "lanes"),
    [(1, 8, 4, 3), (5, 8, 4, 3), (8, 8, 4, 1), (25, 7, 1, 1), (3, 1, 8, 256), (129, 2, 8, 16)],
)
def test_sizes_that_divide_nothing(length, block_size, window, lanes):
    order = BlockOrder(length, 5, block_size, window, lanes)
    stream = [index for index, *_ in naive_stream(order, 4)]
    assert order.indices(np.arange(4 * length)).tolist() == stream
    assert [sorted(stream[i : i + length]) for i in range(0, len(stream), length)] == [
        list(range(length))
    ] * 4


@MANY
@given(ORDERS, st.data())
def test_a_place_needs_no_other(order, data):
    places = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=8)))
    each = [order.indices(np.array([place]))[0] for place in places]
    assert order.indices(places).tolist() == each
    for place, index in zip(places.tolist(), each, strict=True):
        assert any(index in block for block in order.near(place))


@settings(MANY, max_examples=30)
@given(ORDERS, st.data())
def test_windows_name_the_blocks_that_places_need(order, data):
    n = order.length
    place = data.draw(st.integers(0, 2 * n))
    lanes = data.draw(st.sets(st.integers(0, order.lanes - 1), min_size=1))
    expected = [
        (window, samples)
        for window, samples in naive_windows(order, 4)
        if window.stop > place and window.lane in lanes
    ]
    expected.sort(key=lambda found: found[0].first)
    stream = order.windows(place, None if len(lanes) == order.lanes else lanes)
    got = list(itertools.islice(stream, len(expected)))
    assert [window._replace(blocks=[]) for window in got] == [window for window, _ in expected]
    for window, (_, samples) in zip(got, expected, strict=True):
        indices = [index for block in window.blocks for index in block]
        assert len(indices) == len(samples)
        assert set(indices) == samples
        assert len(window.blocks) <= order.window
        assert all(block.start % order.block_size == 0 for block in window.blocks)
        assert all(block.stop in (block.start + order.block_size, n) for block in window.blocks)
        assert order.near(window.first) == order.near(window.stop - 1) == window.blocks


def test_lanes_without_samples_need_nothing():
    order = BlockOrder(20, 0, 8, 2, 9)
    assert list(order.windows(0, [5, 8])) == []


def test_the_first_batches_need_a_block_per_lane_and_later_ones_take_turns():
    """Were all lanes in step, some rounds of the lanes would need `window` blocks of each."""
    sizes = Counter()
    for window in itertools.takewhile(lambda w: w.first < 10**7, LAION.windows(0)):
        sizes[window.first // (LAION.lanes * LAION.block_size)] += len(window.blocks)
    assert sizes[0] == LAION.lanes
    assert max(sizes.values()) <= 4.5 * LAION.lanes
    assert {sizes[i] for i in range(15, 38)} == {LAION.lanes}


@MANY
@given(ORDERS, st.integers(0, 400), st.integers(1, 60))
def test_batches_are_parts_of_the_stream_sorted_by_lane(order, first, size):
    """Which samples a row holds therefore does not depend on the processes."""
    places = by_lane(order, first, size)
    assert sorted(places.tolist()) == list(range(first, first + size))
    lanes = order.lanes_of(places)
    assert lanes.tolist() == sorted(lanes.tolist())
    for lane in range(order.lanes):
        assert places[lanes == lane].tolist() == sorted(places[lanes == lane].tolist())


@pytest.mark.parametrize("batch_size", [64, 32, 16, 8])
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_processes_have_lanes_of_their_own(batch_size, processes):
    """The lanes divide the batch or the reverse, and an epoch does not begin with a batch."""
    if processes > batch_size:
        return
    order = BlockOrder(2000 * 16 + 5, 1, 2, 4, 16)
    each = batch_size // processes
    read: list[set[int]] = [set() for _ in range(processes)]
    begin = -(-order.length // batch_size) * batch_size
    for first in range(begin, begin + 1900 * 16, batch_size):
        rows = order.lanes_of(by_lane(order, first, batch_size))
        for process in range(processes):
            read[process] |= set(rows[process * each : (process + 1) * each].tolist())
    assert all(len(lanes) == 16 // processes for lanes in read)
    assert set.union(*read) == set(range(16))


def test_other_seeds_and_epochs_are_other_orders():
    n = 1000
    orders = [BlockOrder(n, seed, 16, 4, 4).indices(np.arange(3 * n)) for seed in range(3)]
    epochs = [tuple(epoch) for order in orders for epoch in order.reshape(3, n).tolist()]
    assert len(set(epochs)) == 9
    # Grain's epoch e of seed s is its epoch 0 of seed s + e. These seeds have nothing in common.
    same = [np.mean(np.equal(a, b)) for a, b in itertools.combinations(epochs, 2)]
    assert max(same) < 0.02


def test_a_batch_mixes_all_lanes_and_blocks():
    order = BlockOrder(100_000, 0, 16, 8, 32)
    index = order.indices(np.arange(40_000, 40_000 + 4096)) // 16
    assert 32 * 8 <= len(set(index.tolist())) <= 32 * 8 * 2
    assert order.lanes_of(np.arange(32)).tolist() == list(range(32))


def test_of_400_million_samples_any_place_is_found_at_once_in_constant_memory():
    tracemalloc.start()
    seconds = []
    for place in (0, LAION.length - 1, 31 * LAION.length + 12_345_678, 2**47):
        start = time.perf_counter()
        index = int(LAION.indices(np.array([place]))[0])
        seconds.append(time.perf_counter() - start)
        assert any(index in block for block in LAION.near(place))
        next(LAION.windows(place, [7]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(seconds) < 0.05
    assert peak < 1 << 20
    last = LAION.indices(np.arange(LAION.length - 5000, LAION.length + 5000))
    assert len(set(last[:5000].tolist())) == len(set(last[5000:].tolist())) == 5000
    larger = BlockOrder(2**40, 0, 1024, 8, 256).indices(np.arange(2**40, 2**40 + 5000))
    assert len(set(larger.tolist())) == 5000
    assert 2**38 < larger.max() < 2**40


def grains(lengths: list[int], seed: int, weights: tuple[float, ...]) -> grain.MapDataset:
    """The order of training before there were others."""
    ends = [0, *itertools.accumulate(lengths)] if weights else [0, sum(lengths)]
    parts = itertools.pairwise(ends)
    streams = [grain.MapDataset.range(*part).shuffle(seed=seed).repeat() for part in parts]
    return grain.MapDataset.mix(streams, weights) if weights else streams[0]


@pytest.mark.parametrize("weights", [(), (1.0, 1.0, 1.0), (2.0, 0.3, 0.31), (1e-6, 1.0, 0.7)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_global_order_is_grains(weights, seed):
    lengths = [200, 33, 1000]
    data, source = default().data, Joined([Numbers(n) for n in lengths])
    data.weights = weights
    order, expected = make_order(data, seed, source), grains(lengths, seed, weights)
    for first in (0, 1200, 10**12):
        places = np.arange(first, first + 120)
        assert order.indices(places).tolist() == [expected[k] for k in places.tolist()]
        assert by_lane(order, first, 120).tolist() == places.tolist()
    assert order.fields == {"order": "global"}
    assert order.near(5) == list(order.windows(5)) == []


@pytest.mark.parametrize("sources", [3, 40])
def test_shares_of_mixtures_do_not_overflow(sources):
    weights = [1e-6, *[1.0] * (sources - 1)]
    order = MixedOrder([GlobalOrder(99, 0)] * sources, range(0, 99 * sources, 99), weights)
    expected = grains([99] * sources, 0, tuple(weights))
    places = np.random.default_rng(0).integers(0, 2**47, 30)
    assert order.indices(places).tolist() == [expected[k] for k in places.tolist()]


def test_a_mixture_of_blocks_is_a_mixture_of_their_streams():
    lengths, weights = [50, 17, 90], (2.0, 1.0, 0.5)
    data = small_blocks()
    data.weights = weights
    order = make_order(data, 4, Joined([Numbers(n) for n in lengths]))
    parts = [BlockOrder(n, 4, 4, 2, 4) for n in lengths]
    streams = [iter([(i, *x) for x in naive_stream(part, 9)]) for i, part in enumerate(parts)]
    starts, ends = [0, 50, 67], [50, 67, 157]
    expected = []
    for index in (grains(lengths, 0, weights)[k] for k in range(300)):
        source = next(i for i, end in enumerate(ends) if index < end)
        expected.append(next(streams[source]))
    assert order.indices(np.arange(300)).tolist() == [starts[i] + x for i, x, *_ in expected]
    assert order.lanes_of(np.arange(300)).tolist() == [lane for *_, lane, _ in expected]
    places: dict[tuple, list[int]] = {}
    for place, (i, _, *where) in enumerate(expected):
        places.setdefault((i, *where), []).append(place)
    need = {(where[0], p[0]): p for where, p in places.items() if p[-1] < 200 and p[-1] >= 40}
    got = list(itertools.takewhile(lambda w: w.first < 200, order.windows(40)))
    found = {
        (next(i for i, end in enumerate(ends) if w.blocks[0].start < end), w.first): w for w in got
    }
    assert [w.first for w in got] == sorted(w.first for w in got)
    assert min(w.stop for w in got) > 40
    assert need.keys() <= found.keys()
    for key, used in need.items():
        assert found[key].stop == used[-1] + 1
        indices = {starts[expected[p][0]] + expected[p][1] for p in used}
        assert indices == {index for block in found[key].blocks for index in block}
        assert order.near(used[0]) == found[key].blocks

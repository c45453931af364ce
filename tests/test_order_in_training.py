"""Tests that training reads the samples of its order, replaces bad ones, and keeps to the order."""

import json

import numpy as np
import pytest

from disco_jax.config import default
from disco_jax.config.validation import problems_of
from disco_jax.data.block_order import BlockOrder
from disco_jax.data.load import NEAR, Load
from disco_jax.data.order import GLOBAL, by_lane, make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.source import Joined
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.data.train_data import TrainData
from disco_jax.errors import UserError
from disco_jax.models import PRESETS
from disco_jax.runs.workdir import check_same
from tests.naive_order import Numbers, naive_stream, small_blocks


def keys(steps: int, source: Numbers, **options) -> np.ndarray:
    """Returns the samples of the first batches, `[steps, rows]`, in blocks."""
    joined, data = Joined([source]), small_blocks()
    options = {"batch_size": 16, "start": 0, "num_workers": 0} | options
    load = Load(joined, data, 4, seed=4)
    stream = train_batches(make_order(data, 4, joined), load, Collate(CLIPTokenizer(8)), **options)
    seen = [next(stream).keys.astype(int) for _ in range(steps)]
    stream.close()
    return np.stack(seen)


def naive_batches(steps: int, length: int, batch_size: int = 16) -> np.ndarray:
    stream = naive_stream(BlockOrder(length, 4, 4, 2, 4), 2 + steps * batch_size // length)
    batches = [stream[i * batch_size : (i + 1) * batch_size] for i in range(steps)]
    return np.array([[i for i, *_ in sorted(batch, key=lambda s: s[2])] for batch in batches])


def test_batches_hold_the_simulated_samples():
    expected = naive_batches(12, 75)
    np.testing.assert_array_equal(keys(12, Numbers(75)), expected)
    for step in range(1, 12):
        resumed = keys(12 - step, Numbers(75), start=16 * step)
        np.testing.assert_array_equal(resumed, expected[step:])


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_load_the_rows_of_the_same_batches(processes):
    whole = naive_batches(12, 75)
    for rows in np.split(np.arange(16), processes):
        np.testing.assert_array_equal(keys(12, Numbers(75), rows=rows), whole[:, rows])


def test_a_batch_of_several_pieces_is_sorted_as_a_whole():
    np.testing.assert_array_equal(
        keys(2, Numbers(300), batch_size=96), naive_batches(2, 300, batch_size=96)
    )


def test_a_bad_sample_is_replaced_by_one_of_its_window_and_no_other_moves():
    clean = naive_batches(12, 75)
    bad = frozenset(range(0, 75, 5))
    order = BlockOrder(75, 4, 4, 2, 4)
    got = keys(12, Numbers(75, bad))
    resumed = keys(9, Numbers(75, bad), num_workers=2, start=3 * 16)
    np.testing.assert_array_equal(resumed, got[3:])
    replaced = np.isin(clean, list(bad))
    assert replaced.sum() >= 30
    np.testing.assert_array_equal(got[~replaced], clean[~replaced])
    places = np.stack([by_lane(order, 16 * step, 16) for step in range(12)])
    outside = 0
    for place, index in zip(places[replaced].tolist(), got[replaced].tolist(), strict=True):
        assert index not in bad
        outside += not any(index in block for block in order.near(place))
    assert outside == 0


def test_where_a_whole_window_is_bad_replacements_come_from_elsewhere():
    """Else a damaged shard would end a run that has few other bad samples."""
    order = BlockOrder(75, 4, 4, 2, 4)
    bad = frozenset(order.near(0)[0])
    joined, tried = Joined([Numbers(75, bad)]), []
    load = Load(joined, small_blocks(), 4, seed=4)

    def near(place: int) -> list[range]:
        tried.append(place)
        return order.near(place)

    loaded = load.train(0, int(order.indices(np.array([0]))[0]), near)
    assert int(loaded.key) not in bad
    assert len(tried) == NEAR
    assert len(loaded.failures) > NEAR
    assert {int(key) for _, key, _ in loaded.failures} == bad


def train_data(tmp_path, position: dict, **fields) -> TrainData:
    config = default()
    config.batch_size, config.data.num_workers = 16, 0
    config.data.update(fields)
    rows, source = np.arange(16), Joined([Numbers(75)])
    return TrainData(config, PRESETS["tiny"], source, rows, tmp_path, 0, position)


SIZES = {"order": "blocks", "block_size": 4, "window": 2, "lanes": 4}


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (SIZES, SIZES | {"block_size": 8}, "data.block_size=4 "),
        (SIZES, SIZES | {"window": 4, "lanes": 2}, "data.window=2, data.lanes=4 "),
        (SIZES, {}, "data.order=blocks, data.block_size=4, data.window=2, data.lanes=4 "),
        ({"order": "global"}, SIZES, "data.order=global "),
        ({}, {"block_size": 8}, ""),
        (SIZES, SIZES, ""),
    ],
)
def test_a_run_resumes_only_in_its_order(then, now, told, tmp_path):
    begun = train_data(tmp_path, {}, **then)
    position = json.loads(json.dumps(begun.position()))
    begun.close()
    if told:
        with pytest.raises(UserError, match=f"^data.order: .* was started; set {told}as it was"):
            train_data(tmp_path, position, **now)
    else:
        train_data(tmp_path, position, **now).close()


def test_a_run_of_before_is_in_the_global_order(tmp_path):
    position = {"samples_seen": 32, "data": "numbers", "bad": {}}
    train_data(tmp_path, position).close()
    with pytest.raises(UserError, match=r"set data\.order=global as it was"):
        train_data(tmp_path, position, **SIZES)


def test_the_config_of_a_run_leaves_its_order_to_the_checkpoint(tmp_path):
    config = default()
    stored = json.loads(config.to_json())
    config.data.update(SIZES)
    check_same(stored, config, tmp_path)


def test_auto_is_blocks_for_remote_sources():
    data = default().data
    local, remote = Numbers(5), Numbers(6)
    remote.remote = True
    assert make_order(data, 0, Joined([local, local])).fields == GLOBAL
    sizes = {"order": "blocks", "block_size": 1024, "window": 8, "lanes": 256}
    assert make_order(data, 0, Joined([local, remote])).fields == sizes
    data.weights = (1.0, 2.0)
    assert make_order(data, 0, Joined([local, remote])).fields == sizes
    data.order = "global"
    assert make_order(data, 0, Joined([local, remote])).fields == GLOBAL


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("order", ["auto", "global", "blocks"], ["", "random"]),
        ("block_size", [1, 1000], [0, -1]),
        ("window", [1, 2, 1024], [0, -2, 3, 12]),
        ("lanes", [1, 3, 2**14], [0, 2**14 + 1]),
    ],
)
def test_fields_are_checked(field, good, bad):
    config = default()
    for value in (*good, *bad):
        config.data[field] = value
        problems = problems_of(config)
        assert len(problems) == (value in bad), value
        assert all(line.startswith(f"data.{field} is ") for line in problems)

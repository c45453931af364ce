"""Tests samples with captions under several keys: which is drawn, and what is missing."""

import collections

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from disco_jax.config import default
from disco_jax.config.validation import problems_of
from disco_jax.data.load import Load
from disco_jax.data.source import BadSample
from disco_jax.data.sources import open_source
from disco_jax.errors import UserError
from tests.tars import picture, write


def shard(tmp_path):
    """Sample 0 has an alt text and two synthetic captions; 1 and 2 lack one of them, 3 has none."""
    members = {}
    alt = ["alt 0", "alt 1", "  ", ""]
    synthetic = ['["syn 0", "syn 0b"]', "null", '"syn 2"', '""']
    for i in range(4):
        members |= {f"{i}.jpg": picture(i), f"{i}.txt": alt[i].encode()}
        members[f"{i}.json"] = f'{{"meta": {{"synthetic": {synthetic[i]}}}}}'.encode()
    return write(tmp_path / "0.tar", members)


def loaded(name, key, **fields):
    data = default().data
    data.update({"caption_key": key, "image_key": "image", **fields})
    return Load(open_source(data, str(name), "train"), data, 16)


def drawn(load, index, times=1000):
    return collections.Counter(load.once(place, index).captions[0] for place in range(times))


def test_keys_are_drawn_by_their_weights(tmp_path):
    load = loaded(shard(tmp_path), "txt::meta.synthetic", caption_weights=(3, 1))
    found = drawn(load, 0)
    assert found.keys() == {"alt 0", "syn 0", "syn 0b"}
    assert abs(found["alt 0"] / 1000 - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 1000)
    assert abs(found["syn 0"] / 1000 - 0.125) < 4 * np.sqrt(0.125 * 0.875 / 1000)
    assert found == drawn(load, 0)  # a function of the seed and the position


def test_a_sample_without_one_of_the_keys_has_the_others(tmp_path):
    load = loaded(shard(tmp_path), "txt::meta.synthetic")
    assert set(drawn(load, 1, 50)) == {"alt 1"}
    assert set(drawn(load, 2, 50)) == {"syn 2"}
    with pytest.raises(BadSample) as caught:
        load.once(0, 3)
    assert caught.value.kind == "empty_caption"
    assert load.evaluate(0).captions == ("alt 0", "syn 0", "syn 0b")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_of_tables(suffix, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    columns = {"image": ["0.jpg", "1.jpg"], "alt": ["a", ""], "long": ["b", "c"]}
    table = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        table.write_text(
            "\n".join([",".join(columns), *map(",".join, zip(*columns.values(), strict=True))])
        )
    else:
        pa.parquet.write_table(pa.table(columns | {"alt": ["a", None]}), table)
    load = loaded(table, "alt::long")
    assert set(drawn(load, 0, 50)) == {"a", "b"}
    assert set(drawn(load, 1, 50)) == {"c"}
    with pytest.raises(UserError, match="has no column 'short'"):
        loaded(table, "alt::short")


def test_weights_are_one_per_key():
    config = default()
    config.data.caption_key = "txt::synthetic"
    for weights, right in (((), True), ((1, 2), True), ((1,), False), ((1, 0), False)):
        config.data.caption_weights = weights
        told = [x for x in problems_of(config) if x.startswith("data.caption_weights must be 2")]
        assert (told == []) == right

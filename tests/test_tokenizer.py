"""Token ids against OpenCLIP's."""

import json

import numpy as np

from disco_jax.tokenizer import CLIPTokenizer


def test_ids_equal_openclips(golden):
    rows = json.loads((golden / "tokens.json").read_text())
    got = CLIPTokenizer().ids([row["text"] for row in rows])
    wrong = [row["text"] for row, ids in zip(rows, got, strict=True) if ids != row["ids"]]
    assert len(rows) == 300
    assert wrong == []


def test_padding_and_cutting():
    tokenizer = CLIPTokenizer(context_length=6)
    tokens = tokenizer(["a cat", "one two three four five six seven", ""])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[0], [49406, 320, 2368, 49407, 0, 0])
    np.testing.assert_array_equal(tokens[1, [0, 5]], [49406, 49407])  # cut, and still ended
    np.testing.assert_array_equal(tokens[2], [49406, 49407, 0, 0, 0, 0])
    assert tokenizer.vocab_size == 49408

"""Token ids against OpenCLIP's."""

import json

import numpy as np

from disco_jax.tokenizer import CLIPTokenizer


def test_ids_equal_openclips(golden):
    rows = json.loads((golden / "tokens.json").read_text())
    got = CLIPTokenizer()([row["text"] for row in rows])
    expected = np.zeros((300, 77), np.int32)
    for tokens, row in zip(expected, rows, strict=True):
        tokens[: len(row["ids"])] = row["ids"]
    wrong = [row["text"] for i, row in enumerate(rows) if (got[i] != expected[i]).any()]
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

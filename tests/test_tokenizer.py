"""Tests the token ids of the CLIP tokenizer against OpenCLIP's."""

import html
import json
import random
import time

import ftfy
import numpy as np
import pytest

from disco_jax.data.tokenizer import CLIPTokenizer, clean


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
    np.testing.assert_array_equal(tokens[1, [0, 5]], [49406, 49407])  # cut, but still ended
    np.testing.assert_array_equal(tokens[2], [49406, 49407, 0, 0, 0, 0])
    assert tokenizer.vocab_size == 49408


PARTS = [
    "a",
    "word",
    " ",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\0",
    "\x1c",
    "\x7f",
    "\x85",
    "\u2028",
    "\ufeff",
]
PARTS += [
    "Ã©",
    "&amp;",
    "&amp;amp;amp;lt;",
    "&am",
    "p;",
    "&lt;",
    "<b>",
    "&#10;",
    "&#x26;lt;",
    "ΑΣ",
    "ﬁ",
    "“",
    "\x1b[0m",
]


def test_cleaning_by_lines_is_cleaning_the_whole():
    draw = random.Random(0)
    for _ in range(5_000):
        text = "".join(draw.choices(PARTS, k=draw.randint(0, 30)))
        whole = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text) == " ".join(whole.split()).lower(), ascii(text)


@pytest.mark.slow
def test_a_book_is_cut_as_if_all_of_it_had_been_read():
    """Long texts must also be fast: ftfy takes seven seconds for a megabyte of short lines."""
    tokenizer = CLIPTokenizer()
    draw = random.Random(0)
    for _ in range(20):
        text = "".join(draw.choices(PARTS, k=30_000))
        ids = tokenizer.ids([text])[0]
        np.testing.assert_array_equal(tokenizer([text])[0], [*ids[:76], ids[-1]])
    began = time.process_time()
    tokenizer(["a\n" * 500_000, "\n" * 1_000_000])
    assert time.process_time() - began < 2

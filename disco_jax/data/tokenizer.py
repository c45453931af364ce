"""Tokenizes texts with the `tokenizers` library: CLIP's byte-pair encoding or a tokenizer.json.

Cleaning follows OpenAI and OpenCLIP: text is fixed by ftfy, HTML-unescaped twice, its whitespace
collapsed, and lowercased. For SigLIP, punctuation is removed as well.
"""

import gzip
import html
import io
import re
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from disco_jax.errors import UserError

if TYPE_CHECKING:  # data workers import this module without needing JAX
    from disco_jax.models.config import TextConfig

_WORD = re.compile("[^\x00-\x20\x7f\ufeff]")  # matches every line that contains a word
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
START, END = "<start_of_text>", "<end_of_text>"  # as OpenCLIP spells them
_MERGES = 49152 - 256 - 2  # CLIP uses only this many of the merges in the file
_WORDS = (
    r"<start_of_text>|<end_of_text>|'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class CLIPTokenizer:
    """CLIP's tokenizer, with OpenAI's merges; pads with 0 or truncates to `context_length`."""

    def __init__(self, context_length: int = 77):
        self.context_length = context_length
        self._bpe = _byte_pair_encoder()
        vocabulary = self._bpe.get_vocab()
        self._start, self._end = vocabulary[START], vocabulary[END]
        self._enough = context_length * max(map(len, vocabulary))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, 49,408."""
        return self._bpe.get_vocab_size()

    def ids(self, texts: Sequence[str], enough: int = sys.maxsize) -> list[list[int]]:
        """Returns each text's ids with start and end, unpadded; cut past `enough` characters."""
        encodings = self._bpe.encode_batch([_first(_cleaned(text), enough) for text in texts])
        return [[self._start, *encoding.ids, self._end] for encoding in encodings]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns int32 `[len(texts), context_length]`; truncated texts keep the end token."""
        tokens = np.zeros((len(texts), self.context_length), np.int32)
        for row, ids in zip(tokens, self.ids(texts, self._enough), strict=True):
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], self._end]
            row[: len(ids)] = ids
        return tokens


class FileTokenizer:
    """A tokenizer read from a `tokenizer.json`, with the end and padding tokens of SigLIP models.

    SigLIP's (T5's SentencePiece) ends texts with `</s>` and pads with it; SigLIP 2's (Gemma's) ends
    texts with `<eos>` and pads with `<pad>`.

    Raises:
      UserError: if the file is not a tokenizer or lacks these tokens.
    """

    def __init__(self, path: str | Path, context_length: int):
        self.context_length = context_length
        self._pieces = _read_tokenizer(str(path))
        ending, eos, pad = (self._pieces.token_to_id(t) for t in ("</s>", "<eos>", "<pad>"))
        if ending is not None:
            self._end, self._pad = ending, ending
        elif eos is not None and pad is not None:
            self._end, self._pad = eos, pad
        else:
            raise UserError(f"{path} has neither the token </s> nor <eos> and <pad>")
        # Twice the maximum needed, because tokenization may depend on the text that follows.
        self._enough = 2 * context_length * max(map(len, self._pieces.get_vocab()))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: files may leave ids out."""
        return max(self._pieces.get_vocab().values()) + 1

    def ids(self, texts: Sequence[str], enough: int = sys.maxsize) -> list[list[int]]:
        """Returns each text's ids with the end token, unpadded; cut past `enough` characters."""
        encodings = self._pieces.encode_batch(
            [_first(map(_without_punctuation, _cleaned(text)), enough) for text in texts],
            add_special_tokens=False,
        )
        return [[*encoding.ids, self._end] for encoding in encodings]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns int32 `[len(texts), context_length]`; truncated texts keep the end token."""
        tokens = np.full((len(texts), self.context_length), self._pad, np.int32)
        for row, ids in zip(tokens, self.ids(texts, self._enough), strict=True):
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], self._end]
            row[: len(ids)] = ids
        return tokens


TextTokenizer = CLIPTokenizer | FileTokenizer


def make_tokenizer(text: "TextConfig") -> TextTokenizer:
    """Returns the tokenizer of a text tower.

    Raises:
      UserError: if its file can't be read or it does not suit the tower.
    """
    if text.tokenizer:
        tokenizer: TextTokenizer = FileTokenizer(text.tokenizer, text.context_length)
    else:
        tokenizer = CLIPTokenizer(text.context_length)
    # Token ids past the model's vocabulary would give features of NaN.
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer {text.tokenizer or 'of CLIP'} has {tokenizer.vocab_size:,} tokens, but "
            f"the model has {text.vocab_size:,}; set model.tokenizer to the model's tokenizer.json"
        )
    if text.tokenizer and text.pool == "argmax":
        raise UserError(
            "model.tokenizer: this model pools at the end-of-text token of CLIP's tokenizer; leave "
            "it empty"
        )
    return tokenizer


def _without_punctuation(words: list[str]) -> list[str]:
    return " ".join(words).replace("_", " ").translate(_NO_PUNCTUATION).split()


def _read_tokenizer(path: str) -> Tokenizer:
    try:
        pieces = Tokenizer.from_file(path)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path} is not a readable tokenizer.json: {error}") from error
    pieces.no_truncation()
    pieces.no_padding()
    return pieces


def clean(text: str) -> str:
    """Returns `text` fixed by ftfy, HTML-unescaped, with single spaces and in lowercase."""
    return " ".join(word for line in _cleaned(text) for word in line).lower()


def _cleaned(text: str) -> Iterator[list[str]]:
    """Yields the cleaned words of each line; ftfy fixes text line by line."""
    rules = ftfy.TextFixerConfig(explain=False)
    for line in io.StringIO(text, newline="\n"):
        if "<" in line:  # HTML from here on, in which ftfy keeps entities
            rules = rules._replace(unescape_html=False)
        if not _WORD.search(line):
            continue
        yield html.unescape(html.unescape(ftfy.fix_text(line, rules))).split()


def _first(words: Iterable[list[str]], enough: int) -> str:
    """Joins leading lines, lowercased, until they have at least `enough` characters.

    This bounds the cost of very long captions: ftfy takes seconds for a megabyte of short lines.
    """
    found: list[str] = []
    length = 0
    for line in words:
        found += line
        length += sum(map(len, line))
        if length >= enough:
            break
    return " ".join(found).lower()


@cache
def merges() -> list[tuple[str, str]]:
    """Returns OpenAI's merges, in order of rank."""
    packed = resources.files("disco_jax").joinpath("assets/bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    return [(pair[0], pair[1]) for pair in (line.split() for line in lines[1 : _MERGES + 1])]


def vocabulary(start: str = START, end: str = END) -> dict[str, int]:
    """Returns the id of every token, with the given names for the two special tokens."""
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += ["".join(pair) for pair in merges()]
    return {token: i for i, token in enumerate([*tokens, start, end])}


@cache
def _byte_pair_encoder() -> Tokenizer:
    bpe = Tokenizer(models.BPE(vocabulary(), merges(), end_of_word_suffix="</w>"))
    bpe.add_special_tokens([START, END])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe


def _byte_alphabet() -> list[str]:
    """Returns GPT-2's printable substitutes for the 256 bytes, in the order of CLIP's ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]

"""CLIP's byte-pair tokenizer: the `tokenizers` library over OpenAI's merges.

Cleaning follows OpenAI's and OpenCLIP's: text mended by ftfy, HTML unescaped twice, white space
collapsed, lower case.
"""

import gzip
import html
from collections.abc import Sequence
from functools import cache
from importlib import resources

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

START, END = "<start_of_text>", "<end_of_text>"  # as OpenCLIP spells them
_MERGES = 49152 - 256 - 2  # CLIP uses the first so many of the file
_WORDS = (
    r"<start_of_text>|<end_of_text>|'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class CLIPTokenizer:
    """Texts to token ids, padded with 0 to `context_length` and cut to it."""

    def __init__(self, context_length: int = 77):
        self.context_length = context_length
        self._bpe = _byte_pair_encoder()
        vocabulary = self._bpe.get_vocab()
        self._start, self._end = vocabulary[START], vocabulary[END]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, 49,408."""
        return self._bpe.get_vocab_size()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the start and end tokens, neither cut nor padded."""
        encodings = self._bpe.encode_batch([clean(text) for text in texts])
        return [[self._start, *encoding.ids, self._end] for encoding in encodings]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 `[len(texts), context_length]`; a text that is cut still ends in the end token."""
        tokens = np.zeros((len(texts), self.context_length), np.int32)
        for row, ids in zip(tokens, self.ids(texts), strict=True):
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], self._end]
            row[: len(ids)] = ids
        return tokens


def clean(text: str) -> str:
    """`text` mended, unescaped, with single spaces, in lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def merges() -> list[tuple[str, str]]:
    """OpenAI's merges, in their order."""
    packed = resources.files("disco_jax").joinpath("assets/bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    return [(pair[0], pair[1]) for pair in (line.split() for line in lines[1 : _MERGES + 1])]


def vocabulary(start: str = START, end: str = END) -> dict[str, int]:
    """The id of every token, the two special ones by the names given."""
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
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]

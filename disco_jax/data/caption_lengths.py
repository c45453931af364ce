"""The lengths of a source's captions, from a sample of it."""

import numpy as np
from ml_collections import ConfigDict

from disco_jax.data.load import usable_captions
from disco_jax.data.source import BadSample, Joined
from disco_jax.data.tokenizer import CLIPTokenizer

SAMPLES = 2_048  # read to estimate the distribution


def caption_lengths(source: Joined, tokenizer: CLIPTokenizer, data: ConfigDict) -> np.ndarray:
    """Returns int `[n]`: tokens of captions from all parts of a source, start and end included.

    Captions longer than the tokenizer's context count as that long. Samples that can't be used are
    left out here; training reports them. If a sample has several captions, all of them are counted.

    Args:
      source: the samples.
      tokenizer: gives the context length.
      data: the config's `data` section, for the weights of joined sources and `captions_by_line`.
    """
    sizes = np.diff(source.starts)
    shares = np.array(data.weights or sizes, float)
    captions: list[str] = []
    for start, size, share in zip(source.starts, sizes, shares / shares.sum(), strict=False):
        count = min(size, round(SAMPLES * share))
        for index in start + np.arange(count) * size // max(count, 1):
            try:
                captions += usable_captions(source[int(index)], data.captions_by_line)
            except BadSample:
                continue
    if not captions:
        return np.zeros(0, int)
    return tokenizer(captions).argmax(axis=1) + 1  # the end has the highest ID

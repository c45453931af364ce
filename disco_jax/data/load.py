"""One sample of the stream: read, decoded, its caption drawn; replaced where it is bad."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.random import Generator

from disco_jax.data.source import MAX_TEXT_BYTES, BadSample, Joined, Sample
from disco_jax.data.transforms import ImageLimits, open_image, to_pixels, to_random_pixels
from disco_jax.errors import UserError

TRIES = 100  # replacements of one sample, before there is no hope
_REPLACEMENT = 1  # a stream of random numbers apart from the sample's own

Failure = tuple[str, str, str]  # kind, key and detail of a bad sample


class Loaded(NamedTuple):
    """A sample ready for its batch."""

    key: str
    pixels: np.ndarray  # uint8 [size, size, 3]
    captions: tuple[str, ...]  # in training the one that was drawn
    label: int | None
    image_name: str | None  # equal for samples of one and the same image; None: of its own
    failures: tuple[Failure, ...]  # bad samples that stood in its place


class Load:
    """Loads samples of a source, all that is random about them drawn from seed and position.

    So a sample is the same whatever the number of workers and processes, and after a restart; and a
    bad one is replaced by another without moving any other.
    """

    def __init__(
        self, source: Joined, data: ConfigDict, size: int, seed: int = 0, squash: bool = False
    ):
        self._source, self._size, self._seed, self._squash = source, size, seed, squash
        self._least_area = data.crop_scale
        self._limits = ImageLimits(*(data[name] for name in ImageLimits._fields))

    def train(self, position: int, index: int) -> Loaded:
        """Sample `index` of the source, at this position of the stream; its replacement if bad.

        Raises:
          UserError: a hundred replacements are bad too.
        """
        failures: list[Failure] = []
        for attempt in range(TRIES):
            try:
                return self.once(position, index, attempt)._replace(failures=tuple(failures))
            except BadSample as bad:
                failures.append((bad.kind, bad.key, bad.detail))
            index = self._another(index, position, attempt)
        kind, key, detail = failures[0]
        raise UserError(
            f"{TRIES} samples drawn one after the other are bad; the first is {key}: "
            f"{kind} {detail}".rstrip()
        )

    def once(self, position: int, index: int, attempt: int = 0) -> Loaded:
        """As `train`, but without a replacement: raises BadSample."""
        rng = np.random.default_rng((self._seed, position, attempt))
        sample = self._source[index]
        captions = usable_captions(sample)
        if len(captions) > 1:
            captions = (captions[int(rng.integers(len(captions)))],)
        return Loaded(sample.key, self._pixels(sample, rng), captions, sample.label, None, ())

    def evaluate(self, index: int) -> Loaded:
        """Sample `index` by the evaluation transform, with all of its captions.

        Raises:
          BadSample: it is bad.
        """
        sample = self._source[index]
        image = open_image(sample.image, self._limits, sample.key)
        pixels = to_pixels(image, self._size, sample.key, self._squash)
        captions = usable_captions(sample)
        return Loaded(sample.key, pixels, captions, sample.label, sample.image_name, ())

    def _pixels(self, sample: Sample, rng: Generator) -> np.ndarray:
        image = open_image(sample.image, self._limits, sample.key)
        if self._least_area < 1:
            return to_random_pixels(image, self._size, self._least_area, rng, sample.key)
        return to_pixels(image, self._size, sample.key, self._squash)

    def _another(self, index: int, position: int, attempt: int) -> int:
        """Any sample of the same one of the joined sources, so that their weights stay."""
        part = self._source.part(index)
        rng = np.random.default_rng((self._seed, position, attempt, _REPLACEMENT))
        return int(rng.integers(self._source.starts[part], self._source.starts[part + 1]))


def usable_captions(sample: Sample) -> tuple[str, ...]:
    """The sample's captions; none where its source was asked for none.

    Raises:
      BadSample: one of them is not a text or too long, or there should be some and are not.
    """
    if sample.captions is None:
        return ()
    several = isinstance(sample.captions, Sequence) and not isinstance(sample.captions, str | bytes)
    captions: Sequence[Any] = sample.captions if several else [sample.captions]
    if not captions:
        raise BadSample("missing_caption", sample.key)
    for caption in captions:
        if isinstance(caption, str | bytes) and len(caption) > MAX_TEXT_BYTES:
            raise BadSample("too_large", sample.key, f"a caption of {len(caption):,}")
    texts = tuple(_decode(caption, sample.key) for caption in captions)
    if not all(html.unescape(text).strip() for text in texts):
        raise BadSample("empty_caption", sample.key)
    return texts


def _decode(caption: Any, key: str) -> str:
    if isinstance(caption, bytes):
        try:
            return caption.decode()
        except UnicodeDecodeError as error:
            raise BadSample("broken_caption", key, str(error)) from error
    if not isinstance(caption, str):
        raise BadSample("broken_caption", key, f"{type(caption).__name__} instead of a text")
    try:
        caption.encode()  # lone surrogates, which JSON can hold, are no text
    except UnicodeEncodeError as error:
        raise BadSample("broken_caption", key, str(error)) from error
    return caption

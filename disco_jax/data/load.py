"""Loads one sample of the stream: reads, decodes, draws a caption, and replaces a bad sample."""

import hashlib
import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.random import Generator

from disco_jax.data.colors import ColorChanges, change_colors
from disco_jax.data.source import MAX_TEXT_BYTES, BadSample, ByKey, Failure, Joined, Sample
from disco_jax.data.stored_features import StoredFeatures
from disco_jax.data.transforms import (
    CLIP_RESIZE,
    ImageLimits,
    Look,
    Resize,
    open_image,
    to_pixels,
    to_random_pixels,
)
from disco_jax.errors import UserError

ReadSample = Callable[[int], Sample]

TRIES = 100  # samples tried for one position before the run stops
NEAR = 10  # of these, those drawn from what is read along with it: it may be all in one bad shard
_REPLACEMENT = 1  # separates its random stream from the sample's own


class Loaded(NamedTuple):
    """A sample ready to be batched."""

    key: str
    pixels: np.ndarray  # uint8 [size, size, 3]
    captions: tuple[str, ...]  # in training, only the one drawn
    label: int | None
    image_name: str | None  # equal for samples that share an image; None: not shared
    failures: tuple[Failure, ...]  # the bad samples that it replaces
    image_hash: np.ndarray | None = None  # uint32 [2], of the encoded image; None: not wanted
    teacher: tuple[np.ndarray, np.ndarray] | None = None  # its stored features; None: not wanted


class Load:
    """Loads samples of a source, with all randomness derived from the seed and the position.

    A sample is therefore the same for any number of workers and processes and after a restart, and
    replacing a bad sample does not shift the others.
    """

    def __init__(
        self,
        source: Joined,
        data: ConfigDict,
        size: int,
        seed: int = 0,
        resize: Resize = CLIP_RESIZE,
        hash_images: bool = False,
        teacher: StoredFeatures | None = None,
    ):
        self._hash_images, self._teacher = hash_images, teacher
        self._source, self._size, self._seed, self._resize = source, size, seed, resize
        self._least_area = data.crop_scale
        self._by_line = data.captions_by_line
        keys = len(data.caption_key.split("::"))
        self._weights = tuple(data.caption_weights) or (1.0,) * keys
        self._changes = ColorChanges(*(data[name] for name in ColorChanges._fields))
        self._look = Look(*(data[name] for name in Look._fields))
        self._limits = ImageLimits(*(data[name] for name in ImageLimits._fields))

    def train(
        self,
        position: int,
        index: int,
        near: Callable[[int], Sequence[range]] = lambda position: (),
        read: ReadSample | None = None,
    ) -> Loaded:
        """Loads sample `index` of the source for a stream position, or a replacement if it is bad.

        Args:
          position: the position, which seeds the crop, the colors and the choice of the caption.
          index: the sample at this position.
          near: returns the indices from which a replacement is preferably drawn.
          read: reads a sample or one near it; the source does by default.

        Raises:
          UserError: if `TRIES` samples in a row are bad.
        """
        failures: list[Failure] = []
        drawn = index
        for attempt in range(TRIES):
            at_hand = read if attempt <= NEAR else None
            try:
                loaded = self.once(position, drawn, attempt, at_hand)
                return loaded._replace(failures=tuple(failures))
            except BadSample as bad:
                failures.append((bad.kind, bad.key, bad.detail))
            ranges = (near(position) if attempt < NEAR else ()) or [self._part(index)]
            drawn = self._another(ranges, position, attempt)
        kind, key, detail = failures[0]
        raise UserError(
            f"data.name: {TRIES} samples drawn in a row are bad; the first is {key}: "
            f"{kind} {detail}".rstrip()
        )

    def once(
        self, position: int, index: int, attempt: int = 0, read: ReadSample | None = None
    ) -> Loaded:
        """Like `train`, but raises BadSample instead of drawing a replacement."""
        rng = np.random.default_rng((self._seed, position, attempt))
        sample = read(index) if read else self._source[index]
        captions = self._drawn(sample, rng)
        pixels = self._pixels(sample, rng)
        hashed = hash_of(sample.image) if self._hash_images else None
        taught = self._teacher[index] if self._teacher else None
        return Loaded(sample.key, pixels, captions, _index(sample), None, (), hashed, taught)

    def evaluate(self, index: int) -> Loaded:
        """Loads sample `index` with the evaluation transform and all of its captions.

        Raises:
          BadSample: if the sample can't be used.
        """
        sample = self._source[index]
        image = open_image(sample.image, self._limits, sample.key)
        pixels = to_pixels(image, self._size, sample.key, self._resize, self._look)
        captions = usable_captions(sample, self._by_line)
        return Loaded(sample.key, pixels, captions, _index(sample), sample.image_name, ())

    def _drawn(self, sample: Sample, rng: Generator) -> tuple[str, ...]:
        """Draws one of the captions, of several keys by their weights; empty if none are read.

        With stored features, it is always the first, which they are of.
        """
        if self._teacher:
            return usable_captions(sample, self._by_line)[:1]
        if not isinstance(sample.captions, ByKey):
            captions = usable_captions(sample, self._by_line)
        else:
            found = captions_by_key(sample, self._by_line)
            weights = np.array([w if f else 0 for w, f in zip(self._weights, found, strict=True)])
            captions = found[int(rng.choice(len(found), p=weights / weights.sum()))]
        return (captions[int(rng.integers(len(captions)))],) if len(captions) > 1 else captions

    def _pixels(self, sample: Sample, rng: Generator) -> np.ndarray:
        return change_colors(self._cropped(sample, rng), self._changes, rng)

    def _cropped(self, sample: Sample, rng: Generator) -> np.ndarray:
        image = open_image(sample.image, self._limits, sample.key)
        if self._least_area < 1:
            return to_random_pixels(
                image,
                self._size,
                self._least_area,
                rng,
                sample.key,
                self._resize.resample,
                self._look,
            )
        return to_pixels(image, self._size, sample.key, self._resize, self._look)

    def _part(self, index: int) -> range:
        """Returns the joined source of a sample; drawing from it preserves the mixing weights."""
        part = self._source.part(index)
        return range(self._source.starts[part], self._source.starts[part + 1])

    def _another(self, ranges: Sequence[range], position: int, attempt: int) -> int:
        """Draws an index from the ranges."""
        rng = np.random.default_rng((self._seed, position, attempt, _REPLACEMENT))
        drawn = int(rng.integers(sum(map(len, ranges))))
        for indices in ranges:
            if drawn < len(indices):
                break
            drawn -= len(indices)
        return indices[drawn]


def hash_of(image: bytes) -> np.ndarray:
    """Returns uint32 `[2]`, a 64-bit hash of an encoded image."""
    return np.frombuffer(hashlib.blake2b(image, digest_size=8).digest(), np.uint32)


def _index(sample: Sample) -> int | None:
    return sample.label if isinstance(sample.label, int) else None


def usable_captions(sample: Sample, by_line: bool = False) -> tuple[str, ...]:
    """Returns the sample's captions; empty if its source does not read captions.

    Empty captions are left out if there are others. With `by_line`, each line is a caption.

    Raises:
      BadSample: if captions are missing, all are empty, or one is too large or not text.
    """
    if sample.captions is None:
        return ()
    if isinstance(sample.captions, ByKey):
        return tuple(caption for found in captions_by_key(sample, by_line) for caption in found)
    several = isinstance(sample.captions, Sequence) and not isinstance(sample.captions, str | bytes)
    captions: Sequence[Any] = sample.captions if several else [sample.captions]
    if not captions:
        raise BadSample("missing_caption", sample.key)
    for caption in captions:
        if isinstance(caption, str | bytes) and len(caption) > MAX_TEXT_BYTES:
            raise BadSample("too_large", sample.key, f"a caption of length {len(caption):,}")
    texts = [_decode(caption, sample.key) for caption in captions if caption is not None]
    if by_line:
        texts = [line.strip() for text in texts for line in text.splitlines()]
    usable = tuple(text for text in texts if html.unescape(text).strip())
    if not usable:
        raise BadSample("empty_caption", sample.key)
    return usable


def captions_by_key(sample: Sample, by_line: bool = False) -> list[tuple[str, ...]]:
    """Returns the usable captions of each key of a sample with several; empty where there is none.

    Raises:
      BadSample: as `usable_captions`, if no key has a usable caption.
    """
    assert isinstance(sample.captions, ByKey)
    found: list[tuple[str, ...]] = []
    failures = []
    for captions in sample.captions.captions:
        try:
            one = () if captions is None else captions
            found.append(usable_captions(sample._replace(captions=one), by_line))
        except BadSample as bad:
            found.append(())
            failures.append(bad)
    if len(failures) == len(found):
        raise failures[0]
    return found


def _decode(caption: Any, key: str) -> str:
    if isinstance(caption, bytes):
        try:
            return caption.decode()
        except UnicodeDecodeError as error:
            raise BadSample("broken_caption", key, str(error)) from error
    if not isinstance(caption, str):
        raise BadSample("broken_caption", key, f"{type(caption).__name__} instead of text")
    try:
        caption.encode()  # fails for lone surrogates, which JSON can contain
    except UnicodeEncodeError as error:
        raise BadSample("broken_caption", key, str(error)) from error
    return caption

"""What every source of samples gives: a length, samples by number, and errors that name a kind."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

Caption = str | bytes


class Sample(NamedTuple):
    """One image as it is stored, with what is told about it."""

    key: str  # names the sample for a person: shard and key, path, or split and number
    image: bytes  # encoded
    captions: Caption | Sequence[Caption] | None = None  # one, or several to draw from
    label: int | None = None
    image_name: str | None = None  # equal for samples of one and the same image; None: of its own


# What is larger is not read.
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20


class BadSample(Exception):
    """A sample that can't be used. `kind` is one of KINDS, `key` names it, `detail` says more."""

    def __init__(self, kind: str, key: str, detail: str = ""):
        super().__init__(kind, key, detail)
        self.kind, self.key, self.detail = kind, key, detail


# What can be wrong, and what it means. The first five are found when tar shards are indexed, the
# sixth there or when a sample is read.
KINDS = {
    "truncated_shard": "a shard that ends in the middle of a member; what is before it counts",
    "damaged_shard": "a shard with a broken header; what is before it counts",
    "duplicate_key": "a second member of the same key and kind; the first one counts",
    "missing_image": "a caption without an image",
    "not_a_file": "a link, device or the like, which is never followed",
    "too_large": "an image of more than 256 MiB, a text of more than 1 MiB",
    "unreadable": "a shard or file that is gone, changed or can't be read",
    "empty_image": "an image of no bytes",
    "not_an_image": "bytes that are no JPEG, PNG or WebP",
    "broken_image": "an image that ends too early, or is damaged inside",
    "too_many_pixels": "an image above data.max_image_pixels: a decompression bomb",
    "too_small": "an image with a side below data.min_image_side",
    "too_elongated": "an image above data.max_aspect_ratio",
    "missing_caption": "an image without a caption",
    "empty_caption": "a caption of no characters but white space",
    "broken_caption": "a caption that is not UTF-8, not JSON, or not text",
}


class Source(Protocol):
    """Samples by number, from 0 to `len(source)`; the same number is always the same sample."""

    # Tells this data from other data: a run goes on only with what it began with.
    fingerprint: str
    # What is wrong already before any sample is read, by kind.
    problems: Counter[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Raises BadSample where it can't be read."""
        ...


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.starts = [0]
        for source in sources:
            self.starts.append(self.starts[-1] + len(source))
        self.fingerprint = " + ".join(source.fingerprint for source in sources)
        self.problems = sum((source.problems for source in sources), Counter())

    def __len__(self) -> int:
        return self.starts[-1]

    def part(self, index: int) -> int:
        """Which of the sources the sample `index` is of."""
        return next(i for i, stop in enumerate(self.starts[1:]) if index < stop)

    def __getitem__(self, index: int) -> Sample:
        part = self.part(index)
        return self.sources[part][index - self.starts[part]]

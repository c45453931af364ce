"""The interface of sample sources: a length, samples by index, and kinds of bad samples."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

Caption = str | bytes


class Sample(NamedTuple):
    """One encoded image with its captions or label."""

    key: str  # identifies it to people: shard and key, path, or split and index
    image: bytes  # encoded
    captions: Caption | Sequence[Caption] | None = None  # one or several; training draws one
    label: int | None = None
    image_name: str | None = None  # equal for samples that share an image; None: not shared


# Larger images and texts are not read.
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20


class BadSample(Exception):
    """A sample that can't be used: its kind (one of KINDS), its key and further detail."""

    def __init__(self, kind: str, key: str, detail: str = ""):
        super().__init__(kind, key, detail)
        self.kind, self.key, self.detail = kind, key, detail


# The kinds of bad samples and their meaning. The first five are found when tar shards are indexed,
# the sixth then or when a sample is read.
KINDS = {
    "truncated_shard": "a shard that ends inside a member; the members before it are used",
    "damaged_shard": "a shard with a broken header; the members before it are used",
    "duplicate_key": "a second member with the same key and kind; the first one is used",
    "missing_image": "a caption without an image",
    "not_a_file": "a link, device or similar, which is never followed",
    "too_large": "an image larger than 256 MiB or a text larger than 1 MiB",
    "unreadable": "a shard or file that is missing, has changed or can't be read",
    "empty_image": "an image of zero bytes",
    "not_an_image": "bytes that are not a JPEG, PNG or WebP",
    "broken_image": "an image that is truncated or damaged",
    "too_many_pixels": "an image above data.max_image_pixels: a decompression bomb",
    "too_small": "an image with a side below data.min_image_side",
    "too_elongated": "an image above data.max_aspect_ratio",
    "missing_caption": "an image without a caption",
    "empty_caption": "a caption that is only whitespace",
    "broken_caption": "a caption that is not UTF-8, not JSON or not text",
}


class Source(Protocol):
    """Samples by index, below `len(source)`; an index always gives the same sample."""

    # Identifies the data: a run resumes only with the data that it was started with.
    fingerprint: str
    # Problems found before any sample is read, counted by kind.
    problems: Counter[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Returns a sample; raises BadSample if it can't be used."""
        ...


class Joined:
    """Concatenation of several sources."""

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
        """Returns the number of the source that sample `index` belongs to."""
        return next(i for i, stop in enumerate(self.starts[1:]) if index < stop)

    def __getitem__(self, index: int) -> Sample:
        part = self.part(index)
        return self.sources[part][index - self.starts[part]]

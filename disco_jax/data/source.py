"""The interface of sample sources: a length, samples by index, and kinds of bad samples."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

Caption = str | bytes
Failure = tuple[str, str, str]  # kind, key and detail of a bad sample
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp")


class ByKey(NamedTuple):
    """The captions of a sample under each of several keys; None where there is none."""

    captions: tuple[Caption | Sequence[Caption] | None, ...]


class Sample(NamedTuple):
    """One encoded image with its captions or label."""

    key: str  # identifies it to people: shard and key, path, or split and index
    image: bytes  # encoded
    captions: Caption | Sequence[Caption] | ByKey | None = None  # training draws one
    # A class index, or what stands in a `.cls` instead if the source has no list of classes.
    label: int | str | None = None
    image_name: str | None = None  # equal for samples that share an image; None: not shared


# Larger images and texts are not read.
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20


class BadSample(Exception):
    """A sample that can't be used: its kind (one of KINDS), its key and further detail."""

    def __init__(self, kind: str, key: str, detail: str = ""):
        super().__init__(kind, key, detail)
        self.kind, self.key, self.detail = kind, key, detail


# The kinds of bad samples and their meaning. Those up to `not_a_file` are found when a source is
# opened, `too_large` and `missing_image` then or when a sample is read.
KINDS = {
    "empty_shard": "a shard of zero bytes",
    "compressed_shard": "a shard compressed by gzip, bzip2, xz, zstd or zip; decompress it first",
    "truncated_shard": "a shard that ends inside a member; the members before it are used",
    "damaged_shard": "a shard with a broken header; the members before it are used",
    "broken_row": "a row of a table with more or fewer columns than the header",
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
    "empty_caption": "a caption that is only whitespace, and there is no other",
    "broken_caption": "a caption that is not UTF-8, not JSON or not text",
    "missing_label": "an image of a labeled set without a label",
    "broken_label": "a label that is neither a class index nor the name of a class",
}


def describe(counts: Counter[str]) -> str:
    """Returns e.g. `3 broken_image, 1 empty_caption`, with the most common kind first."""
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


class Source(Protocol):
    """Samples by index, below `len(source)`; an index always gives the same sample.

    A source whose reads take long to begin, as over a network, has the attribute `remote = True`.
    """

    # Identifies the data: a run resumes only with the data that it was started with.
    fingerprint: str
    # Problems found before any sample is read, counted by kind.
    problems: Counter[str]

    def __len__(self) -> int: ...

    def left_out(self) -> list[Failure]:
        """Returns what `problems` counts, each with the most exact place that is known."""
        ...

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
        self.remote = any(getattr(source, "remote", False) for source in sources)

    def __len__(self) -> int:
        return self.starts[-1]

    def left_out(self) -> list[Failure]:
        """Returns what all the sources left out."""
        return [failure for source in self.sources for failure in source.left_out()]

    def part(self, index: int) -> int:
        """Returns the number of the source that sample `index` belongs to."""
        return next(i for i, stop in enumerate(self.starts[1:]) if index < stop)

    def __getitem__(self, index: int) -> Sample:
        part = self.part(index)
        return self.sources[part][index - self.starts[part]]

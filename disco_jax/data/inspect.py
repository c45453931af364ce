"""Reports what a source contains and what is wrong with it.

  disco-jax inspect '/data/*.tar'
  disco-jax inspect pairs.csv --samples=0 --caption_key=title

Prints sample counts, image sizes, caption lengths with the `model.text_groups` that suit them, bad
samples by kind, the reading speed and the libraries that it depends on, draws a contact sheet of
samples, and lists all bad samples in a file.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from ml_collections import ConfigDict
from PIL import features
from rich.progress import track
from rich.table import Table

from disco_jax.data.arguments import add_source, source_config
from disco_jax.data.bad_samples import list_bad
from disco_jax.data.load import Load, Loaded, ReadSample
from disco_jax.data.source import BadSample, Failure, Joined, Sample, describe
from disco_jax.data.sources import open_source
from disco_jax.data.tar_source import TarSource
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.data.transforms import ImageLimits, open_image
from disco_jax.display.terminal import PlainConsole, say
from disco_jax.errors import UserError
from disco_jax.models.group_choice import choose_text_groups
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard

SHOWN = 32  # samples on the contact sheet
CONTEXT = 77
TEXTS = 256  # on a device at once, for which groups are proposed
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")  # of the contact sheet


class Seen(NamedTuple):
    """What was found in the samples that were read."""

    sizes: list[tuple[int, int]]  # width and height of the stored images
    formats: Counter[str]
    bytes: list[int]  # sizes of the encoded images
    captions: list[str]
    bad: list[Failure]
    shown: list[Loaded]
    seconds: float  # spent loading, in one process


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    add_source(parser)
    parser.add_argument(
        "--samples",
        type=int,
        default=2_000,
        help="number to read, evenly spaced; 0: all; default: %(default)s",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        default=Path("contact_sheet.png"),
        help="file for the contact sheet; default: %(default)s",
    )
    parser.add_argument(
        "--bad",
        type=Path,
        default=Path("inspect_bad_samples.jsonl"),
        help="file for the bad samples, if there are any; default: %(default)s",
    )
    parser.add_argument(
        "--image_size", type=int, default=224, help="pixels to resize to; default: %(default)s"
    )
    return parser.parse_args()


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the table, draws the contact sheet and lists the bad samples.

    Raises:
      UserError: if there is nothing to read, or the contact sheet or the list can't be written.
    """
    data = source_config(arguments)
    for name in ("sheet", "bad"):
        _check_place(name, getattr(arguments, name))
    start = time.monotonic()
    source = open_source(data, arguments.name, arguments.split)
    opened = time.monotonic() - start
    seen = look(source, data, arguments.image_size, arguments.samples or len(source))
    PlainConsole().print(_table(arguments.name, source, seen, opened))
    list_bad(source.left_out() + seen.bad, arguments.bad)
    if seen.shown:
        from disco_jax.display.plots import plot_pairs  # lazy: Matplotlib takes a second to import

        captions = [" / ".join(sample.captions) for sample in seen.shown]
        plot_pairs([sample.pixels for sample in seen.shown], captions, arguments.sheet)
        say(f"wrote the contact sheet to {arguments.sheet}")


def _check_place(name: str, path: Path) -> None:
    """Raises UserError if no file can be written there, before anything is read."""
    if path.is_dir():
        raise UserError(f"--{name}: {path} is a folder; name a file in it")
    if name == "sheet" and path.suffix.lower() not in FORMATS:
        raise UserError(f"--sheet: {path} must end in one of {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{name}: {path} can't be written: {error.strerror}") from error


def look(source: Joined, data: ConfigDict, image_size: int, samples: int) -> Seen:
    """Loads `samples` samples, evenly spaced over the source, the way training does."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).astype(int))
    shown = set(chosen[np.linspace(0, len(chosen) - 1, SHOWN).astype(int)].tolist())
    load = Load(source, data, image_size)
    limits = ImageLimits(*(data[name] for name in ImageLimits._fields))
    seen = Seen([], Counter(), [], [], [], [], 0.0)
    seconds = 0.0
    for index in track(chosen.tolist(), "reading samples", transient=True):
        start = time.monotonic()
        try:
            sample = source[index]
            image = open_image(sample.image, limits, sample.key)
            seen.sizes.append(image.size)
            seen.formats[image.format or ""] += 1
            seen.bytes.append(len(sample.image))
            loaded = load.once(index, index, read=_given(sample))
            seconds += time.monotonic() - start
        except BadSample as bad:
            seen.bad.append((bad.kind, bad.key, bad.detail))
            continue
        seen.captions.append(" / ".join(loaded.captions))
        if index in shown:
            seen.shown.append(loaded)
    return seen._replace(seconds=seconds)


def _given(sample: Sample) -> ReadSample:
    """Returns a function that reads a sample which has been read."""
    return lambda _: sample


def _table(name: str, source: Joined, seen: Seen, opened: float) -> Table:
    good, bad = len(seen.captions), len(seen.bad)
    kinds = Counter(kind for kind, _, _ in seen.bad)
    shards = [part for part in source.sources if isinstance(part, TarSource)]
    ignored = sum((part.ignored for part in shards), Counter())
    table = Table(title=f"{name}: {good + bad:,} of {len(source):,} samples read")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("samples", f"{len(source):,}")
    table.add_row("source fingerprint", source.fingerprint)
    table.add_row("time to open", f"{opened:.1f} s")
    table.add_row("left out of the index", describe(source.problems) or "nothing")
    if ignored:
        table.add_row("members that are not read, by extension", describe(ignored))
    table.add_row("bad samples", describe(kinds) or "none")
    if seen.sizes:
        widths, heights = np.array(seen.sizes).T
        for what, values in (("width", widths), ("height", heights), ("bytes", seen.bytes)):
            table.add_row(f"image {what}: min, median, max", _spread(values))
        table.add_row("formats", describe(seen.formats))
    if good:
        tokens = np.array([len(ids) for ids in CLIPTokenizer(CONTEXT).ids(seen.captions)])
        table.add_row("caption characters", _spread([len(text) for text in seen.captions]))
        table.add_row("caption tokens", _spread(tokens))
        table.add_row(f"truncated at {CONTEXT} tokens", f"{np.mean(tokens > CONTEXT):.1%}")
        table.add_row("caption tokens: 50, 90, 99 %", _percentiles(tokens))
        groups = choose_text_groups(np.minimum(tokens, CONTEXT), TEXTS, CONTEXT)
        table.add_row(f"model.text_groups for {TEXTS} texts a device", groups or '""')
        table.add_row("distinct captions", f"{len(set(seen.captions)) / good:.1%}")
        table.add_row("images/s, one process", f"{good / max(seen.seconds, 1e-9):,.0f}")
        for what, library in image_libraries().items():
            table.add_row(what, library)
    return table


def image_libraries() -> dict[str, str]:
    """Returns the names and versions of what decodes and resizes images, by what it does."""
    pillow = "pillow-simd" if ".post" in PIL.__version__ else "Pillow"  # as no Pillow is numbered
    webp = "" if features.check("webp") else ", without WebP"
    turbo = features.version("libjpeg_turbo")
    jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}, not turbo"
    return {"images resized by": f"{pillow} {PIL.__version__}{webp}", "JPEGs decoded by": jpeg}


def _spread(values: np.ndarray | list[int]) -> str:
    return f"{np.min(values):,}, {np.median(values):,.0f}, {np.max(values):,}"


def _percentiles(values: np.ndarray) -> str:
    return ", ".join(f"{x:,.0f}" for x in np.percentile(values, (50, 90, 99)))


def main() -> None:
    """Parses the command line and runs the command; a mistake exits with 2."""
    guard(lambda: inspect(parse_arguments()))


if __name__ == "__main__":
    main()

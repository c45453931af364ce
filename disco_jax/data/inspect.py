"""Summarizes a source: python -m disco_jax.data.inspect 'shards/*.tar' [--caption_key=txt].

Prints sample counts, image sizes, caption lengths with the `model.text_groups` that suit them, bad
samples by kind and the reading speed, and draws a contact sheet of samples.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from rich.progress import track
from rich.table import Table

from disco_jax import config
from disco_jax.data.bad_samples import describe
from disco_jax.data.load import Load, Loaded
from disco_jax.data.source import KINDS, BadSample, Joined
from disco_jax.data.sources import open_source
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.data.transforms import ImageLimits, open_image
from disco_jax.display.terminal import PlainConsole, say
from disco_jax.models.group_choice import choose_text_groups
from disco_jax.processes.cli import guard

SHOWN = 32  # samples on the contact sheet
CONTEXT = 77
TEXTS = 256  # on a device at once, for which groups are proposed


class Seen(NamedTuple):
    """What was found in the samples that were read."""

    sizes: list[tuple[int, int]]  # width and height of the stored images
    formats: Counter[str]
    bytes: list[int]  # sizes of the encoded images
    captions: list[str]
    bad: Counter[str]
    examples: dict[str, str]  # the first bad sample of each kind
    shown: list[Loaded]
    seconds: float  # spent loading, in one process


def parse_arguments() -> argparse.Namespace:
    """Parses the command line. The defaults are those of `config.data`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="shards, a table or a TFDS dataset, as in config.data.name")
    parser.add_argument("--samples", type=int, default=2_000, help="number to read, evenly spaced")
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--split", default="train", help="split of a TFDS dataset")
    parser.add_argument("--dir", default="data", help="where TFDS datasets are stored")
    parser.add_argument("--image_key", default="image")
    parser.add_argument("--caption_key", help="default: txt for shards, else caption")
    return parser.parse_args()


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the table and draws the contact sheet.

    Raises:
      UserError: if there is nothing to read.
    """
    data = config.default().data
    data.update(dir=arguments.dir, image_key=arguments.image_key)
    default_key = "txt" if arguments.name.endswith(".tar") else "caption"
    data.caption_key = arguments.caption_key or default_key
    start = time.monotonic()
    source = open_source(data, arguments.name, arguments.split)
    opened = time.monotonic() - start
    seen = look(source, data, arguments.image_size, arguments.samples)
    PlainConsole().print(_table(arguments.name, source, seen, opened))
    for kind, example in sorted(seen.examples.items()):
        say(f"{kind}: {KINDS[kind]}; {example}")
    if seen.shown:
        from disco_jax.display.plots import plot_pairs  # lazy: Matplotlib takes a second to import

        captions = [" / ".join(sample.captions) for sample in seen.shown]
        plot_pairs([sample.pixels for sample in seen.shown], captions, arguments.sheet)
        say(f"wrote the contact sheet to {arguments.sheet}")


def look(source: Joined, data: ConfigDict, image_size: int, samples: int) -> Seen:
    """Loads `samples` samples, evenly spaced over the source, the way training does."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).astype(int))
    shown = set(chosen[np.linspace(0, len(chosen) - 1, SHOWN).astype(int)].tolist())
    load = Load(source, data, image_size)
    limits = ImageLimits(*(data[name] for name in ImageLimits._fields))
    seen = Seen([], Counter(), [], [], Counter(), {}, [], 0.0)
    seconds = 0.0
    for index in track(chosen.tolist(), "reading samples", transient=True):
        try:
            sample = source[index]
            image = open_image(sample.image, limits, sample.key)
            seen.sizes.append(image.size)
            seen.formats[image.format or ""] += 1
            seen.bytes.append(len(sample.image))
            start = time.monotonic()
            loaded = load.once(index, index)
            seconds += time.monotonic() - start
        except BadSample as bad:
            seen.bad[bad.kind] += 1
            seen.examples.setdefault(bad.kind, f"{bad.key}: {bad.detail}".rstrip(": "))
            continue
        seen.captions.append(" / ".join(loaded.captions))
        if index in shown:
            seen.shown.append(loaded)
    return seen._replace(seconds=seconds)


def _table(name: str, source: Joined, seen: Seen, opened: float) -> Table:
    good, bad = len(seen.captions), seen.bad.total()
    table = Table(title=f"{name}: {good + bad:,} of {len(source):,} samples read")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("samples", f"{len(source):,}")
    table.add_row("source fingerprint", source.fingerprint)
    table.add_row("time to open", f"{opened:.1f} s")
    table.add_row("left out of the index", describe(source.problems) or "nothing")
    table.add_row("bad samples", describe(seen.bad) or "none")
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
    return table


def _spread(values: np.ndarray | list[int]) -> str:
    return f"{np.min(values):,}, {np.median(values):,.0f}, {np.max(values):,}"


def _percentiles(values: np.ndarray) -> str:
    return ", ".join(f"{x:,.0f}" for x in np.percentile(values, (50, 90, 99)))


if __name__ == "__main__":
    guard(lambda: inspect(parse_arguments()))

"""Writes a source as tar shards: python -m disco_jax.data.make_tars shapes --split=train --out=DIR.

Samples keep the source's order. Each one becomes `000000000.png`, `.txt` and, if it has a label,
`.cls`: the format that img2dataset writes and webdataset reads. If a sample has several captions,
they are stored in its `.json`, under `captions`.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from rich.progress import track

from disco_jax import config
from disco_jax.data.source import BadSample, Sample
from disco_jax.data.sources import open_source
from disco_jax.data.transforms import read_header
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.cli import guard


def parse_arguments() -> argparse.Namespace:
    """Parses the command line. The defaults are those of `config.data`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="a source, as in config.data.name, e.g. shapes")
    parser.add_argument("--out", type=Path, required=True, help="output folder, without any shards")
    parser.add_argument("--split", default="train")
    parser.add_argument("--samples", type=int, default=1_000, help="samples per shard")
    parser.add_argument("--dir", default="data", help="where TFDS datasets are stored")
    parser.add_argument("--image_key", default="image")
    parser.add_argument("--caption_key", default="caption")
    return parser.parse_args()


def write_shards(arguments: argparse.Namespace) -> None:
    """Writes the shards. Existing shards are never overwritten.

    Raises:
      UserError: if the output folder already holds shards.
    """
    data = config.default().data
    data.update(dir=arguments.dir, image_key=arguments.image_key, caption_key=arguments.caption_key)
    source = open_source(data, arguments.name, arguments.split)
    if arguments.out.exists() and any(arguments.out.glob("*.tar")):
        raise UserError(f"--out: {arguments.out} already holds shards; use an empty folder")
    arguments.out.mkdir(parents=True, exist_ok=True)
    bad = 0
    starts = range(0, len(source), arguments.samples)
    for number, start in enumerate(track(starts, "writing shards", transient=True)):
        with tarfile.open(arguments.out / f"{number:05}.tar", "w") as tar:
            for index in range(start, min(start + arguments.samples, len(source))):
                try:
                    _add(tar, index, source[index])
                except BadSample:
                    bad += 1
    say(f"wrote {len(source) - bad} samples in {len(starts)} shards to {arguments.out}; {bad} bad")


def _add(tar: tarfile.TarFile, index: int, sample: Sample) -> None:
    image = read_header(sample.image, sample.key)
    parts = {(image.format or "").lower().replace("jpeg", "jpg"): sample.image}
    if isinstance(sample.captions, str | bytes):
        text = sample.captions
        parts["txt"] = text.encode() if isinstance(text, str) else text
    elif sample.captions is not None:
        texts = [t.decode(errors="replace") if isinstance(t, bytes) else t for t in sample.captions]
        parts["json"] = json.dumps({"captions": texts}).encode()
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    for extension, content in parts.items():
        member = tarfile.TarInfo(f"{index:09}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    guard(lambda: write_shards(parse_arguments()))

"""Writes a source as tar shards.

  disco-jax make_tars shapes --split=train --out=data/shapes-tars
  disco-jax make_tars pairs.csv --out=s3://bucket/pairs

The output is a folder or a URL such as s3://bucket/name. Samples keep the source's order. Bad ones
are left out and listed in `bad_samples.jsonl`, if there are any, with the reason. Each one becomes
`000000000.png`, `.txt` and, if it has a label, `.cls`: the format that img2dataset writes and
webdataset reads. If a sample has several captions, they are stored in its `.json`, under
`captions`.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import track

from disco_jax.data.arguments import add_source, source_config
from disco_jax.data.bad_samples import list_bad
from disco_jax.data.load import usable_captions
from disco_jax.data.source import BadSample, Failure, Sample
from disco_jax.data.sources import open_source
from disco_jax.data.transforms import read_header
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.storage import stores
from disco_jax.storage.urls import Place, Url, check_scheme, place

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # by Pillow's format
BUFFER = 1 << 20  # bytes written at once to a remote shard


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    add_source(parser)
    parser.add_argument("--out", required=True, help="output folder or URL, without any shards")
    parser.add_argument(
        "--samples", type=int, default=1_000, help="samples per shard; default: %(default)s"
    )
    return parser.parse_args()


def write_shards(arguments: argparse.Namespace) -> None:
    """Writes the shards. Existing shards are never overwritten.

    Raises:
      UserError: if the output folder already holds shards.
    """
    out, names = _output(arguments.out)
    source = open_source(source_config(arguments), arguments.name, arguments.split)
    if any(name.endswith(".tar") for name in names):
        raise UserError(f"--out: {out} already holds shards; use an empty folder")
    listed = out / "bad_samples.jsonl"
    if listed.name in names:
        raise UserError(f"--out: {listed} already exists; use an empty folder")
    if isinstance(out, Path):
        out.mkdir(parents=True, exist_ok=True)
    bad: list[Failure] = []
    starts = range(0, len(source), arguments.samples)
    for number, start in enumerate(track(starts, "writing shards", transient=True)):
        with _opened(out / f"{number:05}.tar") as tar:
            for index in range(start, min(start + arguments.samples, len(source))):
                try:
                    _add(tar, index, source[index])
                except BadSample as error:
                    bad.append((error.kind, error.key, error.detail))
    count = len(source) - len(bad)
    say(f"wrote {count} samples in {len(starts)} shards to {out}; {len(bad)} bad")
    list_bad(source.left_out() + bad, listed)


def _output(name: str) -> tuple[Place, set[str]]:
    """Returns the output folder and the names of the files in it, if it exists."""
    try:
        out = place(name.rstrip("/") if check_scheme(name) else name)
        if isinstance(out, Url):
            return out, {url.name for url in stores.listing(out)}
    except UserError as error:
        raise UserError(f"--out: {error}") from error
    return out, {path.name for path in out.iterdir()} if out.is_dir() else set()


@contextmanager
def _opened(shard: Place) -> Iterator[tarfile.TarFile]:
    if not isinstance(shard, Url):
        with tarfile.open(shard, "w") as tar:
            yield tar
        return
    with stores.writer(shard) as file, tarfile.open(fileobj=file, mode="w|", bufsize=BUFFER) as tar:
        yield tar


def _add(tar: tarfile.TarFile, index: int, sample: Sample) -> None:
    image = read_header(sample.image, sample.key)
    parts = {EXTENSIONS[image.format or ""]: sample.image}
    texts = usable_captions(sample)
    if isinstance(sample.captions, str | bytes):
        parts["txt"] = texts[0].encode()
    elif texts:
        parts["json"] = json.dumps({"captions": texts}).encode()
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode(errors="surrogateescape")
    for extension, content in parts.items():
        member = tarfile.TarInfo(f"{index:09}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def main() -> None:
    """Parses the command line and runs the command; a mistake exits with 2."""
    guard(lambda: write_shards(parse_arguments()))


if __name__ == "__main__":
    main()

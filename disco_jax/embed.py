"""Writes the features of many images to a file.

  disco-jax embed runs/shapes --images='photos/**/*.jpg' --out=embeddings.npz
  disco-jax embed models/b32 --images='gs://bucket/*.png' --out=embeddings.npz

The output holds `features`, fp32 `[n, embed_dim]` of unit length, and `paths`, in the same order.
Images that can't be read are reported and skipped.
"""

import argparse
import glob
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.progress import track

from disco_jax.data.patterns import existing_part, expand_braces
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.storage import stores
from disco_jax.storage.urls import check_scheme


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a model folder or a run's workdir, or its URL")
    parser.add_argument(
        "--images", required=True, help="a pattern of globs and braces; ** matches subfolders"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to create")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images encoded at once; default: %(default)s"
    )
    return parser.parse_args()


def embed(arguments: argparse.Namespace) -> None:
    """Writes the features of all matching images.

    Raises:
      UserError: if there is no model or no image, or the output file already exists.
    """
    paths: set[str] = set()
    try:
        for name in expand_braces(arguments.images):
            paths.update(_matches(name))
    except UserError as error:
        raise UserError(f"--images: {error}") from error
    if not paths:
        raise UserError(f"--images: no file matches {arguments.images}")
    if arguments.out.suffix != ".npz" or arguments.out.exists():
        raise UserError(f"--out: {arguments.out} must be a new .npz file")
    # Write to a temporary file and rename it. Open it now, so that a bad path fails right away and
    # not after hours of work.
    unfinished = arguments.out.with_name(arguments.out.name + ".unfinished")
    try:
        file = unfinished.open("xb")
    except OSError as error:
        raise UserError(f"--out: {unfinished} can't be written: {error.strerror}") from error
    try:
        with file:
            count = _embed_into(file, arguments, sorted(paths))
        unfinished.rename(arguments.out)
    finally:
        unfinished.unlink(missing_ok=True)
    say(f"wrote {count} features to {arguments.out}")


def _matches(name: str) -> list[str]:
    """Returns the files, or the objects of a bucket, that match a name with globs."""
    if check_scheme(name):
        return list(stores.glob(name)) if glob.has_magic(name) else [name]
    folder, rest = existing_part(name)
    found = glob.glob(rest, root_dir=folder, recursive=True) if rest else [""]  # noqa: PTH207
    return [str(folder / match) for match in found]


def _embed_into(file: BinaryIO, arguments: argparse.Namespace, paths: list[str]) -> int:
    """Writes the features and paths of all readable images, and returns how many there are."""
    from disco_jax.inference import load  # lazy: --help needs no JAX

    model = load(arguments.model, arguments.batch_size)
    features: list[np.ndarray] = []
    kept: list[str] = []
    starts = range(0, len(paths), model.batch_size)
    for start in track(starts, "embedding", transient=True, disable=not sys.stderr.isatty()):
        batch = []
        for path in paths[start : start + model.batch_size]:
            try:
                batch.append(model.read(path))
                kept.append(path)
            except UserError as error:
                say(f"skipped: {error}", sys.stderr)
        if batch:
            features.append(model.encode_pixels(np.stack(batch)))
    if not kept:
        raise UserError(f"--images: none of the {len(paths)} files can be read")
    np.savez(file, features=np.concatenate(features), paths=np.array(kept))
    return len(kept)


def main() -> None:
    """Parses the command line and runs the command; a mistake exits with 2."""
    guard(lambda: embed(parse_arguments()))


if __name__ == "__main__":
    main()

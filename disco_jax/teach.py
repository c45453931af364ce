"""Stores a model's features of all images and captions of a source, to be distilled from.

  disco-jax teach models/l14 '/data/*.tar' --out=features

To distill from them, train with --config.distill.features=features. The source is named as in
config.data.name, and must be trained on in the same order of shards. Of several captions, the first
is encoded. Bad samples are counted; they are replaced in training.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from rich.progress import track

from disco_jax.data.arguments import add_source, source_config
from disco_jax.data.stored_features import ABOUT, IMAGE, TEXT
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a model folder or a run's workdir, or its URL")
    add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    parser.add_argument(
        "--batch_size", type=int, default=256, help="pairs encoded at once; default: %(default)s"
    )
    return parser.parse_args()


def teach(arguments: argparse.Namespace) -> None:
    """Writes the folder of features.

    Raises:
      UserError: if there is no model or source, or the folder has features already.
    """
    from disco_jax.data.load import Load  # lazy: --help needs neither JAX nor Grain
    from disco_jax.data.pipeline import eval_batches
    from disco_jax.data.sources import open_source
    from disco_jax.data.transforms import Resize
    from disco_jax.inference import load

    out: Path = arguments.out
    if (out / ABOUT).exists():
        raise UserError(f"--out: {out} has features already; choose another folder")
    data = source_config(arguments)
    source = open_source(data, arguments.name, arguments.split)
    model = load(arguments.model, arguments.batch_size)
    vision = model.config.vision
    loads = Load(source, data, vision.image_size, resize=Resize(vision.squash, vision.resample))
    out.mkdir(parents=True, exist_ok=True)
    shape = len(source), model.config.embed_dim
    image, text = (
        np.lib.format.open_memmap(out / name, "w+", np.float16, shape) for name in (IMAGE, TEXT)
    )
    bad = 0
    batches = eval_batches(len(source), loads, batch_size=model.batch_size)
    steps = range(-(-len(source) // model.batch_size))
    for step in track(steps, "encoding", transient=True, disable=not sys.stderr.isatty()):
        batch = next(batches)
        captions = {i: sample.captions[0] for i, sample in enumerate(batch.samples) if sample}
        bad += len(batch.failures)
        if not captions:
            continue
        places = np.array(list(captions))
        rows = step * model.batch_size + places
        image[rows] = model.encode_pixels(batch.images(vision.image_size))[places]
        text[rows] = model.encode_text(list(captions.values()))
    image.flush()
    text.flush()
    about = {
        "model": str(arguments.model),
        "logit_scale": model.logit_scale,
        "dim": model.config.embed_dim,
        "samples": len(source),
        "source": source.fingerprint,
    }
    (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    say(f"wrote the features of {len(source) - bad:,} samples to {out}; {bad:,} are bad")


def main() -> None:
    """Parses the command line and runs the command; a mistake exits with 2."""
    guard(lambda: teach(parse_arguments()))


if __name__ == "__main__":
    main()

"""Times zero-shot evaluation: class embeddings from prompts, and image classification.

    python benchmarks/eval.py [--model=tiny] [--devices=2] [--images=2000] [--json]

Class embeddings of ImageNet's 1,000 classes with CLIP's 80 prompts, including tokenization, are
compared with one pass of the same tokens through the text tower. Images of the model's size are
timed from PNG files to predictions.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
from PIL import Image
from rich.console import Console
from rich.table import Table

from disco_jax.config import default, zeroshot_set
from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.evaluation.classes import load_classes, load_templates
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.evaluation.zeroshot import class_embeddings
from disco_jax.mesh import make_mesh
from disco_jax.models.build import model_config
from disco_jax.processes.backend import use_fake_devices
from disco_jax.step.state import init_state


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--devices", type=int, default=2, help="number of fake CPU devices")
    parser.add_argument("--batch", type=int, default=1024, help="global batch size")
    parser.add_argument(
        "--classes", type=int, default=1000, help="number of ImageNet classes, with 80 prompts each"
    )
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    config = default()
    config.model.name, config.model.dtype = arguments.model, "float32"
    config.eval.batch_size = arguments.batch
    mesh, model = make_mesh(), model_config(config)
    params = init_state(model, optax.sgd(0.1), mesh, seed=0).params
    size = model.vision.image_size
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(arguments.images):
            path = Path(folder) / str(i % 10) / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8)).save(path)
        config.eval.sets.random = zeroshot_set(folder)
        evaluator = Evaluator(config, model, mesh)
        encoder = evaluator._encoder
        names = load_classes("imagenet").names[: arguments.classes]
        templates = load_templates("openai_imagenet")
        tokenizer = make_tokenizer(model.text)
        tokens = tokenizer([t.format(name) for name in names for t in templates])
        encoder.encode_texts(params, tokens)  # compiles
        start = time.perf_counter()
        encoder.encode_texts(params, tokens)
        one_pass = time.perf_counter() - start
        start = time.perf_counter()
        embeddings = class_embeddings(encoder, params, tokenizer, names, templates)
        whole = time.perf_counter() - start
        padded = np.zeros((1000, model.embed_dim), np.float32)
        padded[: len(embeddings)] = embeddings
        evaluator.embeddings = lambda *_: padded
        evaluator.classify(params, "random")  # compiles
        start = time.perf_counter()
        evaluator.classify(params, "random")
        seconds = time.perf_counter() - start
    return {
        "prompts": len(tokens),
        "one_pass_seconds": one_pass,
        "class_embeddings_seconds": whole,
        "prompts_per_second": len(tokens) / whole,
        "images_per_second": arguments.images / seconds,
    }


def main() -> None:
    arguments = parse_arguments()
    use_fake_devices(arguments.devices)
    result = measure(arguments)
    table = Table(title=f"{arguments.model}, {jax.device_count()} CPU devices")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("prompts", f"{result['prompts']:,}")
    table.add_row("one pass over their tokens", f"{result['one_pass_seconds']:.1f} s")
    table.add_row("class embeddings, in total", f"{result['class_embeddings_seconds']:.1f} s")
    table.add_row("prompts/s", f"{result['prompts_per_second']:,.0f}")
    table.add_row("images/s", f"{result['images_per_second']:,.0f}")
    Console(width=100).print(table)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Compares features with OpenCLIP's and transformers', and loads our exports in both.

    pip install -r requirements-bench.txt
    python benchmarks/parity.py [--models=ViT-B-32,ViT-B-16] [--json]

Each model is created by the other library with random weights, imported, and run on the same images
and texts in fp32. It is then exported and loaded strictly by the other library. Towers with more
than 24 layers are cut to two, which keeps their widths and heads.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from disco_jax.interop import export_model, import_model, load_model
from disco_jax.interop.model_config import to_huggingface, to_openclip
from disco_jax.models import CLIP, PRESETS, CLIPConfig

TOLERANCE = 1e-4  # relative to the largest feature


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(n for n in PRESETS if n != "tiny"))
    parser.add_argument("--libraries", default="openclip,hf")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    return parser.parse_args()


def config_of(name: str, library: str) -> CLIPConfig:
    """Returns the preset, cut if it is deep, and with transformers' activation for `hf`."""
    config = PRESETS[name]
    changes: dict[str, Any] = {}
    if library == "hf":
        act = "gelu_tanh" if config.vision.pool == "map" else "quick_gelu"
        changes["activation"] = act
    less = {"layers": 2} if config.vision.layers > 24 else {}
    # A timm tower's name determines its number of layers, so it cannot be cut.
    whole = library == "openclip" and config.vision.pool == "map"
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **changes, **({} if whole else less)),
        text=dataclasses.replace(config.text, **changes, **less),
    )


def peer(library: str, config: CLIPConfig) -> Any:
    """Returns the other library's model, with random weights in every parameter."""
    torch.manual_seed(0)
    siglip = config.vision.pool == "map"
    if library == "openclip":
        from open_clip.model import CLIP as OpenCLIP
        from open_clip.model import CustomTextCLIP

        spec = to_openclip(config)
        spec.pop("custom_text", None)
        model = (CustomTextCLIP if siglip else OpenCLIP)(**spec)
    else:
        import transformers

        name = "Siglip" if siglip else "CLIP"
        spec = getattr(transformers, f"{name}Config").from_dict(to_huggingface(config))
        model = getattr(transformers, f"{name}Model")(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim and parameter.abs().max() == 0:  # biases, which are initialized to 0
                parameter.normal_(std=0.02)
    return model.eval()


def save(library: str, model: Any, config: CLIPConfig, folder: Path) -> None:
    if config.vision.pool == "map":
        write_tokenizer(folder.parent / "tokenizer.json")
    if library == "hf":
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": to_openclip(config)}))


def write_tokenizer(path: Path) -> None:
    """Writes a stand-in for SigLIP's tokenizer, which is on the Hub; the towers only see ids."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(path))


def theirs(library: str, model: Any, images: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        if library == "openclip":
            found = [model.encode_image(pixels), model.encode_text(ids)]
        else:
            found = [model.get_image_features(pixels), model.get_text_features(ids)]
    return [getattr(x, "pooler_output", x).numpy() for x in found]


def loads(library: str, model: Any, folder: Path) -> bool:
    """Returns whether the other library loads our export without missing or unexpected keys."""
    if library == "openclip":
        import open_clip

        model.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=True)
        spec = json.loads((folder / "open_clip_config.json").read_text())
        # Load it as OpenCLIP's users do, by name and file; the name is registered for this config.
        open_clip.add_model_config(_named(spec["model_cfg"], folder))
        weights = str(folder / "open_clip_model.safetensors")
        open_clip.create_model("export", pretrained=weights)
        return True
    import transformers

    siglip = (folder / "tokenizer.json").exists()
    known = transformers.SiglipModel if siglip else transformers.CLIPModel
    _, loading = known.from_pretrained(folder, output_loading_info=True)
    if siglip:
        transformers.SiglipImageProcessor.from_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)
    else:
        transformers.CLIPProcessor.from_pretrained(folder)
    return not (loading["missing_keys"] or loading["unexpected_keys"] or loading["mismatched_keys"])


def _named(spec: dict[str, Any], folder: Path) -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps(spec))
    return path


def compare(name: str, library: str) -> dict[str, Any]:
    config = config_of(name, library)
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    context = config.text.context_length
    tokens = np.zeros((2, context), np.int32)
    start, end = (49406, 49407) if config.text.pool == "argmax" else (5, 1)
    for row, length in zip(tokens, (context, 9), strict=True):
        row[:length] = [start, *rng.integers(1, 30_000, length - 2), end]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = peer(library, config)
        save(library, model, config, folder / "theirs")
        expected = theirs(library, model, images, tokens)
        tokenizer = folder / "tokenizer.json"
        import_model(str(folder / "theirs"), library, folder / "ours", tokenizer=tokenizer)
        ours, params = load_model(folder / "ours")
        graph, _ = nnx.split(nnx.eval_shape(lambda: CLIP(ours, rngs=nnx.Rngs(0))), nnx.Param)
        clip = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
        got = [jax.jit(clip.visual)(images), jax.jit(clip.text)(tokens)]
        export_model(folder / "ours", library, folder / "export")
        loaded = loads(library, model, folder / "export")
    off = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected, strict=True)]
    return {
        "model": name,
        "library": library,
        "activation": f"{config.vision.activation}, {config.text.activation}",
        "layers": config.vision.layers,
        "image": off[0],
        "text": off[1],
        "export_loads": loaded,
        "equal": loaded and max(off) <= TOLERANCE,
    }


def main() -> None:
    arguments = parse_arguments()
    table = Table(title="largest difference between features, relative to the largest feature")
    for column in (
        "model",
        "layers",
        "beside",
        "activations",
        "images",
        "texts",
        "export loads there",
    ):
        table.add_column(column)
    rows = []
    for name in arguments.models.split(","):
        for library in arguments.libraries.split(","):
            row = compare(name, library)
            rows.append(row)
            table.add_row(
                name,
                str(row["layers"]),
                library,
                row["activation"],
                f"{row['image']:.1e}",
                f"{row['text']:.1e}",
                "yes" if row["export_loads"] else "NO",
            )
            print(f"{name}, {library}: {'equal' if row['equal'] else 'DIFFERENT'}", flush=True)
    Console(width=110).print(table)
    if arguments.json:
        print(json.dumps(rows))
    sys.exit(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    main()

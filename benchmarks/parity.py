"""Features of random models beside OpenCLIP's and transformers', and our exports loaded there.

    pip install -r requirements-bench.txt
    python benchmarks/parity.py [--models=ViT-B-32,ViT-B-16] [--json]

Each model is made by the other library with random weights, imported, and run on the same images
and texts in fp32; then exported and loaded there again, strictly. Models of more than 24 layers in
a tower are cut to two, which keeps their widths and heads.
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

from disco_jax.interop import export_model, import_model, load_model
from disco_jax.interop.model_config import to_huggingface, to_openclip
from disco_jax.models import CLIP, PRESETS, CLIPConfig

TOLERANCE = 1e-4  # of the largest feature


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(n for n in PRESETS if n != "tiny"))
    parser.add_argument("--libraries", default="openclip,hf")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


def config_of(name: str, quick_gelu: bool) -> CLIPConfig:
    config = dataclasses.replace(PRESETS[name], quick_gelu=quick_gelu)
    if config.vision.layers <= 24:
        return config
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=2),
        text=dataclasses.replace(config.text, layers=2),
    )


def peer(library: str, config: CLIPConfig) -> Any:
    """The other library's model, with random weights of every parameter."""
    torch.manual_seed(0)
    if library == "openclip":
        from open_clip.model import CLIP as OpenCLIP

        spec = to_openclip(config)
        model = OpenCLIP(**spec)
    else:
        from transformers import CLIPConfig as HFConfig
        from transformers import CLIPModel

        model = CLIPModel(HFConfig.from_dict(to_huggingface(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim and parameter.abs().max() == 0:  # biases, which begin at 0
                parameter.normal_(std=0.02)
    return model.eval()


def save(library: str, model: Any, config: CLIPConfig, folder: Path) -> None:
    if library == "hf":
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": to_openclip(config)}))


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
    """Whether our export is loaded there without a missing or unexpected key."""
    if library == "openclip":
        model.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=True)
        return True
    from transformers import CLIPModel, CLIPProcessor

    _, told = CLIPModel.from_pretrained(folder, output_loading_info=True)
    CLIPProcessor.from_pretrained(folder)
    return not (told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"])


def compare(name: str, library: str, quick_gelu: bool) -> dict[str, Any]:
    config = config_of(name, quick_gelu)
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    tokens = np.zeros((2, 77), np.int32)
    for row, length in zip(tokens, (77, 9), strict=True):
        row[:length] = [49406, *rng.integers(1, 49000, length - 2), 49407]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = peer(library, config)
        save(library, model, config, folder / "theirs")
        expected = theirs(library, model, images, tokens)
        import_model(str(folder / "theirs"), library, folder / "ours")
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
        "quick_gelu": quick_gelu,
        "layers": config.vision.layers,
        "image": off[0],
        "text": off[1],
        "export_loads": loaded,
        "equal": loaded and max(off) <= TOLERANCE,
    }


def main() -> None:
    arguments = parse_arguments()
    table = Table(title="largest difference of features, of the largest feature")
    for column in ("model", "layers", "beside", "gelu", "images", "texts", "export loads there"):
        table.add_column(column)
    rows = []
    for name in arguments.models.split(","):
        for library in arguments.libraries.split(","):
            row = compare(name, library, quick_gelu=library == "hf")
            rows.append(row)
            table.add_row(
                name,
                str(row["layers"]),
                library,
                "quick" if row["quick_gelu"] else "exact",
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

"""Makes the data and model that `small_config.py` needs, and builds its command lines."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from disco_jax.models import CLIP, CLIPConfig, TextConfig, VisionConfig
from disco_jax.models.folder import flatten, save_model
from tests.conftest import ENV
from tests.small_config import get_config

ROOT = Path(__file__).parent.parent
SIZES = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    text=TextConfig(context_length=4, vocab_size=64, width=16, layers=1, heads=2, pool="last"),
)


def make(folder: Path, samples: int = 48) -> Path:
    """Writes a model folder, images of noise, and a table of their captions; returns `folder`."""
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(samples):
        pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,number {i}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    words = ["</s>", "<unk>", "number", *map(str, range(samples))]
    pieces = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.save(str(folder / "tokenizer.json"))
    text = dataclasses.replace(SIZES.text, tokenizer=str(folder / "tokenizer.json"))
    save_initial(folder / "model", dataclasses.replace(SIZES, text=text))
    return folder


def save_initial(folder: Path, sizes: CLIPConfig) -> None:
    """Writes the folder of an untrained model."""
    init = jax.jit(lambda: nnx.to_pure_dict(nnx.state(CLIP(sizes, rngs=nnx.Rngs(0)), nnx.Param)))
    save_model(folder, sizes, jax.tree.map(np.asarray, flatten(init())))


def config_of(folder: Path, **fields) -> ConfigDict:
    """Returns the config for calling `train` in this process; fields are named `section__field`."""
    config = get_config()
    config.data.name, config.model.name = f"{folder}/pairs.csv", f"{folder}/model"
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        target = config[section] if section else config
        target[field] = value
    return config


def command(folder: Path, workdir: Path, *extra: str) -> list[str]:
    return [
        sys.executable,
        "train.py",
        "--config=tests/small_config.py",
        f"--workdir={workdir}",
        f"--config.data.name={folder}/pairs.csv",
        f"--config.model.name={folder}/model",
        *extra,
    ]


def start(
    *args: str, env: dict[str, str] | None = None, new_group: bool = False
) -> subprocess.Popen:
    return subprocess.Popen(
        args,
        cwd=ROOT,
        env=ENV | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_group,
    )


def rows(workdir: Path) -> list[dict]:
    """Returns the logged metrics without those that depend on time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.endswith("per_second") and k[:5] != "time/"}
        for row in lines
    ]


def losses(workdir: Path) -> np.ndarray:
    return np.array([row["train/loss"] for row in rows(workdir)])

"""The model card of an exported model, and its way to the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

from disco_jax.config.defaults import flatten
from disco_jax.errors import UserError
from disco_jax.models import CLIPConfig
from disco_jax.runs.places import fetched
from disco_jax.storage.urls import Place

CARD = "README.md"
LIBRARIES = {"openclip": "open_clip", "hf": "transformers"}  # by their names on the Hub
# Fields that a card lists, if the model is a run's. Paths stay private.
SHOWN = (
    "batch_size",
    "num_steps",
    "loss.kind",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.ema_decay",
    "model.dtype",
    "seed",
)
USE = {
    "open_clip": """import open_clip

model, preprocess = open_clip.create_model_from_pretrained("hf-hub:{repo}")
tokenizer = open_clip.get_tokenizer("hf-hub:{repo}")""",
    "transformers": """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}")
processor = AutoProcessor.from_pretrained("{repo}")""",
}


def write_card(out: Path, source: Place, library: str, model: CLIPConfig, repo: str = "") -> None:
    """Writes `README.md`: sizes, how to use it, and, of a run, its settings and last evaluation.

    Args:
      out: the folder of the exported model.
      source: the run or the model folder that it is from.
      library: `openclip` or `hf`.
      model: its sizes.
      repo: its name on the Hub; "" if it is not there.
    """
    config, results = _run_of(source)
    name = LIBRARIES[library]
    vision, text = model.vision, model.text
    parts = [
        f"---\nlibrary_name: {name}\npipeline_tag: zero-shot-image-classification\n"
        "tags:\n- clip\n---",
        f"# {repo.rpartition('/')[2] or out.name}",
        f"{'SigLIP' if model.logit_bias is not None else 'CLIP'}: a ViT of {vision.layers} blocks "
        f"with patches of {vision.patch_size} pixels on images of {vision.image_size}, and a text "
        f"tower of {text.layers} blocks on {text.context_length} tokens; features of "
        f"{model.embed_dim} numbers. Trained with DisCo-JAX.",
        "## Use",
        f"```python\n{USE[name].format(repo=repo or out.name)}\n```",
    ]
    if config:
        fields = flatten(config)
        rows = [f"| {field} | {fields[field]} |" for field in SHOWN if fields.get(field)]
        parts += ["## Training", "\n".join(["| setting | value |", "|---|---|", *rows])]
    if results:
        step = results.pop("step", "")
        rows = [f"| {metric} | {value:.2%} |" for metric, value in sorted(results.items())]
        head = [f"| metric, step {step} | value |", "|---|---|"]
        parts += ["## Evaluation", "\n".join(head + rows)]
    (out / CARD).write_text("\n\n".join(parts) + "\n")


def _run_of(source: Place) -> tuple[Any, dict[str, Any]]:
    """Returns the config and the newest evaluation of a run; nothing of a model folder."""
    from ml_collections import ConfigDict

    with fetched(source, "config.json", "eval/*.json") as folder:
        if not (folder / "config.json").is_file() or (folder / "model.json").is_file():
            return None, {}
        evaluations = sorted((folder / "eval").glob("*.json"), key=lambda path: int(path.stem))
        results = json.loads(evaluations[-1].read_text()) if evaluations else {}
        return ConfigDict(json.loads((folder / "config.json").read_text())), results


def push(out: Path, repo: str, private: bool) -> str:
    """Uploads a folder to a repository on the Hugging Face Hub, which is created if missing.

    Returns:
      The address of the commit.

    Raises:
      UserError: if huggingface_hub is missing or the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            "--push: install huggingface_hub, and log in with `hf auth login`"
        ) from error
    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        commit = hub.upload_folder(repo_id=repo, folder_path=out, commit_message="Add the model")
    except Exception as error:  # network, name and permission errors all have their own types
        told = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"--push: {repo} could not be written ({told}); the model is in {out}"
        ) from error
    return str(commit)

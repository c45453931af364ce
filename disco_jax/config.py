"""The configuration: every field with its default and meaning, read, checked and written.

A config file is Python with a `get_config()` that takes `default()` and changes what differs.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from disco_jax.errors import UserError


def default() -> ConfigDict:
    """All fields. Sizes are global, over all devices and processes."""
    c = ConfigDict()
    c.seed = 0  # of parameters and of the order of samples
    c.batch_size = 1024  # samples a step
    # Exact large batches: towers run on so many samples a device at a time, the loss on all of them
    # at once (disco_jax/training/gradients.py). 0: everything at once.
    c.microbatch = 0
    # Where a batch's images wait: `scan`, on the devices, in one program; `host`, in the host's
    # memory, which then bounds the batch.
    c.microbatch_mode = "scan"
    c.init_from = ""  # a model folder (python -m disco_jax.interop) or a run, to begin from
    c.num_steps = 10_000  # optimiser updates in all
    c.fsdp = 1  # devices over which one copy of parameters and optimiser state is split
    c.fake_devices = 0  # run on so many CPU devices; 0: on what the machine has

    c.model = ConfigDict()
    c.model.name = "ViT-B-32"  # a preset of disco_jax/models/presets.py, or a model folder
    c.model.activation = ""  # of both towers: gelu, quick_gelu, gelu_tanh; "": the model's own
    c.model.tokenizer = ""  # a tokenizer.json, for SigLIP's models; "": the model's, or CLIP's
    c.model.dtype = "bfloat16"  # the towers' compute: bfloat16 or float32
    # What each tower computes again in the backward pass to save memory, from least to most: none,
    # dots, full or offload (a block's input waits in the host's memory).
    c.model.image_remat = "none"
    c.model.text_remat = "none"

    # `auto`: cuDNN's flash attention in bfloat16 on the GPUs that have it, XLA's elsewhere; or xla,
    # or cudnn.
    c.model.attention = "auto"
    c.model.patch_dropout = 0.0  # share of an image's patches left out in training (FLIP)
    c.model.dropout = 0.0  # of what each residual branch adds, in training
    # What is trained of each tower: its last so many blocks with what follows them; 0: nothing, and
    # it needs no gradients (LiT, for the image tower); -1: everything.
    c.model.image_trained_blocks = -1
    c.model.text_trained_blocks = -1

    c.loss = ConfigDict()
    c.loss.kind = (
        "softmax"  # CLIP's; or sigmoid, SigLIP's, with a learnable bias that begins at -10
    )
    c.loss.method = "disco"  # auto, reference, disco, stream or ring (disco_jax/losses)

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, lion, adafactor or muon (disco_jax/training/optimizer.py)
    c.optimizer.learning_rate = 5e-4  # after warm-up; falls to 0 along a cosine
    c.optimizer.warmup_steps = 2_000
    c.optimizer.weight_decay = 0.2  # not of norms, biases, class token and logit_scale
    c.optimizer.b1 = 0.9  # of adamw and lion; adafactor keeps no first moment, muon 0.95
    c.optimizer.b2 = 0.98
    c.optimizer.eps = 1e-6
    c.optimizer.grad_clip_norm = 0.0  # global norm that gradients are clipped to; 0: never

    c.data = ConfigDict()
    # Images and captions: a TFDS data set; tar shards as img2dataset writes them,
    # "/data/{00000..41407}.tar" or "/data/*.tar"; a table of paths and captions, .csv, .tsv or
    # .parquet. Several are joined by "::".
    c.data.name = "shapes"
    c.data.weights = ()  # shares of what is joined, (2.0, 1.0) say; (): all of it is one set
    c.data.split = "train"  # of TFDS data sets
    c.data.dir = "data"  # where TFDS data sets are kept
    c.data.image_key = "image"  # TFDS's feature, a table's column; shards need none
    # TFDS's feature, a table's column; of shards "txt", their text files, or a key of their .json.
    # Of a list of captions one is drawn each time.
    c.data.caption_key = "caption"
    c.data.crop_scale = 0.9  # least share of the area that training's random crop keeps; 1: none
    c.data.num_workers = 8  # processes that decode and tokenise; 0: the main one
    # What an image may measure. Others are bad samples, as broken ones are: counted, written to
    # bad_samples.jsonl and replaced.
    c.data.max_image_pixels = 100_000_000
    c.data.min_image_side = 4  # pixels
    c.data.max_aspect_ratio = 20.0
    c.data.max_bad_fraction = 0.05  # of all samples (of 1,000 at least): with more, the run stops
    c.data.record_keys = False  # writes the keys of each step's samples to keys.jsonl

    c.eval = ConfigDict()
    c.eval.every = 1_000  # steps between evaluations; the last step has one too; 0: only that
    # Labelled images, by the name of their metrics: `c.eval.sets.mine = zeroshot_set(...)`.
    c.eval.sets = ConfigDict()
    # Images and labels (a TFDS data set and split) from which the accuracy that colours alone give
    # is learned, to compare with; "": not.
    c.eval.baseline_name = ""
    c.eval.baseline_split = "train"
    # Images and captions for retrieval: a source as data.name, or "" for data.name itself, and its
    # split; no split: no retrieval.
    c.eval.retrieval_name = ""
    c.eval.retrieval_split = ""
    c.eval.retrieval_image_key = "image"  # of retrieval_name, as in `data`
    c.eval.retrieval_caption_key = "caption"  # captions/text for TFDS's coco_captions
    c.eval.batch_size = 1024  # images or texts at once, over all devices

    c.log_every = 50  # steps between lines of metrics
    c.checkpoint_every = 1_000  # steps; the last step is saved too
    c.checkpoint_keep = 3  # newest checkpoints kept
    return c


def zeroshot_set(
    source: str,
    split: str = "test",
    *,
    classes: str = "imagenet",
    templates: str = "openai_imagenet",
    subset: str = "",
    image_key: str = "image",
) -> ConfigDict:
    """One entry of `config.eval.sets`.

    Args:
      source: a TFDS data set; a folder of class folders, named by id, index or class; or tar shards
        whose `.cls` holds the class index.
      split: of a TFDS data set.
      classes: `imagenet`, `shapes`, `tfds` (the data set's own names), or a file of names.
      templates: `openai_imagenet` (CLIP's 80 prompts), `shapes`, or a file of prompts.
      subset: classes that images are told apart among: "" (all), `imagenet_r` (its 200), or a file
        of them; accuracy over all classes is then given as well.
      image_key: the feature of images of a TFDS data set.
    """
    return ConfigDict(
        {
            "source": source,
            "split": split,
            "classes": classes,
            "templates": templates,
            "subset": subset,
            "image_key": image_key,
        }
    )


METHODS = ("auto", "reference", "disco", "stream", "ring")
REMAT = ("none", "dots", "full", "offload")

# What may differ when a run goes on, besides all of `eval`: none of it changes a number.
FREE_FIELDS = (
    "data.dir",
    "data.max_bad_fraction",
    "data.name",  # data may have moved: a checkpoint knows what they were (data/stream.py)
    "data.num_workers",
    "data.record_keys",
    "checkpoint_every",
    "checkpoint_keep",
    "fake_devices",
    "fsdp",
    "microbatch",
    "microbatch_mode",
    "model.attention",
    "model.image_remat",
    "model.text_remat",
)


def validate(config: ConfigDict) -> None:
    """Raises UserError with every problem of the fields' values, a line each."""
    reference = flatten(default())
    given = flatten(config)
    problems = []
    for field in given.keys() - reference.keys():
        if not _of_a_set(field):
            problems.append(f"unknown config field {field}{_hint(field, list(reference))}")
    for field in (
        "batch_size",
        "num_steps",
        "fsdp",
        "log_every",
        "checkpoint_every",
        "checkpoint_keep",
        "eval.batch_size",
        "data.max_image_pixels",
        "data.min_image_side",
        "data.max_aspect_ratio",
    ):
        if given.get(field, 1) < 1:
            problems.append(f"{field} is {given[field]}, and must be 1 or more")
    for field in ("model.patch_dropout", "model.dropout"):
        if not 0 <= given.get(field, 0) < 1:
            problems.append(f"{field} is {given[field]}, and must be at least 0 and less than 1")
    for field in ("data.crop_scale", "data.max_bad_fraction"):
        if not 0 < given.get(field, 1) <= 1:
            problems.append(f"{field} is {given[field]}, and must be more than 0 and at most 1")
    weights = given.get("data.weights", ())
    parts = len(str(given.get("data.name")).split("::"))
    if weights and (len(weights) != parts or min(weights) <= 0):
        problems.append(f"data.weights must be {parts} positive numbers, one for each in data.name")
    for field in (
        "microbatch",
        "fake_devices",
        "data.num_workers",
        "eval.every",
        "optimizer.warmup_steps",
    ):
        if given.get(field, 0) < 0:
            problems.append(f"{field} is {given[field]}, and must be 0 or more")
    choices = {
        "model.dtype": ("float32", "bfloat16"),
        "model.attention": ("auto", "xla", "cudnn"),
        "model.image_remat": REMAT,
        "model.text_remat": REMAT,
        "microbatch_mode": ("scan", "host"),
        "model.activation": ("", "gelu", "quick_gelu", "gelu_tanh"),
        "optimizer.name": ("adamw", "lion", "adafactor", "muon"),
        "loss.kind": ("softmax", "sigmoid"),
        "loss.method": METHODS,
    }
    for field, known in choices.items():
        if given.get(field) not in known:
            problems.append(
                f"{field} is {given.get(field)!r}, and must be one of {', '.join(known)}"
            )
    if problems:
        raise UserError("; ".join(sorted(problems)))


def _of_a_set(field: str) -> bool:
    parts = field.split(".")
    return parts[:2] == ["eval", "sets"] and len(parts) == 4 and parts[3] in zeroshot_set("")


def check_division(config: ConfigDict, devices: int) -> None:
    """Raises UserError where devices, batch and microbatch do not divide as they must."""
    batch_size, microbatch = config.batch_size, config.microbatch
    if config.microbatch_mode == "host" and not microbatch:
        raise UserError(
            "microbatch_mode 'host' needs microbatch, the samples a device takes at once"
        )
    if devices % config.fsdp:
        raise UserError(f"fsdp {config.fsdp} does not divide the {devices} devices")
    if batch_size % devices:
        below = batch_size // devices * devices
        raise UserError(
            f"batch_size {batch_size} does not divide by the {devices} devices; "
            f"{below or devices} or {below + devices} would"
        )
    share = batch_size // devices
    if microbatch and share % microbatch:
        below = max(n for n in range(1, min(microbatch, share) + 1) if share % n == 0)
        raise UserError(
            f"microbatch {microbatch} does not divide a device's share of the batch, {share} "
            f"samples; {below} would"
        )


def unknown_field(field: str) -> UserError:
    """The error for an override of a field that is not there."""
    return UserError(f"unknown config field {field}{_hint(field, list(flatten(default())))}")


def _hint(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"model.name": ...}`: every field by its dotted path."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json` into a new run's folder, or checks that the run there has this config.

    Raises:
      UserError: the folder holds a run of another config, or cannot be written.
    """
    path = workdir / "config.json"
    if path.exists():
        stored = read_json(path)
        check_same(stored, config, workdir)
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_json(indent=2) + "\n")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error


def stored_config(workdir: Path) -> ConfigDict:
    """The config of the run in a folder.

    Raises:
      UserError: there is none, or it is of another version.
    """
    config = default()
    for field, value in flatten(ConfigDict(read_json(workdir / "config.json"))).items():
        *path, name = field.split(".")
        section = config
        for part in path:
            section = section[part] if part in section else section.setdefault(part, ConfigDict())
        section[name] = tuple(value) if isinstance(value, list) else value
    validate(config)
    return config


def check_same(stored: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Raises UserError naming the fields in which a stored run's config differs from this one."""
    old = flatten(ConfigDict(stored))
    new = flatten(ConfigDict(json.loads(config.to_json())))
    differing = [
        f"{field} ({old.get(field)!r} there, {new.get(field)!r} here)"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
        and field not in FREE_FIELDS
        and not field.startswith("eval.")
    ]
    if differing:
        raise UserError(
            f"workdir {workdir} holds a run of another config: {', '.join(differing)}; "
            "choose another workdir, or this run's config"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError naming the file where it is not one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error

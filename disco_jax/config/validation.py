"""Validates a config and reports all problems together, before anything is allocated."""

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict
from PIL import ImageColor

from disco_jax.config import default, flatten, zeroshot_set
from disco_jax.config.remat import REMAT, parse_remat
from disco_jax.config.text_groups import AUTO, parse_text_groups
from disco_jax.errors import UserError

METHODS = ("default", "auto", "reference", "disco", "stream", "ring")

CHOICES: dict[str, Sequence[str]] = {
    "data.order": ("auto", "global", "blocks"),
    "eval.suite": ("", "clip"),
    "loss.dtype": ("float32", "bfloat16"),
    "loss.kind": ("softmax", "sigmoid"),
    "loss.method": METHODS,
    "loss.positives": ("", "images", "captions"),
    "loss.precision": ("default", "high", "highest"),
    "microbatch_mode": ("scan", "host"),
    "model.activation": ("", "gelu", "quick_gelu", "gelu_tanh"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.dtype": ("float32", "bfloat16"),
    "reduce_dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "lion", "adafactor", "muon"),
}
# Numeric fields, by the range of values they allow.
AT_LEAST_1 = (
    "batch_size",
    "checkpoint_every",
    "checkpoint_keep",
    "data.block_size",
    "data.lanes",
    "data.max_aspect_ratio",
    "data.max_image_pixels",
    "data.min_image_side",
    "data.window",
    "eval.batch_size",
    "fsdp",
    "log_every",
    "max_bad_steps",
)
AT_LEAST_0 = (
    "data.num_samples",
    "data.num_workers",
    "eval.every",
    "fake_devices",
    "data.cache_bytes",
    "distill.weight",
    "loss.keep_bytes",
    "microbatch",
    "model.context_length",
    "model.image_size",
    "num_epochs",
    "num_steps",
    "optimizer.grad_clip_norm",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "seed",
    "stall_timeout",
)
AT_LEAST_MINUS_1 = ("model.image_trained_blocks", "model.text_trained_blocks")
POSITIVE = (
    "data.timeout",
    "optimizer.eps",
    "optimizer.learning_rate",
    "peer_timeout",
    "start_timeout",
)
BELOW_1 = (
    "model.dropout",
    "model.patch_dropout",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.ema_decay",
)
PROBABILITIES = ("data.color_jitter_prob", "data.gray_scale_prob")
UP_TO_1 = ("data.crop_scale", "data.max_bad_fraction", "optimizer.layer_decay")
# Upper bounds of integers that JAX, the system or a dtype limits. All others are limited to COUNT.
AT_MOST = {
    "data.lanes": 2**14,
    "data.num_workers": 1024,
    "fake_devices": 4096,
    "data.cache_bytes": 2**53,
    "loss.keep_bytes": 2**53,
    "seed": 2**32 - 1,
}
COUNT = 2**31 - 1
SECONDS = 10**8  # about three years: the upper bound of all timeouts
NOT_EMPTY = ("data.name", "model.name", "data.image_key", "data.caption_key")
LEAST = 1e-6  # smallest weight of a source
ROUNDING = 0.05  # relative tolerance, because the paper rounds its steps, epochs and data sizes


def validate(config: ConfigDict) -> None:
    """Checks the values of all fields.

    Raises:
      UserError: if any value is invalid. The message lists every problem.
    """
    if problems := problems_of(config):
        raise UserError("; ".join(problems))


def problems_of(config: ConfigDict) -> list[str]:
    """Returns one message per problem: the field, its value and what is allowed."""
    known, given = flatten(default()), flatten(config)
    problems = [unknown_field(f) for f in given.keys() - known.keys() if not of_a_set(f)]
    c = {**known, **given}
    limits: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (AT_LEAST_1, lambda x: x >= 1, "must be at least 1"),
        (AT_LEAST_0, lambda x: x >= 0, "must be at least 0"),
        (AT_LEAST_MINUS_1, lambda x: x >= -1, "must be at least -1"),
        (POSITIVE, lambda x: x > 0, "must be greater than 0"),
        (BELOW_1, lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
        (PROBABILITIES, lambda x: 0 <= x <= 1, "must be at least 0 and at most 1"),
        (UP_TO_1, lambda x: 0 < x <= 1, "must be greater than 0 and at most 1"),
    )
    beyond = {field: demand for field, value in c.items() if (demand := _beyond(field, value))}
    problems += [f"{field} is {_short(c[field])}; it must be {t}" for field, t in beyond.items()]
    for fields, allowed, demand in limits:
        wrong = [field for field in fields if field not in beyond and not allowed(c[field])]
        problems += [f"{field} is {c[field]}; it {demand}" for field in wrong]
    problems += [f"{field} is empty; it must be set" for field in NOT_EMPTY if not c[field]]
    for field, choices in CHOICES.items():
        if c[field] not in choices:
            named = ", ".join(choice or '""' for choice in choices)
            hint = near(c[field], choices)
            problems.append(f"{field} is {c[field]!r}; it must be one of {named}{hint}")
    return sorted(problems + ([] if beyond else _of_several(c)))


def _beyond(field: str, value: Any) -> str:
    """Returns what `value` must be if it violates a limit of its type, else ""."""
    if isinstance(value, str):
        if value.startswith("~") and os.path.expanduser(value) == value:  # noqa: PTH111 (it raises)
            return "a path in the home folder of an existing user"
        return "a string without NUL characters" if "\0" in value else _form(field, value)
    if isinstance(value, tuple | list):
        return next((demand for x in value if (demand := _beyond(field, x))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    most = SECONDS if field.endswith("timeout") else AT_MOST.get(field, COUNT)
    if isinstance(value, int) or field.endswith("timeout"):
        return f"at most {most:,}" if value > most else ""
    return ""


def _form(field: str, text: str) -> str:
    """Returns what `text` must be if its field requires another form, else ""."""
    try:
        if field == "data.background":
            ImageColor.getrgb(text)
        elif field == "data.encoding":
            "".encode(text or "utf-8")
    except (ValueError, LookupError):
        kinds = {
            "data.background": "color such as white or #808080",
            "data.encoding": "text encoding",
        }
        return f"the name of a {kinds[field]}"
    if field in ("model.image_remat", "model.text_remat"):
        try:
            parse_remat(text)
        except ValueError:
            hint = near(text.partition(":")[0], REMAT)
            return f"one of {', '.join(REMAT)}, or e.g. dots:4 (in the last 4 blocks){hint}"
    single = len(text) == 1 and text.isascii() and text not in "\r\n"
    if field in ("data.quote", "data.separator") and text not in ("", r"\t") and not single:
        return "a single ASCII character"
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def _of_several(c: dict[str, Any]) -> list[str]:
    """Returns the problems of combinations of fields."""
    problems = []
    weights, parts = c["data.weights"], len(str(c["data.name"]).split("::"))
    if weights and (len(weights) != parts or min(weights) <= 0):
        problems.append(
            f"data.weights must be {parts} positive numbers, one per source in data.name"
        )
    elif weights and (min(weights) < LEAST or max(weights) > min(weights) / LEAST):
        problems.append(
            f"data.weights must be at least {LEAST:g} and differ by at most a factor of a million"
        )
    weights, keys = c["data.caption_weights"], len(str(c["data.caption_key"]).split("::"))
    if weights and (len(weights) != keys or min(weights) <= 0):
        problems.append(
            f"data.caption_weights must be {keys} positive numbers, one per key in data.caption_key"
        )
    strengths = c["data.color_jitter"]
    if len(strengths) != 4 or min(strengths) < 0 or strengths[3] > 0.5:
        problems.append(
            f"data.color_jitter is {tuple(strengths)}; it must be four numbers of at least 0, for "
            "brightness, contrast, saturation and hue, the last at most 0.5"
        )
    if c["data.window"] > 0 and c["data.window"].bit_count() != 1:
        problems.append(f"data.window is {c['data.window']}; it must be a power of two")
    if c["num_steps"] == c["num_epochs"] == 0:
        problems.append("num_steps is 0; it must be at least 1, unless num_epochs is set")
    if c["microbatch_mode"] == "host" and not c["microbatch"]:
        problems.append(
            "microbatch_mode 'host' requires microbatch, the samples per device in a microbatch"
        )
    for field in ("distill.teacher", "distill.features"):
        if c[field] and c["loss.kind"] != "softmax":
            kind = c["loss.kind"]
            problems.append(f"{field} requires loss.kind softmax; the {kind} loss has no targets")
    if c["distill.teacher"] and c["distill.features"]:
        problems.append("distill.teacher and distill.features exclude each other; set one of them")
    groups = c["model.text_groups"]
    try:
        parse_text_groups("" if groups == AUTO else groups)
    except ValueError:
        problems.append(
            f"model.text_groups is {groups!r}; it must be auto, empty, or LENGTH:FRACTION,... with "
            "rising lengths and rising fractions of at most 1, e.g. 16:0.5,32:0.9"
        )
    traced = c["profile_steps"]
    steps = re.fullmatch(r"(\d{1,9}):(\d{1,9})", traced)
    if traced and (not steps or not 1 <= int(steps[1]) <= int(steps[2])):
        problems.append(f"profile_steps is {traced!r}; it must be FIRST:LAST, e.g. 10:15")
    samples, wanted = c["num_steps"] * c["batch_size"], c["num_epochs"] * c["data.num_samples"]
    if samples > 0 and wanted and abs(samples / wanted - 1) > ROUNDING:
        problems.append(
            f"num_steps {c['num_steps']:,} at batch_size {c['batch_size']:,} does not match "
            f"num_epochs {c['num_epochs']:g} of data.num_samples {c['data.num_samples']:,}; "
            f"{round(wanted / c['batch_size']):,} steps would, and num_steps = 0 computes them"
        )
    return problems


def unknown_field(field: str) -> str:
    """Returns the message for an unknown field, suggesting the closest known one."""
    return f"unknown config field {field}{near(field, list(flatten(default())))}"


def near(given: str, known: Sequence[str]) -> str:
    """Returns `; did you mean X?`, or "" if no known name is close."""
    found = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def of_a_set(field: str) -> bool:
    """Whether `field` is a field of a set in `eval.sets`; the set may have any name."""
    parts = field.split(".")
    return parts[:2] == ["eval", "sets"] and len(parts) == 4 and parts[3] in zeroshot_set("")


def check_division(config: ConfigDict, devices: int) -> None:
    """Checks that the numbers of devices, samples and microbatches divide evenly.

    Raises:
      UserError: if one does not divide another. The message suggests a value.
    """
    batch_size, microbatch = config.batch_size, config.microbatch
    if devices % config.fsdp:
        raise UserError(f"fsdp {config.fsdp} does not divide the {devices} devices")
    if batch_size % devices:
        below = batch_size // devices * devices
        raise UserError(
            f"batch_size {batch_size} is not divisible by the {devices} devices; "
            f"{below or devices} or {below + devices} would be"
        )
    share = batch_size // devices
    if microbatch and share % microbatch:
        below = max(n for n in range(1, min(microbatch, share) + 1) if share % n == 0)
        raise UserError(
            f"microbatch {microbatch} does not divide a device's share of the batch, {share} "
            f"samples; {below} would"
        )

"""`eval.suite`: the labeled sets of CLIP's and VTAB's evaluations that TFDS has."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from disco_jax.config import zeroshot_set
from disco_jax.display.terminal import console
from disco_jax.errors import UserError
from disco_jax.runs import agreement

NAMES = (
    "food101",
    "cifar10",
    "cifar100",
    "sun397",
    "cars",
    "dtd",
    "pets",
    "caltech101",
    "flowers",
    "mnist",
    "stl10",
    "eurosat",
    "resisc45",
    "pcam",
    "svhn",
    "diabetic_retinopathy",
)
PREFIX = "clip/"  # of the names of its sets, and thus of its metrics


class SuiteSet(NamedTuple):
    """A labeled set with published class names and prompts, as in `assets/sets/NAME.json`."""

    source: str  # TFDS's dataset
    split: str
    metric: str  # `top1` or, where CLIP reports it, `mean_per_class`
    origin: str  # of the class names and prompts
    prompts: list[str]
    classes: dict[str, str]  # TFDS's names of the labels, in order, to the names in prompts


class Score(NamedTuple):
    """The accuracy on a set, by the set's own metric."""

    name: str
    classes: int
    metric: str
    value: float


@cache
def load_set(name: str) -> SuiteSet:
    """Returns one of `NAMES`."""
    file = resources.files("disco_jax").joinpath("assets", "sets", f"{name}.json")
    return SuiteSet(**json.loads(file.read_text()))


def with_suite(config: ConfigDict) -> ConfigDict:
    """Returns a config whose `eval.sets` also has the sets of `eval.suite` in `data.dir`.

    Without a suite, returns `config` itself. The sets are named `clip/NAME`; those that are not in
    `data.dir` on every process, as ArrayRecord, are left out and listed in one line. All processes
    call this together.

    Raises:
      UserError: if no set is there.
    """
    if not config.eval.suite:
        return config
    from disco_jax.data.tfds_source import is_prepared  # lazy: TFDS takes seconds to import

    folder = config.data.dir
    here = {i for i, name in enumerate(NAMES) if is_prepared(load_set(name).source, folder)}
    found = [NAMES[i] for i in agreement.common(here)]
    missing = [load_set(name).source for name in NAMES if name not in found]
    where = f"data.dir {folder}" + (" of a process" if jax.process_count() > 1 else "")
    command = f"tfds build DATASET --file_format=array_record --data_dir={folder}"
    if not found:
        raise UserError(
            f"eval.suite: {where} has none of the suite's datasets as ArrayRecord; "
            f"prepare some of {', '.join(missing)} with `{command}`"
        )
    if missing:
        console.print(
            f"eval.suite: evaluating {len(found)} of {len(NAMES)} sets; {where} does not have "
            f"{', '.join(missing)} as ArrayRecord; prepare them with `{command}`",
            soft_wrap=True,
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name in found:
            source, split = load_set(name)[:2]
            config.eval.sets[PREFIX + name] = zeroshot_set(
                source, split, classes=name, templates=name
            )
    return config


def scores(metrics: Mapping[str, float]) -> list[Score]:
    """Returns the scores of the suite's sets that `metrics` has, in the order of `NAMES`."""
    found = []
    for name in NAMES:
        known = load_set(name)
        if (key := f"{PREFIX}{name}/{known.metric}") in metrics:
            found.append(Score(name, len(known.classes), known.metric, metrics[key]))
    return found


def mean(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns `clip/mean`, the mean score of the suite's sets; empty if there are none."""
    values = [score.value for score in scores(metrics)]
    return {f"{PREFIX}mean": sum(values) / len(values)} if values else {}


def field_of(name: str, part: str = "") -> str:
    """Returns the config field that a set is from, or that of a part of it, for error messages."""
    return f"eval.suite: {name}" if name.startswith(PREFIX) else f"eval.sets.{name}{part}"

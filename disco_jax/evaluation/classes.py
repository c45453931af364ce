"""Class lists and prompts: those that come along, and users' own."""

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disco_jax.data.shapes import vocabulary
from disco_jax.errors import UserError


class Classes(NamedTuple):
    """The names that go into prompts, in the order of the labels, and what folders are called."""

    names: list[str]
    ids: list[str]  # WordNet's, say; empty where there are none

    def label_of(self, folder: str) -> int:
        """The label of a class folder: its id, its index or its name.

        Raises:
          UserError: it is none of them, or may be several: two classes of one name, or the index
            of one and the name of another.
        """
        labels = _known(tuple(self.names), tuple(self.ids))
        found = labels.get(folder, set()) | labels.get(_plain(folder), set())
        if not found:
            raise UserError(
                f"class folder {folder!r} is none of the {len(self.names)} classes, by id, index "
                f"or name: {self.names[0]!r}, say"
            )
        if len(found) > 1:
            told = ", ".join(map(str, sorted(found)))
            raise UserError(f"class folder {folder!r} may be any of the classes {told}: use ids")
        return found.pop()


@cache
def _known(names: tuple[str, ...], ids: tuple[str, ...]) -> dict[str, set[int]]:
    labels: dict[str, set[int]] = {}
    for words in (map(_plain, names), map(str, range(len(names))), ids):
        for label, word in enumerate(words):
            labels.setdefault(word, set()).add(label)
    return labels


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def load_classes(name: str) -> Classes:
    """`imagenet` or `shapes`; or a file of names, a JSON list or one a line.

    Raises:
      UserError: the file can't be read, or holds something else.
    """
    if name == "imagenet":
        return Classes(_asset("imagenet_classnames"), _asset("imagenet_wnids"))
    if name == "shapes":
        return Classes(list(vocabulary.CLASSES), [])
    return Classes(_strings(name, "classes"), [])


def load_subset(name: str, classes: Classes) -> np.ndarray:
    """bool `[classes]`, which of them count: all for "", those of `imagenet_r`, or a file's.

    Raises:
      UserError: it names something that is no class.
    """
    chosen = np.zeros(len(classes.names), bool)
    if not name:
        return ~chosen
    members = _asset("imagenet_r_wnids") if name == "imagenet_r" else _strings(name, "subset")
    chosen[[classes.label_of(member) for member in members]] = True
    return chosen


def load_templates(name: str) -> Sequence[str]:
    """Prompts: of `shapes`, CLIP's 80 of `openai_imagenet`; or a file, a JSON list or one a line.

    Raises:
      UserError: the file can't be read, or a prompt has no {} for the class.
    """
    if name == "shapes":
        return vocabulary.TEMPLATES
    if name == "openai_imagenet":
        return _asset("openai_imagenet_templates")
    templates = _strings(name, "templates")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise UserError(f"templates: {wrong[0]!r} of {name} has not one {{}} for the class")
    return templates


def _asset(name: str) -> list[str]:
    return json.loads(resources.files("disco_jax").joinpath("assets", f"{name}.json").read_text())


def _strings(file: str, field: str) -> list[str]:
    path = Path(file).expanduser()
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else text.split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}: {file} is not a known name, nor can it be read: {error}"
        ) from error
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise UserError(f"{field}: {file} is not a list of texts")
    lines = [line.strip() for line in found if line.strip()]
    if not lines:
        raise UserError(f"{field}: {file} is not a list of texts")
    return lines

"""Class lists and prompts, bundled or user-provided."""

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disco_jax.data.shapes import vocabulary
from disco_jax.errors import UserError
from disco_jax.evaluation import suite


class Classes(NamedTuple):
    """Class names for prompts and, where they exist, class ids, both in the order of the labels."""

    names: list[str]
    ids: list[str]  # e.g. WordNet's, or TFDS's names of the labels; may be empty

    def label_of(self, name: str) -> int:
        """Returns the label of a class that is named by id, index or name, e.g. by its folder.

        Raises:
          UserError: if it is no class, or more than one: two classes with the same name, or the
            index of one and the name of another.
        """
        labels = _known(tuple(self.names), tuple(self.ids))
        found = labels.get(name, set()) | labels.get(_plain(name), set())
        if not found:
            raise UserError(
                f"class {name[:100]!r} is none of the {len(self.names)} classes; a class is named "
                f"by id, index or name, e.g. {self.names[0]!r}"
            )
        if len(found) > 1:
            choices = ", ".join(map(str, sorted(found)))
            raise UserError(f"class {name!r} may be any of the classes {choices}; use ids")
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
    """Loads the classes of `imagenet`, `shapes` or a set of the suite, or those in a file.

    A file is a JSON list or has one name per line.

    Raises:
      UserError: if the file can't be read or holds something else.
    """
    if name == "imagenet":
        return Classes(_asset("imagenet_classnames"), _asset("imagenet_wnids"))
    if name == "shapes":
        return Classes(list(vocabulary.CLASSES), [])
    if name in suite.NAMES:
        classes = suite.load_set(name).classes
        return Classes(list(classes.values()), list(classes))
    return Classes(_strings(name, "classes"), [])


def load_subset(name: str, classes: Classes) -> np.ndarray:
    """Returns bool `[classes]`, the classes to use: all for "", those of `imagenet_r` or a file's.

    Raises:
      UserError: if the file can't be read, or names something that is not a class.
    """
    chosen = np.zeros(len(classes.names), bool)
    if not name:
        return ~chosen
    members = _asset("imagenet_r_wnids") if name == "imagenet_r" else _strings(name, "subset")
    chosen[[classes.label_of(member) for member in members]] = True
    return chosen


def load_templates(name: str) -> Sequence[str]:
    """Loads CLIP's 80 prompts (`openai_imagenet`), those of `shapes` or of a set of the suite.

    Any other name is that of a file.

    A file is a JSON list or has one prompt per line.

    Raises:
      UserError: if the file can't be read, or a prompt does not contain exactly one {}.
    """
    if name == "shapes":
        return vocabulary.TEMPLATES
    if name == "openai_imagenet":
        return _asset("openai_imagenet_templates")
    if name in suite.NAMES:
        return suite.load_set(name).prompts
    templates = _strings(name, "templates")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise UserError(f"templates: {wrong[0]!r} in {name} must have exactly one {{}} for a class")
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
            f"{field}: {file} is neither a known name nor a readable file: {error}"
        ) from error
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise UserError(f"{field}: {file} must be a list of strings, with at least one")
    lines = [line.strip() for line in found if line.strip()]
    if not lines:
        raise UserError(f"{field}: {file} must be a list of strings, with at least one")
    return lines

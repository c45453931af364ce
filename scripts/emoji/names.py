"""Which drawing shows which emoji, which names are held out, and the captions."""

import hashlib
import re
import unicodedata

from scripts.emoji.packages import Emoji, Style

# Beside the name alone. They are the prompts of the zero-shot evaluation too.
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}")
KEYWORDS = 3  # in a caption
LISTS = 3  # captions with keywords
HELD_OUT = 10  # one name in ten is held out
_VARIANT = re.compile(r"\b(man|men|woman|women|person|people)\b")


def icon_of(emoji: Emoji, style: Style) -> str | None:
    """Returns the icon that shows an emoji, or None if the style has none.

    Found by its code points or, for a style without a list of them, by the name.
    """
    plain = "-".join(code for code in emoji.code.split("-") if code != "fe0f")
    names = (style.icons.get(emoji.code), style.icons.get(plain), _slug(emoji.name))
    return next((name for name in names if name in style.bodies), None)


def _slug(name: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.!]", "", ascii_only)).strip("-")


def is_held_out(name: str) -> bool:
    """Whether a name, if all styles draw it, is kept out of training: one in `HELD_OUT`.

    Names that differ only in the words man, woman and person are held out together, because some
    styles draw them alike.
    """
    family = " ".join(_VARIANT.sub("", name).split())
    return int(hashlib.sha256(family.encode()).hexdigest(), 16) % HELD_OUT == 0


def captions(emoji: Emoji) -> list[str]:
    """Returns the name in several templates, and with a few of its keywords each time."""
    known = set(re.findall(r"\w+", emoji.name.lower()))
    words = [word for word in emoji.keywords if word not in known]
    lists = [", ".join(words[i::LISTS][:KEYWORDS]) for i in range(LISTS)]
    named = [template.format(emoji.name) for template in TEMPLATES]
    return named + [f"{emoji.name}: {words}" for words in lists if words]

"""Hooks of the documentation site: what its pages take from the code, and links that leave it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIELDS = "<!-- fields -->"
_FIELD = re.compile(r"    c\.([\w.]+) = (.+?)(?:  # (.*))?$")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills the table of config fields, and unlinks files of the repository that are no pages."""
    if FIELDS in markdown:
        source = (ROOT / "disco_jax/config/defaults.py").read_text()
        markdown = markdown.replace(FIELDS, fields_table(source))
    # The site holds docs/ alone; on GitHub these links lead to the sources.
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", markdown)


def fields_table(source: str) -> str:
    """Returns Markdown tables of the fields that the source of `default()` sets, by section.

    A field's description is the comment on its line, or else those before it.
    """
    sections: dict[str, list[str]] = {}
    comments: list[str] = []
    for line in source.splitlines():
        found = _FIELD.match(line)
        if line.strip().startswith("#"):
            comments.append(line.strip(" #"))
            continue
        if found and "ConfigDict()" not in found[2]:
            name, value, comment = found.groups()
            section = name.rpartition(".")[0]
            text = " ".join([*comments, *([comment] if comment else [])])
            text = text[:1].upper() + text[1:].replace("|", r"\|") or "As above."
            sections.setdefault(section, []).append(f"| `{name}` | `{value}` | {text} |")
        comments = []
    parts = []
    for section, rows in sections.items():
        title = f"`{section}`" if section else "The run"
        parts.append(
            f"## {title}\n\n| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)

"""Makes the data set `emoji`: drawings of emojis in four styles, with names and keywords.

    pip install resvg_py==0.5.0
    python scripts/emoji/make.py --out=FOLDER

Downloads packages from npm, about 14 MB, to --packages=FOLDER. The result is in data_sets/emoji,
and `make emoji` unpacks it. Other versions of resvg or libwebp may write other bytes.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.emoji.names import TEMPLATES, icon_of, is_held_out  # noqa: E402
from scripts.emoji.packages import ICONS, NAMES, download, read_emojis, read_style  # noqa: E402
from scripts.emoji.shards import render, sample, write_shard  # noqa: E402

UNSEEN = "fluent"  # the style that is never trained on


def main() -> None:
    """Writes the shards and the lists of names to a new folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--packages", type=Path, default=Path("data/emoji-packages"))
    arguments = parser.parse_args()
    emojis = read_emojis(download(NAMES, arguments.packages))
    styles = {s: read_style(download(spec, arguments.packages)) for s, spec in ICONS.items()}
    icons = {s: {e.name: icon_of(e, style) for e in emojis} for s, style in styles.items()}
    drawn = {s: {name for name, icon in of.items() if icon} for s, of in icons.items()}
    common = set.intersection(*drawn.values())
    held_out = {name for name in common if is_held_out(name)}
    # Of the unseen style, names that not all training styles draw serve to choose settings.
    trained = set.union(*(names for s, names in drawn.items() if s != UNSEEN)) - held_out
    parts = {s: (s, drawn[s] - held_out) for s in drawn if s != UNSEEN}
    parts |= {
        "validation": (UNSEEN, drawn[UNSEEN] & trained - common),
        "test": (UNSEEN, common - held_out),
        "heldout": (UNSEEN, held_out),
    }
    arguments.out.mkdir(parents=True)
    for part, (s, names) in parts.items():
        style, chosen = styles[s], [e for e in emojis if e.name in names]
        bodies = ((e, style.bodies[icons[s][e.name] or ""]) for e in chosen)
        samples = ((e.code, sample(e, s, render(body, style.size))) for e, body in bodies)
        write_shard(arguments.out / f"{part}.tar.gz", samples)
        print(f"{part}: {len(chosen)} drawings in the style {s}", flush=True)
    lists = {"names": common, "heldout": held_out, "validation": parts["validation"][1]}
    for file, names in lists.items():
        lines = [e.name for e in emojis if e.name in names]
        (arguments.out / f"{file}.txt").write_text("\n".join(lines) + "\n")
    (arguments.out / "prompts.txt").write_text("\n".join(TEMPLATES) + "\n")


if __name__ == "__main__":
    main()

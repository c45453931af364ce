"""Hostile texts through every place where a user's text meets a terminal, a log, HTML or a plot."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from disco_jax import cli, plots, report
from disco_jax.errors import UserError
from disco_jax.jsonl import JsonLines, read_lines
from disco_jax.terminal import PlainConsole, printable, say

HOSTILE = {
    "markup": "[bold]a[/bold] [/x] [a-z]*.tar [link=file:///x]y[/link]",
    "emoji": ":warning: :x:",
    "escape": "\x1b[2J\x1b]0;title\x07red\x1b[31m",
    "surrogate": "bad \udc80 byte",
    "direction": "exe.\u202egpj",
    "quotes": "'\"`$(x)`\\",
    "math": r"$\frac{a$ $x_",
    "newline": "two\nlines\r\n",
    "nul": "a\0b",
    "html": "<script>alert(1)</script>&amp;",
    "long": "x" * 4096,
    "other alphabets": "ΣΩ 猫 кошка",
}
ALL = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def harmless(shown: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in shown)


def test_what_is_printable_stays():
    assert printable("ΣΩ 猫 [/x] 100 %") == "ΣΩ 猫 [/x] 100 %"
    assert printable("\x1b[2J\udc80\u202e\n\0") == r"\x1b[2J\udc80\u202e\n\x00"


@ALL
def test_a_console_prints_plain_text(text):
    out = io.StringIO()
    console = PlainConsole(file=out, width=10_000, force_terminal=False)
    table = Table(title=f"title {text}")
    table.add_column(f"column {text}")
    table.add_row(f"cell {text}")
    console.print(f"text {text}", soft_wrap=True)
    console.print(table)
    assert harmless(out.getvalue())
    shown = printable(text, keep="\n").split("\n")[0]
    for place in ("title", "column", "cell", "text"):
        assert f"{place} {shown}" in out.getvalue()


@ALL
def test_lines_and_errors_are_one_line(text, capsys):
    say(f"said {text}")
    with pytest.raises(SystemExit) as ended:
        cli.guard(lambda: _raise(UserError(f"workdir {text} is wrong")))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == f"said {printable(text)}\n"
    assert err == f"error: workdir {printable(text)} is wrong\n"


def _raise(error: Exception) -> None:
    raise error


@ALL
def test_a_log_gives_back_what_it_was_given(text, tmp_path):
    lines = JsonLines(tmp_path / "keys.jsonl", 0)
    lines.write({"step": 1, "keys": [text]})
    lines.close()
    assert read_lines(tmp_path / "keys.jsonl") == [{"step": 1, "keys": [text]}]


@ALL
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_plots_draw_any_text(text, tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    plots.plot_pairs(list(images), [text, text], tmp_path / "pairs.png")
    plots.plot_predictions(images, [text, "a"], [text, text], tmp_path / "predictions.png")
    for name in ("pairs", "predictions"):
        with Image.open(tmp_path / f"{name}.png") as drawn:
            assert min(drawn.size) > 100


def test_importing_the_package_changes_nothing_global():
    """In any library: limits, backends, levels and filters are the user's."""
    code = """
import json, logging, os, sys
import PIL.Image
def state():
    return [PIL.Image.MAX_IMAGE_PIXELS, dict(os.environ), logging.root.level]
before = state()
import disco_jax, disco_jax.losses, disco_jax.inference, disco_jax.training.loop, disco_jax.report
import disco_jax.evaluation.main, disco_jax.data.inspect, disco_jax.data.make_tars, disco_jax.embed
print(json.dumps([a == b for a, b in zip(before, state())] + ["matplotlib.pyplot" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, True, True, False]


def test_a_report_escapes_what_it_shows():
    text = HOSTILE["html"] + HOSTILE["escape"]
    shown = printable(report.as_markdown([["run"], [text]]), keep="\n")
    assert harmless(shown)

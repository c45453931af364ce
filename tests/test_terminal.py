"""Tests hostile text wherever a user's text reaches a terminal, a log, a table, HTML or a plot."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from disco_jax.config import default
from disco_jax.display import plots
from disco_jax.display.terminal import PlainConsole, printable, say
from disco_jax.embed import embed
from disco_jax.errors import UserError
from disco_jax.processes import cli
from disco_jax.reporting.page import as_html
from disco_jax.reporting.run import Run
from disco_jax.reporting.tables import as_markdown
from disco_jax.runs.jsonl import JsonLines, read_lines
from tests.small_run import make

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
    """Limits, environment variables, log levels and backends are left to the user."""
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


@ALL
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_a_report_holds_any_name(text, tmp_path):
    cells = [["run", "model"], [text, text]]
    rows = [{"step": 1, "epoch": 1.0, "train/loss": 1.0, f"{text}/top1": 0.5}]
    bad = [{"step": 1, "key": text, "detail": text}]
    plain = Run("a", default(), [{"step": 1, "train/loss": 1.0}], 1, [], [], None)
    page = as_html([plain._replace(name=text, rows=rows, starts=[{"host": text}], bad_samples=bad)])
    assert page.count("<script") == 3  # Bokeh's, its log level, and the curves
    page, bokeh, _ = page.partition("<script>\n/* BEGIN bokeh")
    assert bokeh
    markdown = as_markdown(cells)
    for made in (markdown, page):
        assert harmless(made)
        made.encode()
        assert "<script>" not in made
    assert len(markdown.splitlines()) == 3
    assert markdown.splitlines()[2].replace(r"\|", "").count("|") == 3
    plots.plot_runs({text: rows, "b": rows}, [text], tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as drawn:
        assert min(drawn.size) > 100


def test_files_of_any_name_are_embedded(tmp_path, capsys):
    make(tmp_path, samples=1)
    names = [text for text in HOSTILE.values() if "/" not in text and "\0" not in text]
    paths = [os.fsencode(f"{tmp_path}/{name[:200]}.png") for name in names]
    (tmp_path / "0.png").rename(tmp_path / "image")
    for path in paths:
        Path(os.fsdecode(path)).write_bytes((tmp_path / "image").read_bytes())
    (tmp_path / "broken[x]\x1b[2J.png").write_bytes(b"no image")
    out = tmp_path / "features.npz"
    arguments = argparse.Namespace(
        model=str(tmp_path / "model"), images=f"{tmp_path}/*.png", out=out, batch_size=8
    )
    embed(arguments)
    printed = capsys.readouterr()
    assert harmless(printed.out + printed.err)
    assert r"broken[x]\x1b[2J.png" in printed.err
    with np.load(out) as kept:
        assert kept["features"].shape == (len(names), 16)
        assert sorted(kept["paths"].tolist()) == sorted(map(os.fsdecode, paths))
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("out", ["no/such/folder/x.npz", "x.npy", "there.npz"])
def test_where_features_go_is_looked_at_before_any_work(out, tmp_path):
    (tmp_path / "there.npz").touch()
    (tmp_path / "a.png").touch()
    arguments = argparse.Namespace(
        model="never read", images=f"{tmp_path}/*.png", out=tmp_path / out, batch_size=8
    )
    with pytest.raises(UserError, match="--out: "):
        embed(arguments)

"""Tests the commands' help, and that their mistakes are one line."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from disco_jax import command, errors
from disco_jax.processes import cli
from tests.conftest import ENV
from tests.small_run import ROOT

NAMES = [name for name, *_ in command.COMMANDS]
CODES = {code for name, code in vars(errors).items() if name.startswith("EXIT_")}


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Returns the exit code and the output of the command, called in this process."""
    monkeypatch.setattr(sys, "argv", ["disco-jax", *arguments])
    monkeypatch.setattr(cli, "ignore_absent_accelerators", lambda: None)  # for processes
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code or 0, *capsys.readouterr()


def examples(text: str) -> list[str]:
    return re.findall(r"^  (disco-jax .*)", text, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_and_says_what_each_flag_means(name, monkeypatch, capsys):
    code, text, wrong = call(monkeypatch, capsys, name, "--help")
    assert (code, wrong) == (0, "")
    assert examples(text)
    assert all(line.startswith(f"disco-jax {name} ") for line in examples(text))
    flags = re.findall(r"^  ((?:-h, )?--.*(?:\n {10,}.*)*)", text, re.M)
    assert len(flags) > 1
    for flag in flags:  # its name, spaces, and an explanation
        assert re.match(r"\S.*?(  +|\n +)\S", flag), flag
    used = set(re.findall(r" --(\w+)", "\n".join(examples(text))))
    assert used <= set(re.findall(r"^  --(\w+)", text, re.M)), "examples use what is not explained"


def test_the_help_of_train_has_all_exit_codes(monkeypatch, capsys):
    text = call(monkeypatch, capsys, "train", "--help")[1]
    told = text.partition("Exit codes:")[2].partition("Flags:")[0]
    assert {int(code) for code in re.findall(r"\b\d+\b", told)} == CODES | {0}


@pytest.mark.parametrize("module", sorted({module for _, module, *_ in command.COMMANDS}))
def test_examples_are_valid_command_lines(module, monkeypatch):
    """Of the commands without a config; those in the docs are run by `make docs-check`."""
    found = importlib.import_module(module)
    if not hasattr(found, "parse_arguments"):
        return
    texts = [found.__doc__, getattr(found, "IMPORT", ""), getattr(found, "EXPORT", "")]
    for line in examples("\n".join(texts)):
        # import and export are words of one parser
        words = shlex.split(line)[0 if "interop" in module else 1 :]
        monkeypatch.setattr(sys, "argv", words)
        assert found.parse_arguments()


MISTAKES = [
    (["embed"], "are required: model, --images, --out; see disco-jax embed --help"),
    (["export", "run", "--to=torch", "--out=x"], "invalid choice: 'torch'"),
    (["checkpoint", "run", "--go_back_to=last"], "invalid int value: 'last'"),
    (["inspect", "x.csv", "--sampels=3"], "unrecognized arguments: --sampels=3"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, capsys):
    code, shown, wrong = call(monkeypatch, capsys, *arguments)
    assert (code, shown) == (errors.EXIT_USER, "")
    assert_one_line(wrong, message)


def assert_one_line(wrong: str, message: str) -> None:
    assert wrong.startswith("error: ")
    assert message in wrong
    assert wrong.count("\n") == 1
    assert wrong.endswith("\n")


CONFIGS = [
    ("shaped", "not found: shaped, nor is it one of clipa, conceptual, "),
    ("shaped", "; did you mean shapes?\n"),
    ("shapes:3", "shapes.py takes no argument; leave out :3"),
    ("vit_b32_laion100m:9", "--config=...:9: the batch must be one of 8192, "),
]
FILES = [
    ("def get_config(:", "/0.py, line 1: "),
    ("def get_config():\n    return x", "/1.py, line 2: NameError: name 'x' is not defined"),
    ("import no_such_module", "/2.py, line 1: ModuleNotFoundError: No module named"),
    ("def get_config():\n    return {}['x']", "/3.py, line 2: KeyError: 'x'"),
    ("def get_config():\n    return 1 + ''", "/4.py: TypeError: unsupported operand"),
    ("x = 1", "/5.py defines no get_config()"),
]


def test_a_mistake_in_a_config_is_one_line(tmp_path):
    cases = [([f"--config={name}"], message) for name, message in CONFIGS]
    for i, (text, message) in enumerate(FILES):
        (tmp_path / f"{i}.py").write_text(text + "\n")
        cases.append(([f"--config={tmp_path}/{i}.py"], f"--config: {tmp_path}{message}"))
    cases.append((["--config", "shapes"], "--config needs an equals sign; pass e.g. --config=s"))
    cases.append((["--config=shapes"], "--workdir=DIR is missing"))
    (tmp_path / "cases.json").write_text(json.dumps([arguments for arguments, _ in cases]))
    starts = [sys.executable, "-m", "tests.many_starts", str(tmp_path / "cases.json")]
    done = subprocess.run(starts, cwd=ROOT, env=ENV, capture_output=True, text=True, check=True)
    for (_, message), line in zip(cases, done.stdout.splitlines(), strict=True):
        code, wrong = json.loads(line)
        assert code == errors.EXIT_USER, wrong
        assert_one_line(wrong, message)


def test_help_may_be_cut():
    """Its reader is gone before anything is written, as `head` may be."""
    reading, writing = os.pipe()
    os.close(reading)
    for name in ("train", "embed"):
        job = subprocess.run(
            [sys.executable, "-m", "disco_jax.command", name, "--help"],
            cwd=ROOT,
            env=ENV,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (job.returncode, job.stderr) == (0, "")
    os.close(writing)


def test_the_docs_name_all_commands_configs_and_exit_codes():
    page = (ROOT / "docs/commands.md").read_text()
    assert re.findall(r"^\| `disco-jax (\w+)", page, re.M) == NAMES
    names = {path.stem for path in (ROOT / "disco_jax/configs").glob("[!_]*.py")}
    listed = page.partition("## Configs")[2].partition("\n## ")[0]
    first = "".join(re.findall(r"^\|([^|]*)", listed, re.M))  # column
    assert set(re.findall(r"`(\w+)(?::\w+)?`", first)) == names
    codes = page.partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+)", codes, re.M)} == CODES | {0, 1}

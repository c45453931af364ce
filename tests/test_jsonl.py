"""Files of lines that a run takes up again."""

import resource

import pytest

from disco_jax.errors import UserError
from disco_jax.jsonl import JsonLines, read_lines


def test_what_was_written_survives_a_kill_in_mid_rewrite(tmp_path, monkeypatch):
    """A run that goes on rewrites its files of lines: a kill must leave the old ones."""
    path = tmp_path / "keys.jsonl"
    lines = JsonLines(path, 0)
    for step in range(1, 4):
        lines.write({"step": step})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4')  # cut short

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", die)
        with pytest.raises(KeyboardInterrupt):
            JsonLines(path, 2)
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]
    JsonLines(path, 2).close()
    assert [row["step"] for row in read_lines(path)] == [1, 2]


def test_a_line_that_cannot_be_written_is_told(tmp_path):
    """No file can grow past 64 bytes, which the system reports as it does a full disk."""
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl can't be written: File too large"):
            lines.write({"step": 1, "loss": 1.0, "keys": ["a key"] * 9})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.close()

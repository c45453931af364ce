"""Tests the JSON Lines files that a resumed run rewrites and continues."""

import resource

import pytest

from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines, read_lines


def test_what_was_written_survives_a_kill_in_mid_rewrite(tmp_path, monkeypatch):
    """A resumed run rewrites its JSON Lines files; a kill must leave the old ones intact."""
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


DAMAGE = (
    b"\xff\xfe\x00",
    b'{"step": ',
    b"[1, 2]",
    b'"text"',
    b'{"loss": 1}',
    b'{"step": "x"}',
    b"[" * 9999,
)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [0, 4, 99])
def test_a_damaged_line_costs_no_other(place, damage, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i + 1}}}'.encode() for i in range(100)]
    lines[place] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    others = [i + 1 for i in range(100) if i != place]
    for _ in range(2):  # the second time, no line is damaged
        opened = JsonLines(path, 100)
        assert opened.count == 99
        opened.write({"step": 101})
        opened.close()
    assert [row["step"] for row in read_lines(path)] == [*others, 101]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert capsys.readouterr().err.count("1 lines of") == 1


def test_a_last_line_cut_short_is_no_damage(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    JsonLines(path, 9).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    assert not list(tmp_path.glob("*.damaged"))
    assert capsys.readouterr().err == ""


def test_a_line_that_cannot_be_written_is_told(tmp_path):
    """Limits files to 64 bytes. A write past the limit fails in the same way as on a full disk."""
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl can't be written: File too large"):
            lines.write({"step": 1, "loss": 1.0, "keys": ["a key"] * 9})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.close()

"""Tests inputs that would never end or never fit, and concurrent preparation of a dataset."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from disco_jax.data.folder_source import FolderSource
from disco_jax.data.load import usable_captions
from disco_jax.data.patterns import expand
from disco_jax.data.source import BadSample, Sample
from disco_jax.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{1..999999999999}.tar", "expands to more than 1,000,000 files"),
        ("{1..99999}{1..99999}.tar", "expands to more than 1,000,000 files"),
        ("{a,b}" * 40 + ".tar", "expands to more than 1,000,000 files"),
        ("{9..9999999999999999999999}.tar", "expands to more than 1,000,000 files"),
        ("pipe.tar", "pipe.tar is not a regular file"),
        ("p*.tar", "pipe.tar is not a regular file"),
        ("folder.tar", "folder.tar is not a regular file"),
        ("gone.tar", "gone.tar is a link to a missing file"),
    ],
)
def test_patterns_that_would_never_end_are_refused(pattern, message, tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "gone.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match=re.escape(message)):
        expand(f"{tmp_path}/{pattern}")


def test_pipes_among_class_folders_are_counted_and_never_opened(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")
    source = FolderSource(tmp_path, lambda name: 0)
    assert len(source) == 1
    assert source[0].label == 0
    assert source.problems == {"not_a_file": 1}


@pytest.mark.parametrize("caption", ["x" * 1_100_000, b"x" * 1_100_000, ["a", "y" * 10_000_000]])
def test_a_caption_of_any_source_has_its_limit(caption):
    with pytest.raises(BadSample) as bad:
        usable_captions(Sample("key", b"", caption))
    assert bad.value.kind == "too_large"


def test_a_data_set_is_prepared_by_one_of_two_that_start_at_once(tmp_path):
    code = """
import pathlib, sys, time
from disco_jax.data import tfds_source
def prepare(builder, name, data_dir):
    print("prepared", flush=True)
    time.sleep(1)
    builder.data_path.mkdir(parents=True)
tfds_source._prepare = prepare
place = pathlib.Path(sys.argv[1])
(place / sys.argv[2]).touch()
while not all((place / name).exists() for name in "ab"):
    time.sleep(0.01)
tfds_source.load_builder("shapes", sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen([*command, x], stdout=subprocess.PIPE, text=True) for x in "ab"]
    out = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert out.count("prepared") == 1

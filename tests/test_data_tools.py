"""Tests how inspect, make_tars and embed handle and report the data that they are given."""

import json
import os
import re
import sys
import tarfile
from importlib.metadata import version

import PIL
import pytest
from PIL import Image, features

from disco_jax.data import index, inspect, make_tars
from disco_jax.data.tar_source import TarSource
from disco_jax.embed import embed
from disco_jax.embed import parse_arguments as embed_arguments
from disco_jax.errors import UserError
from tests.tars import picture, write

PAIR = [("0.jpg", picture(0)), ("0.txt", b"number 0")]


def run(main, parse, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main(parse())


def bad_table(folder) -> list[tuple[str, str]]:
    """Writes a table with eight bad rows of four kinds; returns the kind and the name of each."""
    rows, bad = [], []
    for i in range(12):
        name = f"{i}.jpg"
        rows.append(f"{name},number {i}" if i % 4 else f"{name},")
        if i % 4 == 0:
            bad.append(("empty_caption", name))
        (folder / name).write_bytes(picture(i) if i % 3 else b"<html>")
        if i % 3 == 0 and i % 4:
            bad.append(("not_an_image", name))
    rows += ["x.jpg", "12.jpg,gone"]
    (folder / "t.csv").write_text("\n".join(["image,caption", *rows]))
    return [*bad, ("unreadable", "12.jpg"), ("broken_row", "t.csv, line 14")]


def listed(path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["kind"], os.path.relpath(row["key"], path.parent.parent)) for row in rows]


def test_inspect_tells_the_image_libraries(tmp_path, monkeypatch, capsys):
    write(tmp_path / "0.tar", PAIR)
    monkeypatch.chdir(tmp_path)
    run(inspect.inspect, inspect.parse_arguments, monkeypatch, "0.tar")
    out = capsys.readouterr().out
    assert re.search(rf"images resized by +│ +Pillow {version('pillow')} ", out)
    assert re.search(r"JPEGs decoded by +│ +libjpeg-turbo \d+\.\d", out)
    monkeypatch.setattr(PIL, "__version__", "12.1.1.post0")
    monkeypatch.setattr(features, "version", {"libjpeg_turbo": None, "jpg": "9.6"}.get)
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    told = ["pillow-simd 12.1.1.post0, without WebP", "libjpeg 9.6, not turbo"]
    assert list(inspect.image_libraries().values()) == told


def test_inspect_lists_all_bad_samples_and_draws_where_asked(tmp_path, monkeypatch, capsys):
    expected = bad_table(tmp_path)
    sheet, bad = tmp_path / "new folder" / "sheet.png", tmp_path / "out" / "bad.jsonl"
    options = (f"--sheet={sheet}", f"--bad={bad}", "--image_size=16")
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    run(inspect.inspect, inspect.parse_arguments, monkeypatch, "t.csv", *options)
    out = capsys.readouterr().out
    # A sample that is bad for two reasons is listed once, with the first reason that is found.
    assert {name for _, name in listed(bad)} == {name for _, name in expected}
    assert ("broken_row", "t.csv, line 14") in listed(bad)
    assert "1 unreadable: a shard or file that is missing" in out
    assert f"in {bad}" in out
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG"
    assert {path.name for path in tmp_path.iterdir()} == before | {"new folder", "out"}
    for wrong, expected in (
        (f"--sheet={tmp_path}", "is a folder"),
        ("--sheet=x.xyz", "must end in"),
    ):
        with pytest.raises(UserError, match=f"^--sheet: .*{expected}"):
            run(inspect.inspect, inspect.parse_arguments, monkeypatch, "t.csv", wrong)


def test_inspect_tells_what_is_not_read(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "0.tar", [*PAIR, ("0.npy", b""), ("1.npy", b"")])
    monkeypatch.chdir(tmp_path)
    run(inspect.inspect, inspect.parse_arguments, monkeypatch, path, "--samples=0")
    out = capsys.readouterr().out
    assert re.search(r"not read, by extension\s+│\s+2 npy", out)
    assert not list(tmp_path.glob("*bad*"))  # there are no bad samples to list


def test_make_tars_lists_all_bad_samples_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    expected = bad_table(tmp_path)
    first, second = (Image.new("RGB", (40, 30), color) for color in ("red", "green"))
    first.save(tmp_path / "1.jpg", "MPO", save_all=True, append_images=[second])
    two = (tmp_path / "1.jpg").read_bytes()
    out = tmp_path / "out"
    run(
        make_tars.write_shards,
        make_tars.parse_arguments,
        monkeypatch,
        tmp_path / "t.csv",
        f"--out={out}",
    )
    assert {name for _, name in listed(out / "bad_samples.jsonl")} == {n for _, n in expected}
    assert (
        f"bad samples, with reasons, are listed in {out}/bad_samples.jsonl"
        in capsys.readouterr().out
    )
    good = [i for i in range(12) if i % 4 and i % 3]
    source = TarSource([out / "00000.tar"], "txt")
    assert [source[i].captions for i in range(len(source))] == [
        f"number {i}".encode() for i in good
    ]
    with tarfile.open(out / "00000.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith(".txt")]
        assert names == [f"{i:09}.jpg" for i in good]
        assert tar.extractfile("000000001.jpg").read() == two
    (out / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"bad_samples\.jsonl already exists"):
        run(
            make_tars.write_shards,
            make_tars.parse_arguments,
            monkeypatch,
            tmp_path / "t.csv",
            f"--out={out}",
        )


def test_make_tars_and_inspect_take_urls(s3, tmp_path, monkeypatch, capsys):
    bad_table(tmp_path)
    options = ("--samples=3",)
    out, local = f"{s3.url}/out/", tmp_path / "out"
    for place in (out, local):
        name = tmp_path / "t.csv"
        run(
            make_tars.write_shards,
            make_tars.parse_arguments,
            monkeypatch,
            name,
            f"--out={place}",
            *options,
        )
    names = sorted(path.name for path in local.iterdir())
    assert s3.names() == [f"out/{name}" for name in names]
    assert [s3.get(f"out/{n}") for n in names] == [(local / n).read_bytes() for n in names]
    for key, why in (
        ("00000.tar", "already holds shards"),
        ("bad_samples.jsonl", "already exists"),
    ):
        taken = f"{s3.url}/{key[0]}"
        s3.put(f"{key[0]}/{key}", b"")
        with pytest.raises(UserError, match=f"^--out: {taken}.* {why}"):
            run(
                make_tars.write_shards,
                make_tars.parse_arguments,
                monkeypatch,
                name,
                f"--out={taken}",
            )
    with pytest.raises(UserError, match=r"^--out: hf://x is a URL of an unknown kind"):
        run(make_tars.write_shards, make_tars.parse_arguments, monkeypatch, name, "--out=hf://x")
    monkeypatch.chdir(tmp_path)
    run(index.index, index.parse_arguments, monkeypatch, f"{out}*.tar", f"--out={tmp_path}/index")
    capsys.readouterr()
    options = (f"{out}*.tar", f"--index={tmp_path}/index", "--image_size=16")
    run(inspect.inspect, inspect.parse_arguments, monkeypatch, *options)
    assert re.search(r"source fingerprint\s+│\s+5 shards, 6 samples", capsys.readouterr().out)


def test_make_tars_keeps_names_of_classes(tmp_path, monkeypatch):
    path = write(tmp_path / "0.tar", [*PAIR, ("0.cls", b"great cat\n")])
    run(
        make_tars.write_shards,
        make_tars.parse_arguments,
        monkeypatch,
        path,
        f"--out={tmp_path}/out",
    )
    assert TarSource([tmp_path / "out" / "00000.tar"], "txt")[0].label == "great cat"


def test_embed_expands_braces(tmp_path, monkeypatch):
    (tmp_path / "[a]").mkdir()
    for name in ("1.jpg", "2.png", "3.txt"):
        (tmp_path / "[a]" / name).write_bytes(b"")
    seen = []
    monkeypatch.setattr(
        "disco_jax.embed._embed_into", lambda file, arguments, paths: seen.extend(paths) or 1
    )
    options = (f"--images={tmp_path}/[[]a]/*.{{jpg,png}}", f"--out={tmp_path}/out.npz")
    for pattern in (options[0], f"--images={tmp_path}/[a]/*.{{png,jpg}}"):
        run(embed, embed_arguments, monkeypatch, "model", pattern, options[1])
        (tmp_path / "out.npz").unlink()
        assert seen == [f"{tmp_path}/[a]/1.jpg", f"{tmp_path}/[a]/2.png"]
        seen.clear()
    for wrong, why in (("{a", "the braces of"), ("ftp://b/*.jpg", "ftp://b/.* is a URL of an")):
        with pytest.raises(UserError, match=f"^--images: {why}"):
            run(embed, embed_arguments, monkeypatch, "model", f"--images={wrong}", options[1])

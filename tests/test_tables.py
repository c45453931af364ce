"""Tests the encodings, separators, quotes and column names of tables, and images in Parquet."""

import csv
import io
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disco_jax.config import default
from disco_jax.data import parquet_images
from disco_jax.data.load import Load, usable_captions
from disco_jax.data.source import BadSample
from disco_jax.data.sources import open_source
from disco_jax.data.table_source import TableSource
from disco_jax.data.text_table import Dialect
from disco_jax.errors import UserError
from tests.tars import picture

CAPTIONS = ["plain", 'a "quoted" word', "one, two; three | four", '5" pipe', "naïve 東京", "a\tb"]


def paths_and_captions(source) -> list[tuple[str, str]]:
    """Returns the file names and captions of a table whose images are missing.

    The keys of its bad samples are the paths of the images.
    """
    found = []
    for i in range(len(source)):
        with pytest.raises(BadSample) as bad:
            _ = source[i]
        found.append((Path(bad.value.key).name, source._columns[-1][i].as_py().decode()))
    return found


def open_table(path, **fields):
    data = default().data
    data.update(image_key="auto", caption_key="auto")
    data.update(fields)
    return open_source(data, str(path), "")


def text_of(rows, **options) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_separators_and_encodings_are_found_out(separator, encoding, tmp_path):
    rows = [(f"{i}.jpg", caption) for i, caption in enumerate(CAPTIONS)]
    for suffix in ("csv", "tsv", "CSV", "Tsv"):
        for ends in ("\r\n", "\n"):
            path = tmp_path / f"t.{suffix}"
            text = text_of([("path", "text"), *rows], delimiter=separator, lineterminator=ends)
            path.write_bytes(text.encode(encoding))
            source = open_table(path)
            assert paths_and_captions(source.sources[0]) == rows
            assert not source.problems


def test_what_cannot_be_found_out_is_set(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("image:caption\n1.jpg:caf\xe9\n2.jpg:it's 'so'\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"no column called .*; its columns are 'image:caption'"):
        open_table(path)
    source = open_table(path, separator=":", encoding="latin-1", quote="'")
    assert paths_and_captions(source.sources[0]) == [("1.jpg", "café"), ("2.jpg", "it's 'so'")]
    path.write_text('image\tcaption\n1.jpg\t"one"\n2.jpg\t"two\n3.jpg\tthree"\n')
    source = open_table(path, separator=r"\t", quote="")
    assert [caption for _, caption in paths_and_captions(source.sources[0])] == [
        '"one"',
        '"two',
        'three"',
    ]
    path.write_bytes(b"image,caption\n1.jpg,caf\xe9\n")
    with pytest.raises(UserError, match=r"data\.encoding: .* can't be read as ascii"):
        open_table(path, encoding="ascii")


@pytest.mark.parametrize(
    ("header", "row", "caption"),
    [
        ("image,caption", " 1.jpg , one", " one"),
        (" Image , CAPTION", " 1.jpg , one", "one"),
        ('"image", "caption"', '1.jpg, "one, two"', "one, two"),
        ("image , Caption\t", '1.jpg , "one\ntwo"', "one\ntwo"),
    ],
)
def test_blanks_and_case_of_columns_do_not_matter(header, row, caption, tmp_path):
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    source = open_table(tmp_path / "t.csv", image_key="image", caption_key="caption")
    assert paths_and_captions(source.sources[0]) == [("1.jpg", caption)]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,Caption,CAPTION", "'image', 'Caption', 'CAPTION'"),  # either may be meant
        ("image;words", "its columns, separated by a semicolon, are 'image', 'words'"),
        ("image", "its columns are 'image'"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_those_that_are(header, message, tmp_path):
    (tmp_path / "t.csv").write_text(f"{header}\n1.jpg,one,two\n")
    with pytest.raises(UserError, match=re.escape(message)):
        open_table(tmp_path / "t.csv", caption_key="caption")


# Lines of a table of images and captions, and the captions that they hold.
QUOTES = {
    "open": (['0.jpg\t"zero', "1.jpg\tone", '2.jpg\t"two"'], ['"zero', "one", "two"]),
    "open, closed later": (['0.jpg\t"zero', "1.jpg\tone", '2.jpg\ttwo"'], ['"zero', "one", 'two"']),
    "open, closed in the next": (['0.jpg\t"zero', '1.jpg\tone"'], ['"zero', 'one"']),
    "open in the last": (["0.jpg\tzero", '1.jpg\t"one\n'], None),
    "several": (['0.jpg\t"a', '1.jpg\t"b', '2.jpg\t"c'], ['"a', '"b', '"c']),
    "inside": (['0.jpg\t5" pipe', '1.jpg\tsay "x"'], ['5" pipe', 'say "x"']),
    "over lines": (['0.jpg\t"a\n\nb"', "1.jpg\tone"], ["a\n\nb", "one"]),
    "over lines, separators": (['0.jpg\t"a\tb\nc\td"', "1.jpg\tone"], ["a\tb\nc\td", "one"]),
}


@pytest.mark.parametrize("case", QUOTES)
@pytest.mark.parametrize("swapped", [False, True])
def test_no_row_is_lost_to_a_quote(case, swapped, tmp_path):
    lines, captions = QUOTES[case]
    if swapped:  # the caption comes first
        lines = ["\t".join(line.split("\t", 1)[::-1]) for line in lines]
        if case == "over lines":
            assert lines[0] == '"a\n\nb"\t0.jpg'
    header = "caption\timage" if swapped else "image\tcaption"
    (tmp_path / "t.tsv").write_text("\n".join([header, *lines]))
    source = open_table(tmp_path / "t.tsv")
    found = paths_and_captions(source.sources[0])
    assert [name for name, _ in found] == [f"{i}.jpg" for i in range(len(lines))]
    if captions:
        assert [caption for _, caption in found] == captions


def test_rows_that_do_not_fit_the_header_are_counted_by_line(tmp_path):
    text = 'image,caption\n0.jpg,"a\nb"\n1.jpg\n\n2.jpg,b,c\n3.jpg,d\n'
    (tmp_path / "t.csv").write_text(text)
    source = pickle.loads(pickle.dumps(open_table(tmp_path / "t.csv")))
    assert len(source) == 2
    assert source.problems == {"broken_row": 2}
    assert source.left_out() == [
        ("broken_row", f"{tmp_path}/t.csv, line 4", "1 columns instead of 2"),
        ("broken_row", f"{tmp_path}/t.csv, line 6", "3 columns instead of 2"),
    ]
    (tmp_path / "t.csv").write_bytes(b"image,caption\n1.jpg\xff\n")
    with pytest.raises(UserError, match="no rows that can be used: 1 broken_row"):
        open_table(tmp_path / "t.csv")


def mutated(rng: np.random.Generator, text: str, separator: str) -> str:
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(text) + 1)), int(rng.integers(1, 30))
        end = text.find("\n", at)
        match rng.integers(9):
            case 0:
                text = text[:at] + '"' + text[at:]
            case 1:  # where a value starts or ends
                at = text.find(separator, at) + int(rng.integers(2))
                text = text[:at] + '"' + text[at:]
            case 2:
                text = text[:end] + '"' + text[end:]
            case 3:
                text = text[:at] + text[at + length :]
            case 4:
                text = text[:at] + separator * int(rng.integers(1, 3)) + text[at:]
            case 5:
                text = text[:at] + "\n" * int(rng.integers(1, 3)) + text[at:]
            case 6:
                text = text[:at] + text[at : at + length] + text[at:]
            case 7:
                text = text[: max(at, 60)]
            case 8:  # one value's start and a later one's end
                at = text.find(separator, at) + 1
                end = text.find("\n", at + int(rng.integers(200)))
                text = text[:at] + '"' + text[at:end] + '"' + text[end:]
    return text


def test_mutated_tables_lose_no_row(tmp_path):
    """Every line is read, reported as broken, or part of a value; whole rows are always read."""
    rng = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for trial in range(1200):
        separator = ",\t;|"[trial % 4]
        encoding = ("utf-8", "utf-16", "utf-8-sig")[trial // 3 % 3]
        order = rng.permutation(2)
        captions = [CAPTIONS[i % 6] + f" {i}" for i in range(12)]
        if trial % 5 == 0:
            captions[3] = "two\nlines, the second"
        rows = [("image", "caption"), *((f"img/{i}.jpg", c) for i, c in enumerate(captions))]
        quoting = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)[trial % 2]
        whole = text_of(
            [[row[k] for k in order] for row in rows],
            delimiter=separator,
            quoting=quoting,
            lineterminator="\n",
        )
        if trial % 3 == 0:  # joined without quotes
            whole = "\n".join(separator.join(row) for row in rows if "\n" not in row[1])
        text = mutated(rng, whole, separator)
        raw = text.encode(encoding)
        if trial % 11 == 0:
            raw = raw[: int(rng.integers(len(raw)))]
            text = raw.decode(encoding, errors="replace")
        path = tmp_path / "t.csv"
        path.write_bytes(raw)
        try:
            source = TableSource(path, "image", "caption", Dialect())
        except UserError as error:
            outcomes["\n" in str(error) or re.sub(r"\S*t\.csv", "", str(error))[:25]] += 1
            continue
        found = [bad_key(source, i) for i in range(len(source))]
        broken = source.problems["broken_row"]
        header, *lines = [line for line in text.split("\n") if line]
        values = [column.to_pylist() for column in source._columns]
        inside = sum(value.count(b"\n") for column in values for value in column)
        assert len(source) + broken <= len(lines)
        assert len(source) + broken + inside >= len(lines)
        for line in whole.split("\n")[1:] if whole.startswith(f"{header}\n") else []:
            image = re.search(r"img/\d+\.jpg", line)
            if image and line in lines and is_whole(line, separator):
                assert str(tmp_path / image[0]) in found, (trial, line)
        outcomes["read"] += 1
        outcomes["broken_row"] += broken
    assert not outcomes[True]  # each message is one line
    assert outcomes["read"] > 700
    assert outcomes["broken_row"] > 200


def bad_key(source, index: int) -> str:
    with pytest.raises(BadSample) as bad:
        _ = source[index]
    return bad.value.key


def is_whole(line: str, separator: str) -> bool:
    """Returns whether a line is a row by itself."""
    reader = csv.reader(iter([line, "x"]), delimiter=separator)
    return len(next(reader)) == 2 and reader.line_num == 1


@pytest.mark.parametrize("kind", ["bytes", "large", "struct", "struct of paths", "paths as bytes"])
def test_images_inside_parquet_are_read_by_row_group(kind, tmp_path, monkeypatch):
    images = [picture(i) for i in range(10)]
    for i, image in enumerate(images):
        (tmp_path / f"{i}.jpg").write_bytes(image)
    names = [f"{i}.jpg" for i in range(10)]
    column = {
        "bytes": pa.array(images),
        "large": pa.array(images, pa.large_binary()),
        "struct": pa.array([{"bytes": x, "path": n} for x, n in zip(images, names, strict=True)]),
        "struct of paths": pa.array([{"bytes": None, "path": name} for name in names]),
        "paths as bytes": pa.array([name.encode() for name in names]),
    }[kind]
    table = pa.table({"image": column, "text": [["", f"number {i}"] for i in range(10)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    read = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: read.append(group) or real(self, group, **options),
    )
    source = pickle.loads(pickle.dumps(open_table(tmp_path / "t.parquet")))
    assert not read
    data = default().data
    load = Load(source, data, 16)
    for i in range(10):
        assert source[i].image == images[i]
        assert load.evaluate(i).captions == (f"number {i}",)
    inside = kind in ("bytes", "large", "struct", "struct of paths")
    assert read == ([0, 1, 2, 3] if inside else [])
    if inside:
        monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 10)
        with pytest.raises(UserError, match="write the table with less"):
            open_table(tmp_path / "t.parquet")


def test_bad_images_inside_parquet_are_told_by_row(tmp_path):
    column = pa.array([{"bytes": x, "path": None} for x in (picture(0), None, b"<html>", b"")])
    pq.write_table(pa.table({"image": column, "caption": list("abcd")}), tmp_path / "t.parquet")
    data = default().data
    load = Load(open_table(tmp_path / "t.parquet"), data, 16)
    assert load.evaluate(0).captions == ("a",)
    for i, kind in ((1, "missing_image"), (2, "not_an_image"), (3, "missing_image")):
        with pytest.raises(BadSample) as bad:
            load.evaluate(i)
        assert bad.value.kind == kind
        assert bad.value.key == f"{tmp_path}/t.parquet, row {i + 1}"
    pq.write_table(pa.table({"image": [{"x": 1}], "caption": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(
        UserError, match=r"data\.image_key: .* is a struct of x; it must have bytes"
    ):
        open_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("captions", [True, False])
def test_tables_without_rows_are_errors(captions, tmp_path):
    empty = {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}
    pq.write_table(pa.table(empty), tmp_path / "t.parquet")
    for name, content in (
        ("a.csv", b"image,caption\n"),
        ("b.csv", b"\n\n"),
        ("c.csv", b"\xff\xfe"),
        ("d.csv", b""),
    ):
        (tmp_path / name).write_bytes(content)
    for name in ("t.parquet", "a.csv", "b.csv", "c.csv", "d.csv"):
        with pytest.raises(UserError, match=r"has no (rows|header)|: it is empty$"):
            open_source(default().data, f"{tmp_path}/{name}", "", captions=captions)


def test_damaged_parquet_is_an_error_or_bad_samples(tmp_path):
    """The file is cut short anywhere, or bytes before its footer are changed."""
    rng = np.random.default_rng(0)
    images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(6)]
    captions = [["", f"número {i}"] for i in range(6)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": images, "caption": captions}), path, row_group_size=2)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    seen: Counter[str] = Counter()
    for trial in range(150):
        data = bytearray(whole)
        for at in rng.integers(4, footer, 2):
            data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data[: rng.integers(len(data))] if trial % 3 == 0 else data)
        try:
            source = open_table(path)
        except UserError as error:
            seen["opening" if "can't be read" in str(error) else str(error)] += 1
            continue
        for i in range(len(source)):
            try:
                usable_captions(source[i])
                seen["good"] += 1
            except BadSample as bad:
                seen[bad.kind] += 1
    assert seen["opening"] >= 50
    assert seen["unreadable"] > 5
    assert seen["good"] > 100
    assert seen.keys() <= {"opening", "good", "unreadable", "broken_caption", "missing_image"}


def test_several_tables_are_one_source(tmp_path):
    for name, numbers in (("a.csv", (0, 1)), ("b.csv", (2,)), ("c.csv", (3, 4))):
        rows = "".join(f"{i}.jpg,number {i}\n" for i in numbers)
        (tmp_path / name).write_text(f"image,caption\n{rows}")
    source = open_table(tmp_path / "*.csv")
    assert len(source) == 5
    assert len(source.sources) == 1  # so they share one weight of data.weights
    keys = [bad_key(source, i) for i in range(5)]
    assert keys == [str(tmp_path / f"{i}.jpg") for i in range(5)]
    assert source.fingerprint.startswith("3 tables, 5 rows, ")
    changed = source.fingerprint
    (tmp_path / "b.csv").write_text("image,caption\n2.jpg,another\n")
    assert open_table(tmp_path / "*.csv").fingerprint != changed


def test_a_missing_column_of_retrieval_is_told_by_its_own_field(tmp_path):
    (tmp_path / "t.csv").write_text("image,words\n0.jpg,zero\n")
    with pytest.raises(
        UserError, match=r"^eval\.retrieval_caption_key: .* has no column 'caption'"
    ):
        open_source(default().data, f"{tmp_path}/t.csv", "", field="eval.retrieval_name")

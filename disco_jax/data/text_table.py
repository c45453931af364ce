"""Reads CSV and TSV tables in any encoding, with any separator, and without losing rows to a quote.

A quoted value may span lines, so parsers take everything after an unclosed quote for one value.
Tables are read by pyarrow, which is fast. If the number of its rows differs from the number of
lines, they are read again, record by record.
"""

import codecs
import csv
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from disco_jax.data import columns
from disco_jax.data.source import IMAGE_EXTENSIONS, MAX_TEXT_BYTES
from disco_jax.errors import UserError
from disco_jax.storage.urls import Place

SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BLOCK = 16 << 20  # bytes that pyarrow parses at once, which a row must fit in
_CHUNK = 100_000  # rows


class Dialect(NamedTuple):
    """How a table is written: the `config.data` fields of the same names."""

    separator: str = ""
    encoding: str = ""
    quote: str = '"'


FOUND_OUT = Dialect()


# Columns by config field: one `image_key`, then any number of `caption_key`.
Keys = Sequence[tuple[str, str]]


class TextTable(NamedTuple):
    """The wanted columns of a table, and the rows that have more or fewer columns than the header.

    Values are bytes, because a column that looks like numbers is text all the same, and invalid
    UTF-8 makes a bad sample instead of failing the whole table.
    """

    columns: list[pa.Array]  # large_binary, equally long
    broken: list[tuple[int, str]]  # the number of the row's first line, from 1, and what is wrong


def read_text_table(file: Path, path: Place, keys: Keys, dialect: Dialect) -> TextTable:
    """Reads the columns that `keys` names.

    Args:
      file: the file.
      path: its name for people, and for its suffix: that of a remote table if `file` is a copy.
      keys: the columns.
      dialect: how it is written.

    Raises:
      UserError: if the file is empty, can't be decoded or lacks a column.
      OSError: if it can't be read.
    """
    if not file.stat().st_size:
        raise UserError(f"{path} can't be read: it is empty")
    with file.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # closed with its last user
    text = _as_utf8(path, data, dialect.encoding)
    header = re.search(rb"[^\r\n]+", text)
    if header is None:
        raise UserError(f"{path} can't be read: it has no header")
    layout, wanted = _header(path, _decode(header[0]), keys, dialect)
    rows = memoryview(text)[header.end() :]
    read = _read_fast(rows, layout, wanted)
    if read is None:
        first = len(text[: header.end()].splitlines())
        read = _read_records(bytes(rows), first, layout, wanted)
    return read


class _Layout(NamedTuple):
    separator: str
    quote: str  # "": none
    padded: bool  # whether a blank follows each separator
    width: int  # columns
    image: int  # the column of images


def _as_utf8(path: Place, data: mmap.mmap, encoding: str) -> bytes | mmap.mmap:
    start = data[:4]
    if not encoding:
        encoding = next((name for bom, name in _BOMS.items() if start.startswith(bom)), "")
    if not encoding and b"\0" in start[:2]:
        encoding = "utf-16-be" if start[0] == 0 else "utf-16-le"
    if not encoding or codecs.lookup(encoding).name == "utf-8":
        return data
    if encoding == "utf-8-sig":
        return data[len(codecs.BOM_UTF8) :]
    try:
        return data[:].decode(encoding).removeprefix("\ufeff").encode()
    except ValueError as error:
        raise UserError(f"data.encoding: {path} can't be read as {encoding}: {error}") from error


def _header(path: Place, line: str, keys: Keys, dialect: Dialect) -> tuple[_Layout, list[int]]:
    """Returns the layout that the first line shows, and the positions of the wanted columns."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    given = dialect.separator.replace(r"\t", "\t")
    best: tuple[list[str], str] = ([], "")
    for separator in [given] if given else dict.fromkeys((usual, *SEPARATORS)):
        names = _split(line, separator, dialect.quote, padded=True)
        places = [columns.find(names, field, key) for field, key in keys]
        wanted = [place for place in places if place is not None]
        if len(wanted) == len(keys):
            padded = bool(names[1:]) and line.count(f"{separator} ") == line.count(separator)
            return _Layout(separator, dialect.quote, padded, len(names), wanted[0]), wanted
        if len(names) > len(best[0]):
            best = names, separator
    names, separator = best
    field, key = next((f, k) for f, k in keys if columns.find(names, f, k) is None)
    how = f", separated by {SEPARATORS.get(separator, repr(separator))}," if names[1:] else ""
    raise columns.missing(path, names, field, key, how)


def _split(line: str, separator: str, quote: str, padded: bool) -> list[str]:
    """Splits a line; a quote that is not closed in it is an ordinary character."""
    if quote and quote in line:
        # A second line is read only if a quote is open at the end of the first one.
        reader = csv.reader(
            iter([line, ""]), delimiter=separator, quotechar=quote, skipinitialspace=padded
        )
        try:
            fields = next(reader)
            if reader.line_num == 1:
                return fields
        except csv.Error:  # a field that is too long
            pass
    fields = line.split(separator)
    return [field.lstrip(" ") for field in fields] if padded else fields


def _read_fast(text: memoryview, layout: _Layout, wanted: Sequence[int]) -> TextTable | None:
    """Reads the rows, or returns None if they are not as many as the lines."""
    if layout.padded:  # pyarrow does not know a quote after a blank
        return None
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(pa.py_buffer(text)),
            read_options=pa.csv.ReadOptions(
                column_names=[str(i) for i in range(layout.width)],
                block_size=_BLOCK,
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=layout.separator,
                quote_char=layout.quote or False,
                newlines_in_values=bool(layout.quote),
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=[str(i) for i in wanted],
                column_types={str(i): pa.large_binary() for i in wanted},
            ),
        )
    except pa.ArrowException:  # e.g. a row with another number of columns
        return None
    if table.num_rows != _count_lines(text):
        return None
    return TextTable([table.column(str(i)).combine_chunks() for i in wanted], [])


def _count_lines(text: memoryview) -> int:
    """Counts the lines that are not empty."""
    count, after_end = 0, True
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text[start : start + _BLOCK], np.uint8)
        ends = (block == ord("\n")) | (block == ord("\r"))
        count += int((np.concatenate([[after_end], ends[:-1]]) & ~ends).sum())
        after_end = bool(ends[-1])
    return count


def _read_records(text: bytes, first: int, layout: _Layout, wanted: Sequence[int]) -> TextTable:
    """Reads the rows record by record; `first` is the number of the first line."""
    chunks: list[list[pa.Array]] = [[] for _ in wanted]
    rows: list[list[bytes]] = [[] for _ in wanted]
    broken = []
    for number, fields in _records(text.splitlines(keepends=True), layout):
        if len(fields) != layout.width:
            broken.append((first + number, f"{len(fields)} columns instead of {layout.width}"))
            continue
        for column, i in zip(rows, wanted, strict=True):
            column.append(fields[i].encode(errors="surrogateescape"))
        if len(rows[0]) == _CHUNK:
            for chunk, column in zip(chunks, rows, strict=True):
                chunk.append(pa.array(column, pa.large_binary()))
                column.clear()
    for chunk, column in zip(chunks, rows, strict=True):
        chunk.append(pa.array(column, pa.large_binary()))
    return TextTable([pa.concat_arrays(chunk) for chunk in chunks], broken)


def _records(lines: list[bytes], layout: _Layout) -> Iterator[tuple[int, list[str]]]:
    """Yields the fields of each record with the index of its first line."""
    at = 0
    while at < len(lines):
        line = _decode(lines[at]).rstrip("\r\n")
        used = 1
        if line:
            fields = None
            if layout.quote and layout.quote in line:
                fields, used = _over_lines(lines, at, layout)
            yield at, fields or _split(line, layout.separator, layout.quote, layout.padded)
        at += used


def _over_lines(lines: list[bytes], at: int, layout: _Layout) -> tuple[list[str] | None, int]:
    """Returns a record that spans several lines and their number, or None and 1 if none does.

    The quotes must then be those of a well-formed record, and it must not hold what looks like rows
    themselves: lines with all columns, and an image's name where it belongs.
    """
    size = 0
    rows: list[int] = []  # which lines look like one

    def feed() -> Iterator[str]:
        nonlocal size
        for k in range(at, len(lines)):
            line = _decode(lines[k])
            size += len(line)
            if _looks_like_row(line, layout):
                rows.append(k)
                if k > at and layout.quote not in line:
                    return  # refused in any case: saves looking for a quote far below
            if size > MAX_TEXT_BYTES:
                return
            yield line

    reader = csv.reader(
        feed(),
        delimiter=layout.separator,
        quotechar=layout.quote,
        skipinitialspace=layout.padded,
        strict=True,
    )
    try:
        fields = next(reader)
    except (csv.Error, StopIteration):
        return None, 1
    used = reader.line_num
    if used == 1 or len(fields) != layout.width:
        return None, 1
    # The last line may look like a row if the image comes after a caption of several lines.
    last = at + used - 1
    named = _decode(lines[last]).rstrip("\r\n").split(layout.separator)
    own = rows == [last] and fields[layout.image] == named[layout.image].strip(f" {layout.quote}")
    return (fields, used) if own or rows in ([], [at]) else (None, 1)


def _looks_like_row(line: str, layout: _Layout) -> bool:
    fields = line.rstrip("\r\n").split(layout.separator)
    if len(fields) != layout.width:
        return False
    name = fields[layout.image].strip(f" {layout.quote}").lower()
    return name.rpartition(".")[2] in IMAGE_EXTENSIONS


def _decode(line: bytes) -> str:
    return line.decode(errors="surrogateescape")

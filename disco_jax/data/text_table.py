"""Reads CSV and TSV tables in any encoding, with any separator, and without losing rows to a quote.

A quoted value may span lines, so parsers take all rows after a quote that is never closed for one
value. Tables are read by pyarrow, which
is fast. Where its rows are not as many as the lines, they are read again, record by record.
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


class TextTable(NamedTuple):
    """The wanted columns of a table, and the rows that have more or fewer columns than the header.

    Values are bytes, because a column that looks like numbers is text all the same, and invalid
    UTF-8 makes a bad sample instead of failing the whole table.
    """

    columns: list[pa.Array]  # large_binary, equally long
    broken: list[tuple[int, str]]  # the number of the row's first line, from 1, and what is wrong


def read_text_table(path: Path, keys: dict[str, str], dialect: Dialect) -> TextTable:
    """Reads the columns that `keys` names, by config field: `image_key` and `caption_key`.

    Raises:
      UserError: if the file is empty, can't be decoded or lacks a column.
      OSError: if it can't be read.
    """
    if not path.stat().st_size:
        raise UserError(f"{path} can't be read: it is empty")
    with path.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # closed with its last user
    text = _as_utf8(path, data, dialect.encoding)
    names, wanted, separator = _header(path, text, keys, dialect)
    layout = _Layout(separator, dialect.quote, len(names), wanted["image_key"])
    read = _read_fast(text, layout, list(wanted.values()))
    return read or _read_records(text, layout, list(wanted.values()))


class _Layout(NamedTuple):
    separator: str
    quote: str  # "": none
    width: int  # columns
    image: int  # the column of images


def _as_utf8(path: Path, data: mmap.mmap, encoding: str) -> bytes | mmap.mmap:
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


def _header(
    path: Path, text: bytes | mmap.mmap, keys: dict[str, str], dialect: Dialect
) -> tuple[list[str], dict[str, int], str]:
    """Returns the names of all columns, the positions of the wanted ones, and the separator."""
    line = re.search(rb"[^\r\n]+", text)
    if line is None:
        raise UserError(f"{path} can't be read: it has no header")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    given = dialect.separator.replace(r"\t", "\t")
    best: tuple[list[str], str] = ([], "")
    for separator in [given] if given else dict.fromkeys((usual, *SEPARATORS)):
        names = _split(_decode(line[0]), separator, dialect.quote)
        found = {field: columns.find(names, field, key) for field, key in keys.items()}
        if None not in found.values():
            return names, {field: i for field, i in found.items() if i is not None}, separator
        if len(names) > len(best[0]):
            best = names, separator
    names, separator = best
    field, key = next((f, k) for f, k in keys.items() if columns.find(names, f, k) is None)
    how = f", separated by {SEPARATORS.get(separator, repr(separator))}," if names[1:] else ""
    raise columns.missing(path, names, field, key, how)


def _split(line: str, separator: str, quote: str) -> list[str]:
    """Splits a line; a quote that is not closed in it is an ordinary character."""
    if quote and quote in line:
        # A second line is read only if a quote is open at the end of the first one.
        reader = csv.reader(iter([line, ""]), delimiter=separator, quotechar=quote)
        try:
            fields = next(reader)
            if reader.line_num == 1:
                return fields
        except csv.Error:  # a field that is too long
            pass
    return line.split(separator)


def _read_fast(text: bytes | mmap.mmap, layout: _Layout, wanted: Sequence[int]) -> TextTable | None:
    """Reads the table, or returns None if its rows are not its lines."""
    wrong = []

    def skip(row: pa.csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(pa.py_buffer(text)),
            read_options=pa.csv.ReadOptions(
                column_names=[str(i) for i in range(layout.width)],
                skip_rows_after_names=1,
                block_size=_BLOCK,
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=layout.separator,
                quote_char=layout.quote or False,
                newlines_in_values=bool(layout.quote),
                invalid_row_handler=skip,
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=[str(i) for i in wanted],
                column_types={str(i): pa.large_binary() for i in wanted},
            ),
        )
    except pa.ArrowException:  # e.g. a value that is larger than a block
        return None
    if wrong or table.num_rows + 1 != _count_lines(text):
        return None
    return TextTable([table.column(str(i)).combine_chunks() for i in wanted], [])


def _count_lines(text: bytes | mmap.mmap) -> int:
    """Counts the lines that are not empty."""
    count, after_end = 0, True
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text[start : start + _BLOCK], np.uint8)
        ends = (block == ord("\n")) | (block == ord("\r"))
        count += int((np.concatenate([[after_end], ends[:-1]]) & ~ends).sum())
        after_end = bool(ends[-1])
    return count


def _read_records(text: bytes | mmap.mmap, layout: _Layout, wanted: Sequence[int]) -> TextTable:
    chunks: list[list[pa.Array]] = [[] for _ in wanted]
    rows: list[list[bytes]] = [[] for _ in wanted]
    broken = []
    records = _records(text[:].splitlines(keepends=True), layout)
    next(records)  # the header
    for number, fields in records:
        if len(fields) != layout.width:
            broken.append((number, f"{len(fields)} columns instead of {layout.width}"))
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
    """Yields the fields of each record with the number of its first line."""
    at = 0
    while at < len(lines):
        line = _decode(lines[at]).rstrip("\r\n")
        used = 1
        if line:
            fields = None
            if layout.quote and layout.quote in line:
                fields, used = _over_lines(lines, at, layout)
            yield at + 1, fields or _split(line, layout.separator, layout.quote)
        at += used


def _over_lines(lines: list[bytes], at: int, layout: _Layout) -> tuple[list[str] | None, int]:
    """Returns a record that spans several lines and their number, or None and 1 if none does.

    The quotes must then be those of a well-formed record, and it must not hold what looks like rows
    of their own: lines with all columns, and an image's name where it belongs.
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
                    return
            if size > MAX_TEXT_BYTES:
                return
            yield line

    reader = csv.reader(feed(), delimiter=layout.separator, quotechar=layout.quote, strict=True)
    try:
        fields = next(reader)
    except (csv.Error, StopIteration):
        return None, 1
    used = reader.line_num
    if used == 1 or len(fields) != layout.width:
        return None, 1
    # The last line may look like a row if the image comes after a caption of several lines.
    last = _decode(lines[at + used - 1]).rstrip("\r\n").split(layout.separator)
    own = rows == [at + used - 1] and fields[layout.image] == last[layout.image]
    return (fields, used) if own or rows in ([], [at]) else (None, 1)


def _looks_like_row(line: str, layout: _Layout) -> bool:
    fields = line.rstrip("\r\n").split(layout.separator)
    if len(fields) != layout.width:
        return False
    name = fields[layout.image].strip(f" {layout.quote}").lower()
    return name.rpartition(".")[2] in IMAGE_EXTENSIONS


def _decode(line: bytes) -> str:
    return line.decode(errors="surrogateescape")

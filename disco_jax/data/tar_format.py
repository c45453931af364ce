"""Locates the members of a tar file from its headers. Nothing is ever extracted.

The standard library's `tarfile` stops silently at a damaged header, can be made to loop by one, and
takes ten times as long. The supported formats are ustar, GNU long names, GNU binary sizes, and the
`path` and `size` records of PAX (POSIX.1-2001, pax interchange format).
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
_ZEROS = bytes(BLOCK)
_LONGEST_NAME = 1 << 16
_PADDING = 1 << 20  # bytes checked after the end marker; tar pads to 10 KiB
_FILES = b"0\0" + b"7"  # type flags of regular files; 7 is a contiguous file


class Sliceable(Protocol):
    """Bytes of which slices can be read: `bytes`, a memory map or a remote file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class Member(NamedTuple):
    """A member's name, the offset of its data in the tar, and its size in bytes.

    Links do not count as files.
    """

    name: str
    offset: int
    size: int
    is_file: bool


class DamagedTar(Exception):
    """The tar can't be read past `offset`. `kind` is `truncated_shard` or `damaged_shard`."""

    def __init__(self, kind: str, offset: int):
        super().__init__(kind, offset)
        self.kind, self.offset = kind, offset


def members(data: Sliceable) -> Iterator[Member]:
    """Yields all members except directories, in order.

    Raises:
      DamagedTar: at the damage, after yielding the members before it. A tar without an end marker
        is truncated, and one with data after the end marker is damaged: members may be missing.
    """
    position, name, size = 0, None, None  # an extended header sets the next member's name and size
    while position < len(data):
        header = data[position : position + BLOCK]
        if header == _ZEROS:
            rest = data[position : position + _PADDING]
            if rest.count(0) < len(rest):
                raise DamagedTar("damaged_shard", position)
            return
        if len(header) < BLOCK:
            raise DamagedTar("truncated_shard", position)
        try:
            plain_name, plain_size, kind = read_header(header)
        except ValueError as error:
            raise DamagedTar("damaged_shard", position) from error
        start = position + BLOCK
        extends = kind in b"LKxg"
        length = plain_size if size is None or extends else size
        if length < 0 or start + length > len(data):
            raise DamagedTar("truncated_shard", position)
        if extends:
            if kind in b"Lx" and length > _LONGEST_NAME:
                raise DamagedTar("damaged_shard", position)
            if kind == b"L":
                name = _text(data[start : start + length])
            elif kind == b"x":
                try:
                    name, size = _pax(data[start : start + length], name, size)
                except ValueError as error:
                    raise DamagedTar("damaged_shard", position) from error
        else:
            full = plain_name if name is None else name
            if kind != b"5" and not full.endswith("/"):
                yield Member(full, start, length, kind in _FILES)
            name = size = None
        position = start + (length + BLOCK - 1) // BLOCK * BLOCK
    raise DamagedTar("truncated_shard", position)


def read_header(header: bytes) -> tuple[str, int, bytes]:
    """Returns the name, size in bytes and type flag in a header block.

    Raises:
      ValueError: if the block is not a header.
    """
    # The checksum is computed with its own field filled with eight spaces.
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156]):
        raise ValueError("the checksum does not match")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name, _number(header[124:136]), header[156:157]


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="surrogateescape")


def _number(field: bytes) -> int:
    """Parses octal digits, or GNU's binary form for larger numbers; otherwise raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    if not all(48 <= digit <= 55 for digit in digits):  # int() also accepts signs and underscores
        raise ValueError(f"{field!r} is not an octal number")
    return int(digits, 8)


def _pax(records: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Reads `path` and `size` from PAX records, each of the form `length key=value\\n`.

    Raises:
      ValueError: if a record is malformed.
    """
    position = 0
    while position < len(records) and records[position]:
        digits = records[position : position + 8].split(b" ", 1)[0]
        if not digits.isdigit() or int(digits) <= len(digits) + 1:
            raise ValueError("malformed PAX record")
        record = records[position + len(digits) + 1 : position + int(digits)]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode(errors="surrogateescape")
        elif key == b"size":
            if not value.isdigit():
                raise ValueError("malformed PAX size")
            size = int(value)
        position += int(digits)
    return name, size

"""Lines of a text file, plain or gzip, in blocks: what every reader stands on. The file's first bytes decide, not its name.

Blocks keep memory at a few megabytes beside the result, whatever the file's size.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from fedssl.data.readers.blocks import BadLines
from fedssl.errors import DataError

BLOCK_BYTES = 1 << 22
LONGEST_LINE_BYTES = 1 << 26
_GZIP_MAGIC = b"\x1f\x8b"


def read_blocks(path: Path, bad: BadLines | None = None, *, is_latin: bool = False) -> Iterator[tuple[int, list[str]]]:
    r"""Whole lines without their ends, some thousand at a time, each block with the number (from 1) of its first line.

    ``\n`` and ``\r\n`` end a line; a byte order mark is dropped. A line that is not UTF-8 goes to ``bad`` and is blank in the
    block, or, where ``is_latin``, is read as Latin-1. Raises DataError, and nothing else, for a file that is missing, empty or
    a gzip that is damaged or cut short.
    """
    bad = BadLines(path) if bad is None else bad
    number, rest = 1, b""
    for block in _read_bytes(path):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            lines = _decode(whole, number, bad, is_latin)
            yield number, lines
            number += len(lines)
        elif len(rest) > LONGEST_LINE_BYTES:
            raise DataError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES >> 20} MiB; is this a text file?")
    if rest:
        yield number, _decode(rest, number, bad, is_latin)
    elif number == 1:
        raise DataError(f"{path}: the file is empty; wanted one event or one user a line")


def first_line(path: Path) -> str:
    """The first line that is not blank. Raises DataError as `read_blocks` does, and where all lines are blank."""
    return first_block(path)[0]


def first_block(path: Path, *, is_text: bool = False) -> list[str]:
    """The lines of the first block that has any that are not blank, without those that are, for a look at what the file is.

    A line that is not UTF-8 is left out too, or, where ``is_text`` and it is the very first, refused. Raises DataError as `read_blocks`
    does, and where all lines are blank.
    """
    bad = BadLines(path, skip=True)
    for first, lines in read_blocks(path, bad):
        if is_text and first == 1 and bad.first.startswith(f"{path}, line 1:"):
            break
        if lines := [line for line in lines if line]:
            return lines
    if bad.count:
        raise DataError(bad.first)
    raise DataError(f"{path}: the file holds blank lines only; wanted one event or one user a line")


def _read_bytes(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as plain:
            is_gzip = plain.read(2) == _GZIP_MAGIC
            plain.seek(0)
            with gzip.open(plain) if is_gzip else plain as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check its spelling") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: a damaged or cut short gzip file ({error}); fetch it again") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise DataError(f"{path}: cannot be read ({error})") from None


def _decode(block: bytes, number: int, bad: BadLines, is_latin: bool) -> list[str]:
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError:
        lines = [_decode_line(line, at, bad, is_latin) for at, line in enumerate(block.split(b"\n"), start=number)]
    else:
        lines = text.split("\n")
    if number == 1:
        lines[0] = lines[0].removeprefix("\ufeff")
    return [line.removesuffix("\r") for line in lines] if b"\r" in block else lines


def _decode_line(line: bytes, number: int, bad: BadLines, is_latin: bool) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_latin:
            return line.decode("latin-1")
        bad.add(number, f"byte 0x{line[error.start]:02x} is not UTF-8; convert the file, as with `iconv -f latin1 -t utf-8`")
        return ""

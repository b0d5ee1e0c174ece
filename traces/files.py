"""Reading and writing of text files, plain or gzip, with errors in one line and nothing left half written."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import cast

from traces.errors import TraceError

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = "\ufeff"


def read_text(path: str | os.PathLike[str]) -> str:
    """Return a file's whole text; for what is small. As `text_lines`."""
    return "".join(text_lines(path))


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a file's lines with their ends, one at a time; gzip is recognised by its first bytes.

    Only a newline ends a line: JSON may hold U+2028. Raises TraceError for a file that is missing or not a file, a gzip that is cut
    short or damaged, and bytes that are not UTF-8: what comes before them has been yielded.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            if file.peek(2).startswith(GZIP_MAGIC):
                yield from _decoded(place, _unpacked(place, file))
                return
            if place.suffix == ".gz" and file.peek(1):
                raise TraceError(f"{path}: is named .gz but is not gzip")
            yield from _decoded(place, file)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: cannot be read: {os_reason(error)}") from None


def _unpacked(path: Path, file: BufferedReader) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from unpacked
    except (EOFError, zlib.error, OSError) as error:
        raise TraceError(f"{path}: the gzip file is cut short or damaged: {error}") from None


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{line[error.start]:02x}"
            raise TraceError(f"{path}:{number}: not UTF-8 text ({wrong})") from None
        yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield a file's lines that are not blank with their numbers from 1."""
    for number, line in enumerate(text_lines(path), start=1):
        if not line.isspace():
            yield number, line.removesuffix("\n")


def write_lines(path: str | os.PathLike[str], lines: Iterable[str], *, overwrite: bool = False) -> None:
    """Write lines to a file as they come, whole or not at all.

    It is gzip if its name ends in .gz, with mtime 0, so that equal text gives equal bytes. Raises TraceError
    if the file is there and `overwrite` is not asked for, or if it cannot be written.
    """
    write = _write_gzip if Path(path).suffix == ".gz" else _write_plain
    replace_file(Path(path), lambda temporary: write(temporary, lines), overwrite=overwrite)


def _write_plain(path: Path, lines: Iterable[str]) -> None:
    with path.open("wb") as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def _write_gzip(path: Path, lines: Iterable[str]) -> None:
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,  # the name is not told
        io.BufferedWriter(cast(io.RawIOBase, packed), 1 << 16) as buffer,
    ):
        buffer.writelines(f"{line}\n".encode() for line in lines)


def replace_file(path: Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    """Let `write` fill a new file beside `path`, then put it in its place in one move."""
    if path.is_dir():
        raise TraceError(f"{path}: is a folder, not a file")
    if not path.parent.is_dir():
        raise TraceError(f"{path}: its folder {path.parent} does not exist")
    if not overwrite and path.exists():
        raise TraceError(f"{path}: already exists; --overwrite replaces it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {os_reason(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def os_reason(error: OSError | ValueError) -> str:
    """Return what the operating system said, without errno and path."""
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).lower()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise TraceError unless a file or folder can be made at this path, so that long work does not end in nothing."""
    parent = Path(path).absolute().parent
    while not parent.exists() and not parent.is_symlink():
        parent = parent.parent
    if not parent.is_dir():
        raise TraceError(f"{path}: cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TraceError(f"{path}: cannot be written: no permission in {parent}")

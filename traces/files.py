"""Reading and writing of text files, plain or gzip, with errors in one line and nothing left half written."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from traces.errors import TraceError

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = "\ufeff"


def read_text(path: str | os.PathLike[str]) -> str:
    """Return a file's text; gzip is recognised by its first bytes.

    Raises TraceError for a file that is missing or not a file, a gzip that is cut short or damaged, and bytes
    that are not UTF-8.
    """
    data = _read_bytes(Path(path))
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise TraceError(f"{path}: cannot be read: {os_reason(error)}") from None
    if not data.startswith(GZIP_MAGIC):
        if path.suffix == ".gz" and data:
            raise TraceError(f"{path}: is named .gz but is not gzip")
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, OSError) as error:
        raise TraceError(f"{path}: the gzip file is cut short or damaged: {error}") from None


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank with their numbers from 1.

    Only a newline ends a line: JSON may hold U+2028.
    """
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line) for number, line in lines if line and not line.isspace()]


def write_lines(path: str | os.PathLike[str], lines: Iterable[str], *, overwrite: bool = False) -> None:
    """Write lines to a file, whole or not at all.

    It is gzip if its name ends in .gz, with mtime 0, so that equal text gives equal bytes. Raises TraceError
    if the file is there and `overwrite` is not asked for, or if it cannot be written.
    """
    text = "".join(f"{line}\n" for line in lines).encode("utf-8")
    data = _gzipped(text) if Path(path).suffix == ".gz" else text
    replace_file(Path(path), lambda temporary: temporary.write_bytes(data), overwrite=overwrite)


def _gzipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(
        filename="", mode="wb", fileobj=buffer, mtime=0
    ) as file:  # compress() names the system
        file.write(data)
    return buffer.getvalue()


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

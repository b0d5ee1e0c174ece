"""The one error that a user can cause."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """An input that cannot be used, told in one line that names the place (file, line, field).

    path: the file or folder at fault, which the line then begins with; `reason` is the line without it, for readers
    who are not to learn where files are.
    """

    def __init__(self, reason: str, *, path: str | Path | None = None) -> None:
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = path

"""Served requests as a native trace file, so that `plan` can be fed with real traffic."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.prefix_keys import BLOCK_TOKENS, keys_of_tokens
from engine.server.tickets import Ticket
from traces.files import os_reason

MAX_BLOCKS = 1_000_000  # prefix blocks that are remembered; the one unused for longest goes first

log = logging.getLogger("engine.server")


class TraceRecorder:
    """Appends one line a request, in order of arrival as a trace must be: a line waits for those that came before it and still run.

    Each line is one write, so a crash leaves whole lines. Lengths are the real ones; what ended without a token is left out. A disk that is full ends
    the recording, never the serving. An observer of the engine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            if os.fstat(self._file).st_size:
                os.close(self._file)
                raise UserError(f"{path}: holds a trace already, and times in a trace may not start again")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {os_reason(error)}") from None
        self._first_s: float | None = None
        self._pending: OrderedDict[int, str | None] = OrderedDict()  # ticket -> its line once it has ended
        self._ranks: dict[str, int | None] = {}
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        self._next_block = 0

    def submitted(self, ticket: Ticket) -> None:
        """Keep a request's place in the order."""
        if self._first_s is None:
            self._first_s = ticket.arrived_s
        self._pending[ticket.number] = None

    def token(self, ticket: Ticket, gap_s: float | None) -> None:
        """Nothing is written before a request ends."""

    def ended(self, ticket: Ticket) -> None:
        """Write the lines that nobody before them holds up any more."""
        self._pending[ticket.number] = self._line(ticket) if ticket.num_tokens else ""
        while self._pending:
            number, line = next(iter(self._pending.items()))
            if line is None:
                return
            del self._pending[number]
            self._write(line)

    def close(self) -> None:
        """Write what has ended, in order, and close the file."""
        for line in self._pending.values():
            self._write(line or "")
        self._pending.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is None or not line:
            return
        try:
            data = line.encode("ascii")
            if os.write(self._file, data) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            log.error("recording stops: %s: %s", self._path.name, os_reason(error))
            os.close(self._file)
            self._file = None

    def _line(self, ticket: Ticket) -> str:
        job = ticket.job
        assert self._first_s is not None
        row: dict[str, Any] = {
            "id": ticket.number,
            "arrival_s": round(ticket.arrived_s - self._first_s, 6),
            "prompt_tokens": len(job.prompt),
            "output_tokens": ticket.num_tokens,
        }
        if job.served_as is not None:
            row |= {"adapter": self._trace_name(ticket), "rank": job.rank}
        blocks = self._prefix_blocks(ticket)
        if blocks:
            row["prefix_blocks"] = blocks
        return json.dumps(row, separators=(",", ":")) + "\n"

    def _trace_name(self, ticket: Ticket) -> str:
        """Return the adapter's name in the trace, where a name has one rank: one replaced by another rank gets the engine's name."""
        name = ticket.job.served_as
        assert name is not None
        return (
            name
            if self._ranks.setdefault(name, ticket.job.rank) == ticket.job.rank
            else str(ticket.job.adapter)
        )

    def _prefix_blocks(self, ticket: Ticket) -> list[int]:
        """Return a number for each whole block of 512 prompt tokens; prompts that begin alike begin with the same numbers."""
        blocks = []
        for key in keys_of_tokens(None, ticket.job.prompt, BLOCK_TOKENS):
            if key not in self._blocks:
                self._blocks[key] = self._next_block
                self._next_block += 1
            self._blocks.move_to_end(key)
            blocks.append(self._blocks[key])
        while len(self._blocks) > MAX_BLOCKS:
            self._blocks.popitem(last=False)
        return blocks

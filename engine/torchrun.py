"""Ranks that torchrun started: the first runs the command, the others join it and do what it says, as those do that it starts itself.

    torchrun --nproc-per-node 2 -m engine serve --config config.json        # with "tp": 2

torchrun's store (env://) tells the others where rank 0 listens, on loopback, and a key made for this run; what is said then goes by that connection.
This module alone reads torchrun's environment variables.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING

from engine.config import ServingConfig
from engine.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from engine.followers import Followers, FollowerTask

LOOPBACK = "127.0.0.1"
MEETING = "loraplan/meeting"  # in the store: where rank 0 listens, or that it needs nobody
WAIT_S = 900.0


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that torchrun started."""

    rank: int
    size: int
    local_size: int

    def check(self, config: ServingConfig) -> None:
        """Raise UserError where a configuration does not want exactly these processes."""
        if config.replicas != 1:
            raise UserError(
                f"torchrun runs one replica, replicas={config.replicas}: without it the command starts all"
            )
        if self.size != config.tp:
            raise UserError(
                f"WORLD_SIZE={self.size}, tp={config.tp}: torchrun must start as many processes as tp says"
            )
        if self.local_size != self.size:
            raise UserError(
                f"WORLD_SIZE={self.size}, LOCAL_WORLD_SIZE={self.local_size}: all ranks must be on one host"
            )


def world() -> World | None:
    """Return this process's place, None where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, size, local_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return World(rank, size, local_size)


# ---- on rank 0 ----


def gather(here: World, task: FollowerTask) -> Followers:
    """Hand the other ranks their task, and return them. They end this process when one of them is gone, as torchrun would."""
    from engine.followers import Followers

    key, store = secrets.token_bytes(32), _store(here)
    pipes: dict[int, Connection] = {}
    with Listener((LOOPBACK, 0), backlog=here.size, authkey=key) as listener:
        told = json.dumps({"port": listener.address[1], "key": key.hex()})
        if store.compare_set(MEETING, "", told) != told.encode():
            raise RuntimeError("the ranks that torchrun started follow one engine only")
        while len(pipes) < here.size - 1:
            try:
                connection = listener.accept()
            except (AuthenticationError, EOFError, OSError):  # a stranger
                continue
            _send_at_once(connection)
            pipes[connection.recv()] = connection
    for rank, connection in pipes.items():
        connection.send(replace(task, rank=rank))
    return Followers([pipes[rank] for rank in sorted(pipes)], end_on_loss=True)


def dismiss(here: World) -> None:
    """Let the other ranks go, if the command built no engine for them to join."""
    _store(here).compare_set(MEETING, "", "null")


# ---- on the others ----


def join(here: World) -> None:
    """Follow rank 0 until it is done."""
    from engine.followers import follow
    from engine.processes import end_with_parent

    end_with_parent()  # torchrun's agent sends its signals to all; rank 0 says when to stop
    meeting = json.loads(_store(here).get(MEETING))
    if meeting is None:
        return
    with Client((LOOPBACK, meeting["port"]), authkey=bytes.fromhex(meeting["key"])) as connection:
        _send_at_once(connection)
        connection.send(here.rank)
        try:
            task = connection.recv()
        except EOFError:
            return
        follow(task, connection)


def _store(here: World) -> Store:
    """Return the store that torchrun keeps for its processes."""
    from torch.distributed.rendezvous import rendezvous

    store: Store
    store, _, _ = next(rendezvous("env://", here.rank, here.size, timeout=timedelta(seconds=WAIT_S)))
    store.set_timeout(timedelta(seconds=WAIT_S))
    return store


def _send_at_once(connection: Connection) -> None:
    """Have small messages sent without waiting for the other side's acknowledgement, which may take it 40 ms."""
    with socket.socket(fileno=os.dup(connection.fileno())) as copy:
        copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

"""`python -m engine serve`: builds everything, listens, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.adapter import AdapterSpec
from engine.build import build_runner
from engine.config import ServingConfig
from engine.engine import Engine
from engine.errors import UserError
from engine.model_shape import load_model_shape
from engine.replicated_engine import ReplicatedEngine
from engine.server.adapters import AdapterFolder, AdapterRegistry, check_name
from engine.server.api_keys import ApiKeys, load_api_keys
from engine.server.app import Gate, new_app
from engine.server.async_engine import AsyncEngine, Observer
from engine.server.engine_thread import AnyEngine
from engine.server.errors import Scrubber
from engine.server.limits import ServerLimits
from engine.server.metrics import Metrics
from engine.server.recorder import TraceRecorder
from engine.server.serving import ServedModel, Serving, base_name
from engine.server.text import TextCodec, load_codec

DEFAULT_MAX_RANK = 64  # of adapters that come while serving, where the configuration does not say
DEFAULT_MAX_ON_GPU = 256
GRACE_S = 5  # what connections get to send their last bytes in, after the drain
# Python's 5 ms would be what the engine's thread waits, whenever it comes back from the GPU, while the event loop is busy with text: 5.3 ms in the
# median with 5 ms, 0.7 with 0.5, 0.3 with 0.1 (two threads on 2 shared cores, 2026-11-22).
SWITCH_INTERVAL_S = 1e-4

log = logging.getLogger("engine.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the command line says, but for the engine's configuration. tokenizer: a folder; None is the model's own."""

    limits: ServerLimits = field(default_factory=ServerLimits)
    adapter_dir: Path | None = None
    api_keys: Path | None = None
    record: Path | None = None
    served_name: str | None = None
    tokenizer: Path | None = None
    seed: int = 0


class Server:
    """Everything that serves, put together; `app` is the application, whose lifespan starts and stops the engine's thread."""

    def __init__(
        self,
        engine: AnyEngine,
        codec: TextCodec,
        options: ServerOptions,
        keys: ApiKeys,
        recorder: TraceRecorder | None,
    ) -> None:
        config, plan = engine.blueprint.config, engine.blueprint
        limits, name = options.limits, options.served_name or base_name(config.model)
        roots = [Path(config.model), Path.cwd(), Path.home(), *filter(None, [options.adapter_dir])]
        scrub = Scrubber(roots)
        self.metrics = Metrics(name, plan.max_adapters)
        self.recorder = recorder
        observers: list[Observer] = [self.metrics, *filter(None, [recorder])]
        most = config.max_num_seqs * config.replicas + limits.max_queue
        self.engine = AsyncEngine(engine, max_unfinished=most, scrub=scrub, observers=observers)
        adapters = AdapterRegistry(
            self.engine,
            store=engine.store,
            num_layers=plan.model.num_layers,
            base_name=name,
            start=plan.adapters,
            folder=None if options.adapter_dir is None else AdapterFolder(options.adapter_dir, limits),
            limits=limits,
            scrub=scrub,
        )
        model = ServedModel(
            name=name,
            max_model_len=config.max_model_len,
            page_tokens=config.page_tokens if config.prefix_caching else None,
            created=int(time.time()),
        )
        self.serving = Serving(model, self.engine, codec, adapters, limits)
        self.gate = Gate(keys, limits)
        self.app = new_app(self.serving, self.engine, self.metrics, self.gate)
        self.app.router.lifespan_context = self._lifespan
        self._drain_timeout_s = limits.drain_timeout_s

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.stop()
            await asyncio.to_thread(self.engine.thread.engine.close)
            self.serving.close()
            if self.recorder is not None:
                self.recorder.close()

    async def drain(self) -> None:
        """Take nobody new; let what runs finish for as long as the drain timeout says, then end it."""
        self.gate.draining = True
        log.info("draining: %d generations run", self.engine.num_active)
        try:
            await asyncio.wait_for(self.engine.wait_idle(), self._drain_timeout_s)
        except TimeoutError:
            log.warning("%d generations did not end in time", self.engine.num_active)
            self.engine.abort_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.engine.wait_idle(), GRACE_S)


class DrainingServer(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT, and listens meanwhile so as to answer 503; the second ends it at once."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals for the time of serving; uvicorn's own would raise them again at the end, and so not exit with 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or stop waiting for it."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._server.drain()
        self.should_exit = True


def build_server(
    config: ServingConfig,
    adapters: Mapping[str, AdapterSpec],
    options: ServerOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Server:
    """Build engine and server. Raises UserError for what does not fit together, before weights are loaded where it can."""
    config = _with_room_for_adapters(config, adapters, options)
    for name in adapters:
        try:
            check_name(name)
        except ValueError as error:
            raise UserError(f"adapter name {name!r} {error}") from None
    served_name = options.served_name or base_name(config.model)
    if served_name in adapters:
        raise UserError(
            f"adapter {served_name!r} has the base model's name; --served-model-name gives that another"
        )
    folder = options.tokenizer or Path(config.model)
    if options.adapter_dir is not None and not options.adapter_dir.is_dir():
        raise UserError(f"--adapter-dir {options.adapter_dir}: no such folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: no folder with a tokenizer; --tokenizer names one")
    codec = load_codec(folder, load_model_shape(config.model).vocab_size)
    keys = ApiKeys({}) if options.api_keys is None else load_api_keys(options.api_keys)
    recorder = None if options.record is None else TraceRecorder(options.record)
    return Server(_build_engine(config, adapters, options.seed, progress), codec, options, keys, recorder)


def _build_engine(
    config: ServingConfig,
    adapters: Mapping[str, AdapterSpec],
    seed: int,
    progress: Callable[[str], None],
) -> AnyEngine:
    if config.replicas > 1:
        progress(f"building {config.replicas} replicas")
        return ReplicatedEngine(config, adapters, seed=seed)
    runner = build_runner(config, adapters, seed=seed, progress=progress)
    return Engine(runner.blueprint, runner, keep_steps=False, cache_outputs=True)


def _with_room_for_adapters(
    config: ServingConfig, adapters: Mapping[str, AdapterSpec], options: ServerOptions
) -> ServingConfig:
    """Return a configuration that takes adapters while it runs, if there is a folder to take them from."""
    if options.adapter_dir is None:
        return config
    largest = max((max(spec.module_ranks) for spec in adapters.values()), default=0)
    return config.with_changes(
        max_adapter_rank=config.max_adapter_rank or max(DEFAULT_MAX_RANK, largest),
        max_adapters=config.max_adapters or max(DEFAULT_MAX_ON_GPU, len(adapters)),
    )


def serve(server: Server, host: str, port: int, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until a signal ends it."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        backlog=2048,
    )
    try:
        asyncio.run(_serve(DrainingServer(config, server), ready))
    except SystemExit:  # uvicorn's way to say that it could not listen
        raise UserError(f"{host}:{port}: cannot listen there") from None


async def _serve(uvicorn_server: DrainingServer, ready: Callable[[str], None]) -> None:
    task = asyncio.ensure_future(uvicorn_server.serve())
    while not uvicorn_server.started and not task.done():
        await asyncio.sleep(0.01)
    if uvicorn_server.started:
        host, port = uvicorn_server.servers[0].sockets[0].getsockname()[:2]
        ready(f"serving on http://{host}:{port}")
    await task

"""The HTTP surface: routes, who may call them, and every error in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.server.api_keys import Access, ApiKeys
from engine.server.async_engine import AsyncEngine
from engine.server.errors import ApiError, json_response
from engine.server.exchange import ClientGoneError
from engine.server.limits import ServerLimits
from engine.server.metrics import Metrics
from engine.server.serving import Serving

CLIENT_GONE = 499  # nginx's number for it; nobody reads the answer
DRAIN_RETRY_S = 5

log = logging.getLogger("engine.server")


class Gate:
    """Who comes in: API keys, JSON only, bodies of a bounded size, and nobody new while the server drains."""

    def __init__(self, keys: ApiKeys, limits: ServerLimits) -> None:
        self._keys = keys
        self._limits = limits
        self.draining = False

    def access(self, request: Request) -> Access:
        """Return what the caller may do. Raises a 401."""
        return self._keys.access(request.headers.get("authorization"))

    async def body(self, request: Request) -> bytes:
        """Read a JSON request's body. Raises a 413, 415 or 503."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutdown", retry_after_s=DRAIN_RETRY_S)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if (
            kind != "application/json"
        ):  # no web page can send this to a server on loopback without being asked
            raise ApiError(415, "the body must be JSON, and Content-Type application/json")
        most = self._limits.max_body_bytes
        too_large = ApiError(413, f"the body may have {most} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
        except ClientDisconnect:
            raise ClientGoneError from None
        return b"".join(parts)


def new_app(serving: Serving, engine: AsyncEngine, metrics: Metrics, gate: Gate) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="loraplan", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_KeepErrorsInside)
    _add_openai_routes(app, serving, gate)
    _add_adapter_routes(app, serving, gate)
    _add_watching_routes(app, engine, metrics, gate)
    _add_errors(app, metrics)
    return app


def _add_openai_routes(app: FastAPI, serving: Serving, gate: Gate) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        access = gate.access(request)
        return await serving.complete(request, await gate.body(request), access)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        access = gate.access(request)
        return await serving.chat(request, await gate.body(request), access)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return json_response(serving.models(gate.access(request)))

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        return json_response(serving.model(name, gate.access(request)))


def _add_adapter_routes(app: FastAPI, serving: Serving, gate: Gate) -> None:
    async def change(request: Request, work: Callable[[bytes], Awaitable[str]]) -> Response:
        gate.access(request).require_all()
        return PlainTextResponse(await work(await gate.body(request)))

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        return await change(request, serving.load_adapter)

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        return await change(request, serving.unload_adapter)


def _add_watching_routes(app: FastAPI, engine: AsyncEngine, metrics: Metrics, gate: Gate) -> None:
    @app.get("/health")
    async def health() -> Response:
        replicas = engine.replicas
        degraded = replicas is not None and replicas["lost"]
        running = "degraded" if degraded else "ok"
        status = "down" if engine.dead else "draining" if gate.draining else running
        body = {"status": status, "engine_failures": engine.failures}
        if replicas is not None:
            body["replicas"] = replicas
        return json_response(body, 200 if status == running else 503)

    @app.get("/metrics")
    async def page(request: Request) -> Response:
        gate.access(request).require_all()
        text = metrics.page(await engine.snapshots(), engine.failures)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        metrics.rejected(error.status)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    async def client_gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGoneError, client_gone)


class _KeepErrorsInside:
    """Logs what nobody foresaw, and tells the client no more than that it happened."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watching(message: object) -> None:
            nonlocal started
            started = True
            await send(message)  # type: ignore[arg-type]

        try:
            await self._app(scope, receive, watching)
        except Exception:
            log.exception("a request failed")
            if not started:
                await ApiError(500, "the server failed to answer this request").response()(
                    scope, receive, send
                )

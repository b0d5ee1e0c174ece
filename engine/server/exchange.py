"""One completion or chat request on its way: submitted, its texts gathered or streamed, and cancelled when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.server.async_engine import AsyncEngine
from engine.server.errors import ApiError, dumps, json_response
from engine.server.formats import Format, Json, usage
from engine.server.generation_text import GenerationText
from engine.server.parameters import Parameters
from engine.server.text import TextCodec
from engine.server.tickets import Job, Letter, Mailbox

T = TypeVar("T")
Piece = tuple[int, str, str | None]  # which generation, new text, and its reason if it ended with that


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientGoneError if the client goes first. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `on_close` is called when all are sent or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


class Exchange:
    """The generations of one request. `submit` first; then `respond`, which ends them all however it is left."""

    def __init__(
        self, engine: AsyncEngine, codec: TextCodec, parameters: Parameters, answers: Format
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._parameters = parameters
        self._answers = answers
        self._mailbox = Mailbox(eager=parameters.stream or bool(parameters.stops))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the generations. Raises a 429 or 503."""
        self._tickets = self._engine.submit(jobs, self._mailbox)
        stops = self._parameters.stops
        self._texts = [GenerationText(self._codec.detokenizer(), stops) for _ in jobs]

    async def respond(self, request: Request) -> Response:
        """Return the answer; a stream begins with the first news, so that what fails before it is a plain error."""
        try:
            if not self._parameters.stream:
                return json_response(await while_connected(request, self._gather()))
            first = await while_connected(request, self._mailbox.take())
            pieces = self._pieces(first)  # raises here if the first news is an error
            return EventStream(self._events(pieces), on_close=self._cancel)
        except BaseException:
            self._cancel()
            raise

    def _cancel(self) -> None:
        self._engine.abort(self._tickets)

    @property
    def _unfinished(self) -> bool:
        return not all(text.ended() for text in self._texts)

    def _usage(self) -> Json:
        prompt_tokens = sum(len(ticket.job.prompt) for ticket in self._tickets)
        output_tokens = sum(text.num_tokens for text in self._texts)
        return usage(prompt_tokens, output_tokens, sum(ticket.cached_tokens for ticket in self._tickets))

    async def _gather(self) -> Json:
        whole = [""] * len(self._texts)
        while self._unfinished:
            for index, text, _ in self._pieces(await self._mailbox.take()):
                whole[index] += text
        reasons = [text.finish_reason or "" for text in self._texts]
        return self._answers.whole(whole, reasons, self._usage())

    def _pieces(self, letters: Sequence[Letter]) -> list[Piece]:
        """Return what is new. A generation that met a stop text is ended in the engine. Raises ApiError."""
        pieces: list[Piece] = []
        for letter in letters:
            text = self._texts[letter.index]
            if text.ended():
                continue
            new = text.push(letter.tokens) if letter.ending is None else text.end(letter.ending)
            if text.ended() and letter.ending is None:
                self._engine.abort([self._tickets[letter.index]], "stop")
            if new or text.ended():
                pieces.append((letter.index, new, text.finish_reason))
        return pieces

    async def _events(self, pieces: list[Piece]) -> AsyncIterator[str]:
        for index in range(len(self._texts)):
            head = self._answers.first(index)
            if head is not None:
                yield self._event(head)
        try:
            while True:
                for index, text, reason in pieces:
                    yield self._event(self._answers.piece(index, text, reason))
                if not self._unfinished:
                    break
                pieces = self._pieces(await self._mailbox.take())
            if self._parameters.include_usage:
                yield self._event(self._answers.last(self._usage()))
        except ApiError as error:
            yield f"data: {dumps(error.body())}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, answer: Json) -> str:
        if self._parameters.include_usage and "usage" not in answer:
            answer["usage"] = None
        return f"data: {dumps(answer)}\n\n"

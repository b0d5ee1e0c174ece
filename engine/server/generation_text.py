"""The text of one generation as its tokens come: whole characters, up to the first stop text."""

from __future__ import annotations

from collections.abc import Sequence

from engine.server.detokenizer import Detokenizer
from engine.server.errors import ApiError
from engine.server.stopping import StopFilter
from engine.server.tickets import Ending

REFUSED_RETRY_S = 1


class GenerationText:
    """finish_reason: None until it has ended. num_tokens: generated up to the end, those that complete a stop text included."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._filter = StopFilter(stops)
        self._one_by_one = bool(stops)
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def ended(self) -> bool:
        """Say whether no more text will come."""
        return self.finish_reason is not None

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that is certain now. `finish_reason` is set when a stop text appeared."""
        if self.finish_reason is not None:
            return ""
        if not self._one_by_one:
            self.num_tokens += len(tokens)
            return self._detokenizer.push(tokens)
        text = ""
        for token in tokens:
            self.num_tokens += 1
            text += self._filter.push(self._detokenizer.push([token]))
            if self._filter.stopped:
                self.finish_reason = "stop"
                break
        return text

    def end(self, ending: Ending) -> str:
        """Note that the engine ended; return the text that was held back. Raises ApiError where it did not end well."""
        if self.finish_reason is not None:
            return ""
        if ending.reason not in ("length", "stop"):
            raise error_of(ending)
        text = self._filter.push(self._detokenizer.flush())
        self.finish_reason = "stop" if self._filter.stopped else ending.reason
        return text + self._filter.flush()


def error_of(ending: Ending) -> ApiError:
    """Return what a client is told of a generation that did not end well."""
    if ending.never:
        return ApiError(400, ending.error or "this request can never run", code="never_fits")
    if ending.reason == "refused":
        message = ending.error or "the server cannot take this request now"
        return ApiError(429, message, code="refused", retry_after_s=REFUSED_RETRY_S)
    if ending.reason == "abort":
        return ApiError(503, "the server is shutting down: the request was ended", code="shutdown")
    return ApiError(503, ending.error or "the engine ended this request", code="engine_error")

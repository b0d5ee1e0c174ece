"""OpenAI's answers, whole and in chunks, of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> Json:
    """Return the token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Format(Protocol):
    """How the texts of a request's generations are told."""

    def whole(self, texts: list[str], reasons: list[str], usage: Json) -> Json:
        """Return the answer that is not streamed."""

    def first(self, index: int) -> Json | None:
        """Return the chunk in front of a generation's text."""

    def piece(self, index: int, text: str, reason: str | None) -> Json:
        """Return a chunk with text, or the last one of a generation, with its reason."""

    def last(self, usage: Json) -> Json:
        """Return the chunk with the usage, after all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    request_id: str
    model: str
    created: int

    def _answer(self, kind: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionFormat(_Common):
    """/v1/completions."""

    def whole(self, texts: list[str], reasons: list[str], usage: Json) -> Json:
        """See Format."""
        pairs = enumerate(zip(texts, reasons, strict=True))
        choices = [self._choice(index, text, reason) for index, (text, reason) in pairs]
        return self._answer("text_completion", choices, usage=usage)

    def first(self, index: int) -> Json | None:
        """See Format."""
        return None

    def piece(self, index: int, text: str, reason: str | None) -> Json:
        """See Format."""
        return self._answer("text_completion", [self._choice(index, text, reason)])

    def last(self, usage: Json) -> Json:
        """See Format."""
        return self._answer("text_completion", [], usage=usage)

    @staticmethod
    def _choice(index: int, text: str, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat(_Common):
    """/v1/chat/completions."""

    def whole(self, texts: list[str], reasons: list[str], usage: Json) -> Json:
        """See Format."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._answer("chat.completion", choices, usage=usage)

    def first(self, index: int) -> Json | None:
        """See Format."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str, reason: str | None) -> Json:
        """See Format."""
        return self._chunk(index, {"content": text} if text else {}, reason)

    def last(self, usage: Json) -> Json:
        """See Format."""
        return self._answer("chat.completion.chunk", [], usage=usage)

    def _chunk(self, index: int, delta: Json, reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._answer("chat.completion.chunk", [choice])

"""Errors as clients see them: OpenAI's JSON shape, and texts without paths of the server's file system."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.responses import Response

from engine.errors import UserError

# A whole path that starts at the root; only its last part is kept. Not what follows a word: "text/html" is no path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/[^\s/:;,'\"()<>|]+)*/([^\s/:;,'\"()<>|]+)/?")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "server_error",
}


class ApiError(Exception):
    """What a client gets instead of an answer. `message` must be fit for clients: no paths, no internals."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def response(self) -> Response:
        """Return the HTTP answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), self.status, headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON in ASCII: a lone surrogate that a client sent and gets back is escaped, as it came."""
    return Response(dumps(data), status, headers, media_type="application/json")


def dumps(data: Any) -> str:
    """Return compact ASCII JSON."""
    return json.dumps(data, separators=(",", ":"))


class Scrubber:
    """Takes the server's paths out of texts that go to clients."""

    def __init__(self, roots: Iterable[Path]) -> None:
        named = {str(form) for root in roots for form in (root, root.absolute(), root.resolve())}
        # Roots with spaces in them would escape the pattern; the longest first, as one may begin another.
        self._roots = sorted((root for root in named if root not in (".", "/")), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return one line in which no absolute path of the server is left, only last parts."""
        for root in self._roots:
            text = text.replace(root + os.sep, "").replace(root, "…")
        return " ".join(_ABSOLUTE_PATH.sub(r"\1", text).split())

    def error(self, error: Exception) -> str:
        """Return what an error says, with at most the last part of the path at fault."""
        if isinstance(error, UserError) and error.path is not None:
            return self(f"{Path(error.path).name}: {error.reason}")
        return self(str(error))

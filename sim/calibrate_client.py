"""A client of an OpenAI-compatible server that measures it from outside: streamed completions, and when each piece of them came.

One thread a request: what is measured are milliseconds, and a few hundred threads that wait for a socket cost none of them.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from engine.errors import UserError

TIMEOUT_S = 120.0
WORD = "hello "  # one token for most tokenizers; the server says how many it counted


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request. tokens: generated, as the server counts; pieces: chunks of the stream."""

    ttft_s: float
    total_s: float
    prompt_tokens: int
    tokens: int
    pieces: int

    @property
    def tpot_s(self) -> float:
        """Seconds a further token; NaN where there was none."""
        return (self.total_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else float("nan")


class Endpoint:
    """A server at a URL such as http://127.0.0.1:8000 or …/v1. Raises UserError where it is none."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint={url} must be a URL such as http://127.0.0.1:8000")
        self.url = url
        self._parts: SplitResult = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """Return the names that the server serves: the base model first, then adapters."""
        data = self._get("/v1/models").get("data")
        if not isinstance(data, list) or not data:
            raise UserError(f"{self.url}: /v1/models lists nothing")
        return [str(item.get("id")) for item in data if isinstance(item, dict)]

    def complete(self, model: str, words: int, max_tokens: int, seed: int = 0) -> Answer:
        """Ask for a completion of exactly `max_tokens` tokens, if the server honours ignore_eos, and time its stream."""
        body = {
            "model": model,
            "prompt": f"{seed} " + WORD * words,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = self._connect()
        try:
            begun_s = time.perf_counter()
            connection.request("POST", f"{self._path}/v1/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                said = response.read(500).decode(errors="replace")
                raise UserError(
                    f"{self.url}: /v1/completions with model {model!r}: {response.status}: {said}"
                )
            return self._read(response, begun_s)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def together(
        self, models: Sequence[str], words: int, max_tokens: int, first_seed: int = 0
    ) -> list[Answer]:
        """Ask for a completion of each of these models at the same time."""
        with ThreadPoolExecutor(len(models)) as pool:
            work = [
                pool.submit(self.complete, model, words, max_tokens, first_seed + index)
                for index, model in enumerate(models)
            ]
            return [item.result() for item in work]

    def _read(self, response: http.client.HTTPResponse, begun_s: float) -> Answer:
        first_s = last_s = 0.0
        pieces = 0
        usage: dict[str, Any] = {}
        for raw in response:
            line = raw.strip()
            if not line.startswith(b"data:") or line == b"data: [DONE]":
                continue
            chunk = json.loads(line[5:])
            usage = chunk.get("usage") or usage
            if chunk.get("choices"):
                last_s = time.perf_counter() - begun_s
                first_s = first_s or last_s
                pieces += 1
        if not pieces:
            raise UserError(f"{self.url}: a completion's stream was empty")
        return Answer(
            ttft_s=first_s,
            total_s=last_s,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            tokens=int(usage.get("completion_tokens", pieces)),
            pieces=pieces,
        )

    def _get(self, path: str) -> dict[str, Any]:
        connection = self._connect()
        try:
            connection.request("GET", self._path + path, headers=self._headers)
            response = connection.getresponse()
            data = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url}: {error or type(error).__name__}") from None
        except ValueError:
            raise UserError(f"{self.url}: {path} is not JSON: is this an OpenAI-compatible server?") from None
        finally:
            connection.close()
        if response.status != http.client.OK or not isinstance(data, dict):
            raise UserError(f"{self.url}: {path}: {response.status}")
        return data

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT_S)

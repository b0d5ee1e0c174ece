"""What the endpoints do: from a client's JSON to the engine and back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from engine.prefix_keys import keys_of_tokens
from engine.server import fields, parameters
from engine.server.adapters import AdapterRegistry, ServedAdapter
from engine.server.api_keys import Access
from engine.server.async_engine import AsyncEngine
from engine.server.errors import ApiError, invalid
from engine.server.exchange import Exchange
from engine.server.formats import ChatFormat, CompletionFormat, Format
from engine.server.limits import ServerLimits
from engine.server.parameters import Parameters, Prompt
from engine.server.text import TextCodec
from engine.server.tickets import Job

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The base model as clients see it. page_tokens: of the prefix cache, None without one."""

    name: str
    max_model_len: int
    page_tokens: int | None
    created: int


class Serving:
    """Answers completions, chats and everything about models."""

    def __init__(
        self,
        model: ServedModel,
        engine: AsyncEngine,
        codec: TextCodec,
        adapters: AdapterRegistry,
        limits: ServerLimits,
    ) -> None:
        self._model = model
        self._engine = engine
        self._codec = codec
        self._adapters = adapters
        self._limits = limits
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    # ---- completions ----

    async def complete(self, request: Request, body: bytes, access: Access) -> Response:
        """Answer /v1/completions."""
        data = fields.parse_object(body)
        wanted = parameters.completion_parameters(data, self._limits)
        self._find(wanted.model, access)
        prompts = parameters.prompts(data, self._codec.vocab_size, self._limits)
        tokens = await self._off_loop(lambda: [self._tokens(prompt) for prompt in prompts])
        answers = CompletionFormat(**self._head("cmpl", wanted.model))
        return await self._serve(request, wanted, tokens, answers, access)

    async def chat(self, request: Request, body: bytes, access: Access) -> Response:
        """Answer /v1/chat/completions."""
        data = fields.parse_object(body)
        wanted = parameters.chat_parameters(data, self._limits)
        self._find(wanted.model, access)
        messages = parameters.messages(data)
        prompted = fields.boolean(data, "add_generation_prompt", True)
        tokens = await self._off_loop(lambda: [self._codec.encode_chat(messages, prompted)])
        answers = ChatFormat(**self._head("chatcmpl", wanted.model))
        return await self._serve(request, wanted, tokens, answers, access)

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self._codec.encode(prompt) if isinstance(prompt, str) else prompt

    async def _off_loop(self, work: Callable[[], T]) -> T:
        """Run what may be slow for long texts on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, work)

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"request_id": f"{kind}-{uuid.uuid4().hex}", "model": model, "created": int(time.time())}

    async def _serve(
        self,
        request: Request,
        wanted: Parameters,
        prompts: Sequence[list[int]],
        answers: Format,
        access: Access,
    ) -> Response:
        exchange = Exchange(self._engine, self._codec, wanted, answers)
        # Looked up again, and nothing awaited until it is queued: what is unloaded now has been asked for before.
        adapter = self._find(wanted.model, access)
        exchange.submit([self._job(wanted, tokens, adapter) for tokens in prompts])
        return await exchange.respond(request)

    def _job(self, wanted: Parameters, tokens: list[int], adapter: ServedAdapter | None) -> Job:
        room = self._model.max_model_len - len(tokens)
        if not tokens:
            raise invalid("the prompt is empty", "prompt")
        if room < (wanted.max_tokens or 1):
            asked = "" if wanted.max_tokens is None else f" and {wanted.max_tokens} to generate"
            raise invalid(
                f"this model's maximum context length is {self._model.max_model_len} tokens; "
                f"the request has {len(tokens)} in the prompt{asked}",
                "prompt",
                "context_length_exceeded",
            )
        prompt = np.asarray(tokens, dtype=np.int32)
        internal = None if adapter is None else adapter.internal_name
        page_tokens = self._model.page_tokens
        return Job(
            prompt=prompt,
            max_tokens=wanted.max_tokens or room,
            sampling=wanted.sampling,
            stop_tokens=wanted.stop_token_ids
            | (frozenset() if wanted.ignore_eos else self._codec.stop_tokens),
            page_keys=None if page_tokens is None else keys_of_tokens(internal, prompt, page_tokens),
            adapter=internal,
            served_as=None if adapter is None else adapter.name,
            rank=None if adapter is None else adapter.rank,
        )

    def _find(self, name: str, access: Access) -> ServedAdapter | None:
        """Return the adapter of a name, None for the base. Raises the same 404 for what there is not and for what the caller may not use."""
        adapter = self._adapters.find(name)
        if (adapter is None and name != self._model.name) or not access.allows(name):
            raise ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")
        return adapter

    # ---- models ----

    def models(self, access: Access) -> dict[str, Any]:
        """Answer /v1/models."""
        base = self._card(self._model.name, self._model.name, None)
        base["max_model_len"] = self._model.max_model_len
        cards = [base, *(self._card(a.name, a.root, self._model.name) for a in self._adapters.all())]
        return {"object": "list", "data": [card for card in cards if access.allows(card["id"])]}

    def model(self, name: str, access: Access) -> dict[str, Any]:
        """Answer /v1/models/{name}. Raises a 404."""
        self._find(name, access)
        return next(card for card in self.models(access)["data"] if card["id"] == name)

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "loraplan",
            "root": root,
            "parent": parent,
        }

    async def load_adapter(self, body: bytes) -> str:
        """Answer /v1/load_lora_adapter."""
        data = fields.parse_object(body)
        _only(data, ("lora_name", "lora_path", "load_inplace"))
        if not data.get("lora_name") or not data.get("lora_path"):
            raise invalid("Both 'lora_name' and 'lora_path' must be provided.")
        name, path = (fields.text(key, data[key]) for key in ("lora_name", "lora_path"))
        await self._adapters.load(name, path, fields.boolean(data, "load_inplace"))
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_adapter(self, body: bytes) -> str:
        """Answer /v1/unload_lora_adapter."""
        data = fields.parse_object(body)
        _only(data, ("lora_name", "lora_int_id"))
        if not data.get("lora_name"):
            raise invalid("'lora_name' needs to be provided.", "lora_name")
        name = fields.text("lora_name", data["lora_name"])
        await self._adapters.unload(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def close(self) -> None:
        """End the tokenizer's thread."""
        self._encoder.shutdown(wait=False)


def _only(data: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, value in data.items():
        if name not in known and value is not None:
            raise fields.bad_field(name[:80], "is not supported")


def base_name(model: str) -> str:
    """Return a model's name for clients: a path's last part."""
    return Path(model).resolve().name or model

"""What a completion or chat request asks for. Everything that is not understood is refused if it could change the output."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.sampling import Sampling
from engine.server import fields
from engine.server.fields import bad_field, show
from engine.server.limits import ServerLimits
from engine.server.text import Messages

MAX_TOKENS = 2**31 - 1
MAX_STOP_TOKENS = 64
COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions; a chat may fill the context

Prompt = str | list[int]

_ACCEPTED = {
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"),
    *("stream_options", "ignore_eos", "stop_token_ids", "add_generation_prompt"),
    # These say something about the request that changes no token.
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"),
    *("prompt_cache_retention", "parallel_tool_calls", "priority"),
}
# Fields that would change the output, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What holds for all prompts of a request. max_tokens None: as many as the context has room for."""

    model: str
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    stream: bool
    include_usage: bool


def completion_parameters(data: Mapping[str, Any], limits: ServerLimits) -> Parameters:
    """Read the parameters of /v1/completions. Raises a 400."""
    _refuse_unknown(data, ())
    given = fields.integer(data, "max_tokens", 1, MAX_TOKENS)
    return _parameters(data, limits, COMPLETION_MAX_TOKENS if given is None else given)


def chat_parameters(data: Mapping[str, Any], limits: ServerLimits) -> Parameters:
    """Read the parameters of /v1/chat/completions. Raises a 400."""
    _refuse_unknown(data, ("max_completion_tokens",))
    newer = fields.integer(data, "max_completion_tokens", 1, MAX_TOKENS)
    older = fields.integer(data, "max_tokens", 1, MAX_TOKENS)
    return _parameters(data, limits, older if newer is None else newer)


def _parameters(data: Mapping[str, Any], limits: ServerLimits, max_tokens: int | None) -> Parameters:
    stream = fields.boolean(data, "stream")
    return Parameters(
        model=fields.text("model", data.get("model")),
        max_tokens=max_tokens,
        sampling=_sampling(data),
        stops=_stops(data, limits),
        stop_token_ids=_token_ids(data),
        ignore_eos=fields.boolean(data, "ignore_eos"),
        stream=stream,
        include_usage=_include_usage(data, stream),
    )


def _refuse_unknown(data: Mapping[str, Any], more: tuple[str, ...]) -> None:
    for name, value in data.items():
        if name in _ACCEPTED or name in more or value is None:
            continue
        if name not in _NEUTRAL:
            raise bad_field(name[:80], "is not supported")
        neutral = _NEUTRAL[name]
        # 1 == True in Python, and not in JSON
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            raise bad_field(name, f"(={show(value)}) is not supported; it may be {show(neutral[0])}")


def _sampling(data: Mapping[str, Any]) -> Sampling:
    seed = fields.integer(data, "seed", -(2**63), 2**63 - 1)
    try:
        return Sampling(
            temperature=fields.number(data, "temperature", 1.0),
            top_p=fields.number(data, "top_p", 1.0),
            seed=random.getrandbits(63) if seed is None else seed,
        )
    except ValueError as error:
        field = str(error).partition("(")[0]
        raise bad_field(field, str(error).partition(") ")[2]) from None


def _stops(data: Mapping[str, Any], limits: ServerLimits) -> tuple[str, ...]:
    value = data.get("stop")
    if value is None:
        return ()
    stops = value if isinstance(value, list) else [value]
    if len(stops) > limits.max_stop:
        raise bad_field("stop", f"has {len(stops)} texts, at most {limits.max_stop} are allowed")
    for stop in stops:
        if not fields.text("stop", stop):
            raise bad_field("stop", "must not be empty")
        if len(stop) > limits.max_stop_chars:
            raise bad_field("stop", f"may have {limits.max_stop_chars} characters, not {len(stop)}")
    return tuple(stops)


def _token_ids(data: Mapping[str, Any]) -> frozenset[int]:
    value = data.get("stop_token_ids")
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise bad_field("stop_token_ids", "must be an array of token ids")
    if len(value) > MAX_STOP_TOKENS:
        raise bad_field("stop_token_ids", f"has {len(value)} tokens, at most {MAX_STOP_TOKENS} are allowed")
    return frozenset(value)


def _include_usage(data: Mapping[str, Any], stream: bool) -> bool:
    options = data.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise bad_field("stream_options", f"must be an object, not {show(options)}")
    if not stream:
        raise bad_field("stream_options", "needs stream to be true")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation") and value not in (None, False):
            raise bad_field("stream_options", f"has {show(name)}, which is not supported")
    return fields.boolean(options, "include_usage")


# ---- prompts ----


def prompts(data: Mapping[str, Any], vocab_size: int, limits: ServerLimits) -> list[Prompt]:
    """Return the prompts of a completion request: one text or list of tokens, or a list of them. Raises a 400."""
    value = data.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise bad_field("prompt", "must be a text, an array of token ids, or an array of either")
    if len(value) > limits.max_prompts:
        raise bad_field("prompt", f"has {len(value)} prompts, at most {limits.max_prompts} are allowed")
    return [_prompt(one, vocab_size) for one in value]


def _prompt(value: Any, vocab_size: int) -> Prompt:
    if isinstance(value, str):
        return fields.text("prompt", value)
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise bad_field("prompt", "must be a text, an array of token ids, or an array of either")
    if not (min(value) >= 0 and max(value) < vocab_size):
        raise bad_field("prompt", f"has a token outside of 0..{vocab_size - 1}")
    return value


def messages(data: Mapping[str, Any]) -> Messages:
    """Return the messages of a chat request, each with a role and one text. Raises a 400."""
    value = data.get("messages")
    if not isinstance(value, list) or not value:
        raise bad_field("messages", "must be an array of at least one message")
    return [_message(one, f"messages[{index}]") for index, one in enumerate(value)]


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_field(place, f"must be an object, not {show(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"{place}.role", f"must be one of {', '.join(_ROLES)}, not {show(role)}")
    for name, value in message.items():
        if name not in ("role", "content", "name", "refusal") and value not in (None, [], {}):
            raise bad_field(f"{place}.{name[:80]}", "is not supported")
    return {"role": _ROLES[role], "content": _content(message.get("content"), f"{place}.content")}


def _content(content: Any, place: str) -> str:
    if not isinstance(content, list):
        return fields.text(place, content)
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise bad_field(place, "may hold parts of type text only")
        parts.append(fields.text(place, part.get("text")))
    return "\n".join(parts)

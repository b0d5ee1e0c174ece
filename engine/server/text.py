"""The model's tokenizer: text to tokens, chat template, tokens to text, and which tokens end a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import UserError
from engine.json_files import read_json
from engine.server.detokenizer import Detokenizer
from engine.server.errors import invalid

Messages = list[dict[str, str]]


class TextCodec:
    """A tokenizer of `vocab_size` tokens. stop_tokens: those that end a text. Encoding is slow for long texts: call it off the event loop."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_tokens: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._fast = (
            tokenizer.backend_tokenizer
        )  # without transformers' wrapping, which costs four times as much
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = vocab_size
        self.stop_tokens = stop_tokens

    def encode(self, text: str) -> list[int]:
        """Return a prompt's tokens, with those that the tokenizer puts in front of every text."""
        return self._checked(self._fast.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        """Return the tokens of a conversation. Raises a 400 where the model has no chat template, or its template refuses the messages."""
        if not self._tokenizer.chat_template:
            raise invalid(
                "this model has no chat template: use /v1/completions", "messages", "no_chat_template"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, LookupError, ArithmeticError):
            raise invalid("the model's chat template cannot render these messages", "messages") from None
        return self._checked(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._fast.decode(list(tokens), skip_special_tokens=True)
        return text

    def detokenizer(self) -> Detokenizer:
        """Return a detokenizer of one generation."""
        return Detokenizer(self.decode)

    def _checked(self, tokens: list[int]) -> list[int]:
        if tokens and max(tokens) >= self.vocab_size:
            raise invalid(f"the text has token {max(tokens)}, the model has {self.vocab_size}")
        return tokens


def load_codec(folder: Path, vocab_size: int) -> TextCodec:
    """Read a tokenizer from a model's folder. Raises UserError where there is none, or none of tokenizers' kind; code in it is never run."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the files make transformers raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no tokenizer can be read: {type(error).__name__}: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder}: the tokenizer has no tokenizer.json form")
    return TextCodec(tokenizer, vocab_size, stop_tokens(folder, tokenizer.eos_token_id))


def stop_tokens(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Return the tokens that end a text: those of generation_config.json, else of config.json, and the tokenizer's."""
    found = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = _eos_of(read_json(path)) if path.is_file() else frozenset()
        if eos:
            return frozenset(found | eos)
    return frozenset(found)


def _eos_of(config: Any) -> frozenset[int]:
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if type(token) is int and token >= 0)

"""A tiny model with a tokenizer of bytes and a chat template, adapters on disk, and real servers on loopback."""

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import openai
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config import ServingConfig
from engine.server.launch import Server, ServerOptions, build_server
from engine.server.limits import ServerLimits
from tests.engine.tiny import save_adapter, save_model, tiny_model

SPECIAL = ("<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.first %}{{ raise_exception('it may not begin with the assistant') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADAPTERS = {"red": {"rank": 8}, "blue": {"rank": 16, "targets": ("q_proj", "v_proj")}, "green": {"rank": 8}}
CONFIG = {
    "backend": "reference",
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "page_tokens": 32,
    "num_pages": 160,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 tokens: one a byte, but for five that are in no UTF-8 text, which are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [
        chr(byte) for byte in range(0xF8, 0xF8 + len(SPECIAL))
    ]  # ByteLevel writes these bytes as themselves
    names = [dict(zip(unused, SPECIAL, strict=True)).get(char, char) for char in alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], additional_special_tokens=list(SPECIAL[1:])
    )
    fast.chat_template = TEMPLATE
    return fast


class World:
    """The files, and what transformers and PEFT make of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_model(seed=3)
        self.model_folder = save_model(self.model, folder / "tiny-base")
        self.tokenizer = byte_tokenizer()
        self.tokenizer.save_pretrained(self.model_folder)
        self.adapter_dir = folder / "my adapters"
        self.models = {"tiny-base": self.model}
        for seed, (name, options) in enumerate(ADAPTERS.items()):
            self.models[name] = save_adapter(self.model, self.adapter_dir / name, seed=seed, **options)
        (folder / "adapters.jsonl").write_text(
            "".join(
                json.dumps({"name": name, "path": f"my adapters/{name}"}) + "\n" for name in ("red", "blue")
            )
        )
        (folder / "config.json").write_text(json.dumps(CONFIG | {"model": str(self.model_folder)}))

    def tokens(self, name, prompt, count):
        """Return greedy tokens by transformers and PEFT, the whole sequence anew for each."""
        ids = torch.tensor(prompt)[None]
        for _ in range(count):
            with torch.no_grad():
                logits = self.models[name](input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        return ids[0, len(prompt) :].tolist()

    def text(self, name, prompt, count):
        """Return the text of greedy tokens, without a character that was not completed."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = self.tokens(name, ids, count)
        return self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")

    def copy_adapter(self, name, target):
        """Copy an adapter of the folder under another path of it."""
        shutil.copytree(self.adapter_dir / name, self.adapter_dir / target, dirs_exist_ok=True)
        return self.adapter_dir / target

    def server(self, *, limits=None, adapters=("red", "blue"), options=None, **config):
        """Build a server that is not running yet."""
        from engine.adapter import load_adapters

        known = load_adapters(self.folder / "adapters.jsonl")
        options = ServerOptions(
            **({"limits": ServerLimits(**(limits or {})), "adapter_dir": self.adapter_dir} | (options or {}))
        )
        serving = ServingConfig.from_json(CONFIG | {"model": str(self.model_folder)} | config)
        return build_server(serving, {name: known[name] for name in adapters}, options)


class Running:
    """A server on a free port of loopback, its event loop on a thread."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        self._uvicorn = uvicorn.Server(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(30)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        startup = self._uvicorn.startup

        async def started(sockets=None):
            await startup(sockets)
            self._started.set()

        self._uvicorn.startup = started
        await self._uvicorn.serve(sockets=[self._socket])

    def client(self, key="none", **options):
        """Return an official client that does not try again by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def run(self, coroutine):
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def inspect(self, function):
        """Run a function of the engine on its thread."""
        return self.run(self.server.engine.call(function))

    def wait_idle(self):
        """Wait until no generation is left."""
        self.run(self.server.engine.wait_idle())

    def leaked_pages(self):
        """Return how many pages requests hold though none is left; raise AssertionError where accounts disagree."""
        self.wait_idle()
        if self.server.engine.replicas is not None:
            return self._pages_on_replicas()

        def look(engine):
            engine.scheduler.check_integrity()
            return engine.scheduler.kv_pages

        while self.inspect(lambda engine: engine.busy):  # a step in flight may still end what was aborted
            pass
        return self.inspect(look)

    def _pages_on_replicas(self):
        """Return how many pages the replicas' requests hold, once none runs any more or after a while."""
        until = time.monotonic() + 10
        while True:
            found = self.run(self.server.engine.snapshots()).values()
            pages = sum(snapshot.kv_pages for snapshot in found)
            busy = sum(snapshot.running + snapshot.waiting for snapshot in found)
            if (not busy and not pages) or time.monotonic() > until:
                return pages

    def stop(self) -> None:
        """End the server."""
        self._uvicorn.should_exit = True
        self._thread.join(30)


@contextlib.contextmanager
def running(server: Server):
    """Serve for a while; at the end no page may be held."""
    process = Running(server)
    try:
        yield process
        assert process.leaked_pages() == 0
    finally:
        process.stop()


class Broken:
    """Stands for a part of an engine, whose class may be compiled, until one of its methods is called, which raises."""

    def __init__(self, engine, owner, method):
        self._engine, self._owner, self._method = engine, owner, method
        self._part = getattr(engine, owner)

    def __getattr__(self, name):
        return self._raise if name == self._method else getattr(self._part, name)

    def __setattr__(self, name, value):
        if name in ("_engine", "_owner", "_method", "_part"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._part, name, value)

    def _raise(self, *arguments, **options):
        setattr(self._engine, self._owner, self._part)
        raise RuntimeError("a secret in /home/secret/file.py")


def break_once(process, owner, method):
    """Make a method of the engine, or of one of its parts, raise when it is called next."""

    def arm(engine):
        if owner:
            setattr(engine, owner, Broken(engine, owner, method))
            return

        def boom(*arguments, **options):
            delattr(engine, method)
            raise RuntimeError("a secret in /home/secret/file.py")

        setattr(engine, method, boom)

    process.inspect(arm)

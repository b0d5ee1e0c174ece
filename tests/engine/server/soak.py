"""Hammers a server with everything at once, and tells what came of it: `python -m tests.engine.server.soak --minutes 5`.

Completions and chats, streamed or not, by base and adapters; clients that leave; adapters loaded, replaced and unloaded; broken requests; and, with
`--failures`, exceptions in the engine's thread. Greedy answers are compared with the first one to the same question. Errors are answers that should
not have come; leaked pages are those that requests hold when none is left.
"""

import argparse
import collections
import random
import tempfile
import threading
import time
from pathlib import Path

import httpx2 as httpx

from tests.engine.server.world import World, break_once, running

QUESTIONS = ("Hello", "What is it?", "x" * 90, "x" * 100, "žluťoučký kůň 😀")
MODELS = ("tiny-base", "red", "blue")


class Soak:
    """Workers that ask until the time is over. `counts` says how often each thing happened, `errors` what should not have."""

    def __init__(self, process, minutes, failures):
        self.process = process
        self.ends_s = time.monotonic() + 60 * minutes
        self.failures = failures
        self.counts = collections.Counter()
        self.errors = []
        self.answers = {}
        self._lock = threading.Lock()

    def run(self, num_workers):
        """Ask with so many workers, and one that changes adapters."""
        jobs = [threading.Thread(target=self._ask_for_ever, args=(seed,)) for seed in range(num_workers)]
        jobs.append(threading.Thread(target=self._change_for_ever))
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()

    def _note(self, what, error=None):
        with self._lock:
            self.counts[what] += 1
            if error is not None:
                self.errors.append(error)

    def _ask_for_ever(self, seed):
        rng = random.Random(seed)
        kinds = (
            self._complete,
            self._complete,
            self._sampled,
            self._chat,
            self._stream,
            self._leave,
            self._nonsense,
        )
        with httpx.Client(base_url=self.process.url, timeout=60) as http:
            while time.monotonic() < self.ends_s:
                kind = rng.choice(kinds)
                try:
                    kind(http, rng)
                except Exception as error:
                    self._note("failed", f"{kind.__name__}: {error!r}")

    def _check(self, answer, what):
        """Return whether a request was served; 503 is right while the engine is made to fail, 429 when the queue is full."""
        if answer.status_code == 200:
            self._note(what)
            return True
        expected = {429, 503} if self.failures else {429}
        self._note(
            f"{what}: {answer.status_code}", None if answer.status_code in expected else answer.text[:200]
        )
        return False

    def _body(self, rng, **options):
        body = {
            "model": rng.choice(MODELS),
            "prompt": rng.choice(QUESTIONS),
            "max_tokens": rng.randint(1, 40),
        }
        return body | {"temperature": 0} | options

    def _complete(self, http, rng):
        body = self._body(rng)
        answer = http.post("/v1/completions", json=body)
        if self._check(answer, "completion"):
            text = answer.json()["choices"][0]["text"]
            key = body["model"], body["prompt"], body["max_tokens"]
            with self._lock:
                first = self.answers.setdefault(key, text)
            if text != first:
                self._note("another answer", f"{key}: {first!r}, then {text!r}")

    def _sampled(self, http, rng):
        body = self._body(rng, temperature=1.0, top_p=rng.choice([0.5, 1.0]), stop=["a", "qq"])
        self._check(http.post("/v1/completions", json=body), "sampled")

    def _chat(self, http, rng):
        body = self._body(rng, messages=[{"role": "user", "content": rng.choice(QUESTIONS)}])
        del body["prompt"]
        self._check(http.post("/v1/chat/completions", json=body), "chat")

    def _stream(self, http, rng):
        with http.stream("POST", "/v1/completions", json=self._body(rng, stream=True)) as answer:
            text = "".join(answer.iter_text())
        if answer.status_code != 200:
            self._note(f"stream: {answer.status_code}", None if self.failures else text[:200])
        elif '"error"' in text or not text.endswith("[DONE]\n\n"):
            self._note("stream: error", None if self.failures else text[-200:])
        else:
            self._note("stream")

    def _leave(self, http, rng):
        body = self._body(rng, max_tokens=150, stream=rng.random() < 0.5)
        try:
            with http.stream("POST", "/v1/completions", json=body, timeout=rng.uniform(0.01, 0.3)) as answer:
                next(answer.iter_text(), None)
        except httpx.TimeoutException:
            pass
        self._note("left")

    def _nonsense(self, http, rng):
        body = self._body(
            rng, **rng.choice([{"model": "nobody"}, {"max_tokens": 0}, {"prompt": 5}, {"n": 3}])
        )
        answer = http.post("/v1/completions", json=body)
        self._note("nonsense", None if answer.status_code in (400, 404) else answer.text[:200])

    def _change_for_ever(self):
        rng = random.Random(99)
        with httpx.Client(base_url=self.process.url, timeout=60) as http:
            while time.monotonic() < self.ends_s:
                self._change(http, rng)
                if self.failures and rng.random() < 0.05:
                    break_once(
                        self.process,
                        *rng.choice([("runner", "launch"), ("runner", "wait"), ("scheduler", "schedule")]),
                    )
                    self._note("engine made to fail")
                time.sleep(0.2)

    def _change(self, http, rng):
        name = f"guest-{rng.randint(0, 3)}"
        path = rng.choice(["red", "blue", "green"])
        loaded = http.post(
            "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, "load_inplace": True}
        )
        self._note("load", None if loaded.is_success else loaded.text)
        self._check(http.post("/v1/completions", json=self._body(rng, model=name)), "guest completion")
        if rng.random() < 0.5:
            gone = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            self._note("unload", None if gone.is_success else gone.text)


def main():
    """Run, and print one line a figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--pages", type=int, default=28, help="so few that requests preempt each other")
    parser.add_argument("--failures", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = World(Path(folder)).server(num_pages=options.pages, max_num_seqs=8, max_adapters=3)
        began_s = time.monotonic()
        with running(server) as process:
            soak = Soak(process, options.minutes, options.failures)
            soak.run(options.workers)
            leaked = process.leaked_pages()
            minutes = (time.monotonic() - began_s) / 60
            state = process.inspect(
                lambda e: (
                    e.scheduler.preemptions,
                    e.scheduler.residency.loads,
                    e.scheduler.residency.evictions,
                )
            )
    for what, count in sorted(soak.counts.items()):
        print(f"{what:28} {count}")
    print(f"preemptions, loads, evictions {state} (since the engine last started anew)")
    print(
        f"requests {sum(soak.counts.values())}, minutes {minutes:.1f}, errors {len(soak.errors)}, pages leaked {leaked}"
    )
    for error in soak.errors[:10]:
        print("error:", error)


if __name__ == "__main__":
    main()

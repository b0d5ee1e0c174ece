"""Early abort: whoever can no longer have a first token in time is turned away, so that the others still can."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from itertools import islice

from engine.queue_view import QueueView
from engine.sequence import Phase, Sequence

RATE_MEMORY_S = 2.0  # time constant of what is learnt; docs/scheduling.md
EVIDENCE_SHARE = 0.25  # of the SLO is watched before anybody is turned away for more than a deadline that cannot be met at once
HEAD_REQUESTS = 64  # so many are looked at in every plan, the others every LOOK_SHARE of the SLO: the cost does not grow with it
LOOK_SHARE = 0.01
STEPS_TO_FIRST_TOKEN = 2  # the one that runs while the plan is made, and the planned one


class PrefillRate:
    """How many prompt tokens a second the scheduler gets through while requests have to wait for one another.

    Tokens planned over the time between plans, both forgotten with e^(-t / RATE_MEMORY_S). Counted only in a congestion: the time
    after plans that left somebody behind whose adapter was there. A plan that leaves nobody ends it and all is forgotten: how fast
    prompts come when there is room says nothing of how fast they could, and the next congestion may have another cause. So the
    rate takes in whatever holds requests back: the token budget, slots, pages.
    """

    def __init__(self) -> None:
        self.watched_s = 0.0
        self.longest_gap_s = 0.0  # between two plans, forgotten at the same pace: about one step
        self._tokens = 0.0
        self._planned = 0
        self._congested = False
        self._seen_at_s = -math.inf

    def add(self, tokens: int) -> None:
        """Note prompt tokens planned at the instant seen last."""
        self._planned += tokens

    def left_behind(self, somebody: bool) -> None:
        """Note whether the plan made at the instant seen last left somebody behind who could have run."""
        self._congested = somebody
        if not somebody:
            self.watched_s = self._tokens = 0.0

    def see(self, now_s: float) -> None:
        """Note that a plan is being made now; a second call at the same instant changes nothing."""
        gap_s = now_s - self._seen_at_s
        if gap_s <= 0:
            return
        if self._congested:
            kept = math.exp(-gap_s / RATE_MEMORY_S)
            self.watched_s = self.watched_s * kept + gap_s
            self._tokens = self._tokens * kept + self._planned
            self.longest_gap_s = max(gap_s, self.longest_gap_s * kept)
        self._seen_at_s, self._planned = now_s, 0

    def wait_s(self, tokens: float, prompt_tokens_mean: float) -> float:
        """Return how long `tokens` take, as if one more prompt of mean length had just been planned: no chance gap counts as a standstill."""
        return tokens * self.watched_s / (self._tokens + prompt_tokens_mean) if tokens else 0.0


class SloQueue:
    """First come, first served among those whose first token can still come within `ttft_slo_s` of their arrival.

    The first token of a waiting request is expected at

        now + (prompt tokens of all before it and its own) / prefill rate + 2 × the longest recent step

    those before it being what is left of the prompts in prefill, and the waiting ones before it that are not turned away. Whose time is
    later than arrival + SLO is turned away at once (far back in the queue, within a hundredth of the SLO), not after having waited in
    vain (S-LoRA, arXiv:2311.03285, early abort). The rate is learnt from what was planned (`PrefillRate`); until a congestion has been
    watched for a quarter of the SLO, only the two steps count. A preempted request ran already and is never turned away. Loads of adapters
    are not foreseen, and a prefix that is cached is not either: the first makes the estimate optimistic, the second pessimistic.
    """

    time_dependent = True

    def __init__(self, ttft_slo_s: float) -> None:
        self._slo_s = ttft_slo_s
        self._preempted: deque[Sequence] = deque()
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._waiting_tokens = 0
        self._prefilling: dict[Sequence, None] = {}
        self._rate = PrefillRate()
        self._look_due_s = -math.inf
        self._ready = 0  # of the last window, those whose adapter was there

    def __len__(self) -> int:
        return len(self._preempted) + len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        yield from self._waiting

    def push(self, sequence: Sequence) -> None:
        """Take in a new request."""
        self._waiting[sequence] = None
        self._waiting_tokens += sequence.prefill_tokens

    def push_front(self, sequence: Sequence) -> None:
        """Take back a preempted one, which goes before all others."""
        self._preempted.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget one that gave up or was turned away."""
        if sequence in self._waiting:
            del self._waiting[sequence]
            self._waiting_tokens -= sequence.prefill_tokens
        else:
            self._preempted.remove(sequence)
        if not len(self):
            self._rate.left_behind(False)

    def drop(self, admitted: Collection[Sequence]) -> None:
        """Note that these of the last window were admitted; the others of it had to stay behind."""
        for sequence in admitted:
            self.remove(sequence)
            self._prefilling[sequence] = None
        self._rate.left_behind(self._ready > len(admitted))

    def window(self, limit: int, now_s: float, view: QueueView) -> list[Sequence]:
        """Return the first `limit` in order of arrival."""
        self._rate.see(now_s)
        order = list(islice(self, limit))
        names = (sequence.request.adapter for sequence in order)
        self._ready = sum(name is None or view.is_resident(name) for name in names)
        self._rate.left_behind(self._ready > 0)  # until `drop` says who was admitted
        return order

    def served(self, sequence: Sequence, prefill_tokens: int, decode_tokens: int) -> None:
        """Learn from prompt tokens planned."""
        del decode_tokens
        self._rate.add(prefill_tokens)
        if not prefill_tokens:
            self._prefilling.pop(sequence, None)

    def expired(self, now_s: float) -> list[Sequence]:
        """Return those whose first token cannot come in time any more."""
        self._rate.see(now_s)
        if not self._waiting:
            return []
        rate = self._rate
        trusted = rate.watched_s >= EVIDENCE_SHARE * self._slo_s
        mean = self._waiting_tokens / len(self._waiting)
        soonest_s = now_s + STEPS_TO_FIRST_TOKEN * rate.longest_gap_s
        before = self._tokens_before()
        late: list[Sequence] = []
        for sequence in islice(self._waiting, self._how_many(now_s)):
            tokens = before + sequence.prefill_tokens
            first_token_s = soonest_s + (rate.wait_s(tokens, mean) if trusted else 0.0)
            if first_token_s > sequence.request.arrival_s + self._slo_s:
                late.append(sequence)
            else:
                before = tokens
        return late

    def _how_many(self, now_s: float) -> int:
        if now_s < self._look_due_s:
            return HEAD_REQUESTS
        self._look_due_s = now_s + LOOK_SHARE * self._slo_s
        return len(self._waiting)

    def _tokens_before(self) -> int:
        """Return the prompt tokens that go before all waiting ones: of prompts in prefill what is left, and of preempted requests."""
        for sequence in [s for s in self._prefilling if s.phase is not Phase.PREFILL]:
            del self._prefilling[sequence]
        left = sum(s.prefill_tokens - s.prefilled for s in self._prefilling)
        return left + sum(sequence.prefill_tokens for sequence in self._preempted)

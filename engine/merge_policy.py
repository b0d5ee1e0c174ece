"""When to have an adapter merged into the weights, and which: dLoRA's rule (OSDI'24), with its credits against starvation.

    unmerged → merged with a   if a has at least alpha of the unfinished requests, and nobody has credits
    merged → unmerged          if a has less than beta of them, or somebody has CREDIT_LIMIT credits

While a is merged only its requests run, by the base's kernels alone; requests of others wait. Each adapter (the base is one) that waits
earns a credit a step and afterwards spends one a step, and as long as anybody has some nothing is merged: who waited for n steps is served for n.

alpha and beta follow experience, as published: a period that served more tokens a second than the one before it, the switch included, is a win and
makes the step into its mode easier by 0.05; a loss makes it harder by a tenth. dLoRA estimates the two rates; here they are those that were had.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

ALPHA, BETA = 1.0, 15 / 27  # where dLoRA starts
EASIER, HARDER = 0.05, 1.1
CREDIT_LIMIT = 50  # steps that anybody waits at most while another is merged: half a second of 10 ms


class MergePolicy:
    """Counts unfinished requests by adapter (None: the base) and says what is to be merged. `merged` is in force for the next step."""

    def __init__(self, alpha: float = ALPHA, beta: float = BETA) -> None:
        self.alpha, self.beta = alpha, min(alpha, beta)
        self.merged: str | None = None
        self.switches = 0
        self._unfinished: dict[str | None, int] = {}
        self._total = 0
        self._credits: dict[str | None, int] = {}
        self._look = True  # something happened that could make another choice
        self._since_s: float | None = None
        self._tokens = 0
        self._last_rate: float | None = None

    # ---- what happens ----

    def came(self, adapter: str | None) -> None:
        """Count a request."""
        self._unfinished[adapter] = self._unfinished.get(adapter, 0) + 1
        self._total += 1
        self._look = True

    def ended(self, adapter: str | None) -> None:
        """Note that nothing more will come of a request."""
        self._total -= 1
        self._look = True
        left = self._unfinished[adapter] - 1
        if left:
            self._unfinished[adapter] = left
        else:
            del self._unfinished[adapter]
            self._credits.pop(adapter, None)

    def look_again(self) -> None:
        """Note that what may be merged has changed."""
        self._look = True

    def ran(self, tokens: int, steps: int = 1) -> None:
        """Note planned steps of so many tokens in all: who was passed over earns credits, else who has some spends them."""
        self._tokens += tokens
        if self.merged is not None:
            for adapter in self._unfinished:
                if adapter != self.merged:
                    self._credits[adapter] = self._credits.get(adapter, 0) + steps
        elif self._credits:
            self._credits = {adapter: left - steps for adapter, left in self._credits.items() if left > steps}
            self._look = self._look or not self._credits

    # ---- what follows ----

    def decide(self, now_s: float, may_merge: Callable[[str], bool]) -> bool:
        """Choose for the step to be planned; return whether the choice is another one than before."""
        if self._since_s is None:
            self._since_s = now_s
        if self.merged is not None:
            mine = self._unfinished.get(self.merged, 0)
            starved = max(self._credits.values(), default=0) >= CREDIT_LIMIT
            if starved or mine < self.beta * self._total:
                return self._switch(None, now_s)
            return False
        if not self._look or self._credits:
            return False
        self._look = False
        wanted = self._dominating()
        return wanted is not None and may_merge(wanted) and self._switch(wanted, now_s)

    def give_up(self, now_s: float) -> bool:
        """Unmerge because the merged adapter has nothing that can run, for a step of the others at least; return whether there are any."""
        others = [adapter for adapter in self._unfinished if adapter != self.merged]
        if self.merged is None or not others:
            return False
        for adapter in others:
            self._credits.setdefault(adapter, 1)
        return self._switch(None, now_s)

    def take_out(self) -> bool:
        """Unmerge an adapter that is no more; nothing is learned from it."""
        self.merged, self._look, self._last_rate = None, True, None
        return True

    def quiet_steps(self) -> float:
        """Return for how many further steps the choice stays, if no request comes or ends."""
        most = max(self._credits.values(), default=0)
        if self.merged is not None:
            return CREDIT_LIMIT - most if self._total > self._unfinished.get(self.merged, 0) else inf
        return most or inf

    def _dominating(self) -> str | None:
        """Return the adapter with the most requests, the first by name among equals, if it has its share."""
        names = [adapter for adapter in self._unfinished if adapter is not None]
        if not names:
            return None
        first = min(names, key=lambda name: (-self._unfinished[name], name))
        return first if self._unfinished[first] >= self.alpha * self._total else None

    def _switch(self, wanted: str | None, now_s: float) -> bool:
        """Change the mode; the period that ends moves the threshold of the mode that it was in."""
        assert self._since_s is not None
        rate = self._tokens / (now_s - self._since_s) if now_s > self._since_s else 0.0
        if self._last_rate is not None:
            won = rate > self._last_rate
            if self.merged is not None:
                self.alpha = max(self.beta, self.alpha - EASIER) if won else min(1.0, self.alpha * HARDER)
            else:
                self.beta = min(self.alpha, self.beta + EASIER) if won else self.beta / HARDER
        self._last_rate, self._since_s, self._tokens = rate, now_s, 0
        self.merged = wanted
        self.switches += 1
        self._look = True
        return True

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counts agree."""
        assert self._total == sum(self._unfinished.values())
        assert all(count > 0 for count in self._unfinished.values())
        assert set(self._credits) <= set(self._unfinished)
        assert all(0 < credit <= CREDIT_LIMIT for credit in self._credits.values())
        assert 0 < self.beta <= self.alpha <= 1.0

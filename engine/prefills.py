"""The prompts that are being computed, chunk by chunk."""

from __future__ import annotations

from engine.queues import WaitingQueue
from engine.sequence import Sequence
from engine.step import PrefillChunk
from engine.unified_pool import UnifiedPool


class Prefills:
    """Sequences in prefill, oldest admission first. The queue hears what is planned for whom, and the prefix cache what is written."""

    def __init__(self, page_tokens: int, memory: UnifiedPool, queue: WaitingQueue) -> None:
        self.sequences: dict[Sequence, None] = {}
        self._page_tokens = page_tokens
        self._memory = memory
        self._queue = queue

    def continue_all(self, chunks: list[PrefillChunk], budget: int) -> int:
        """Plan the next chunks of those that have begun; return what is left of the budget."""
        for sequence in self.sequences:
            if budget <= 0:
                break
            budget -= self.plan_chunk(chunks, sequence, budget)
        return budget

    def plan_chunk(self, chunks: list[PrefillChunk], sequence: Sequence, budget: int) -> int:
        """Plan the next tokens of one prompt, at most `budget`; return how many."""
        start = sequence.prefilled
        length = sequence.prefill_tokens - start
        last = length <= budget
        if not last:
            length = budget
        chunks.append(PrefillChunk(sequence, start, length, last))
        sequence.prefilled = end = start + length
        # Whoever shares these pages computes in a later step, or behind them in this one: every layer writes KV before it attends.
        if sequence.request.page_keys is not None:
            page_tokens = self._page_tokens
            self._memory.filled(sequence.request, sequence.pages, start // page_tokens, end // page_tokens)
        self._queue.served(sequence, length, 0)
        return length

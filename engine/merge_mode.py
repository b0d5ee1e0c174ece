"""The scheduler's part of `merge='dynamic'`: who runs while an adapter is merged, and who is put aside meanwhile with all that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from engine.admission import Admission
from engine.decode_set import DecodeSet
from engine.merge_policy import MergePolicy
from engine.prefills import Prefills
from engine.residency import Residency
from engine.running_set import RunningSet
from engine.sequence import Phase, Sequence
from engine.step import Step, StepShape


class MergeMode:
    """Asks the policy before each plan, and puts sequences aside or lets them go on. may_merge: asked before an adapter is merged."""

    def __init__(
        self,
        policy: MergePolicy,
        residency: Residency,
        running: RunningSet,
        prefills: Prefills,
        decoding: DecodeSet,
        admission: Admission,
    ) -> None:
        self.policy = policy
        self.may_merge: Callable[[str], bool] = lambda _name: True
        self.aside: dict[Sequence, None] = {}
        self._residency = residency
        self._running = running
        self._prefills = prefills
        self._decoding = decoding
        self._admission = admission

    def choose(self, now_s: float) -> bool:
        """Choose the mode of the next step; return whether it is another one."""
        return self._follow(self.policy.decide(now_s, self._can_merge))

    def give_up(self, now_s: float) -> bool:
        """Unmerge because nothing can run; return whether others may now."""
        return self._follow(self.policy.give_up(now_s))

    def registered(self, name: str) -> None:
        """Note that a name is another adapter's from now on: what was merged under it is taken out."""
        if self.policy.merged == name:
            self._follow(self.policy.take_out())

    def planned(self, step: Step) -> None:
        """Write into a step what is merged in it, and that its rows need no LoRA then."""
        self.policy.ran(step.shape.tokens)
        step.merged = self.policy.merged
        if step.merged is not None:
            step.shape = without_lora(step.shape)

    def forget(self, sequence: Sequence) -> bool:
        """Take a sequence out of those that were put aside; return whether it was there."""
        if sequence not in self.aside:
            return False
        del self.aside[sequence]
        return True

    def _can_merge(self, name: str) -> bool:
        footprint = self._residency.footprints[name]
        return footprint.experts is None and self._residency.is_resident(name) and self.may_merge(name)

    def _follow(self, changed: bool) -> bool:
        if changed:
            merged = self.policy.merged
            self._admission.only = merged
            if merged is None:
                self._go_on()
            else:
                self._put_aside(s for s in list(self._running.active) if s.request.adapter != merged)
        return changed

    def _put_aside(self, sequences: Iterable[Sequence]) -> None:
        """Stop planning for sequences. They keep slot, pages and adapter; one that decodes is as if all its tokens so far had been its prompt."""
        for sequence in sequences:
            if sequence.phase is Phase.DECODE:
                ticks = self._decoding.tick - sequence.join_tick
                self._decoding.leave(sequence)
                sequence.prefill_tokens += ticks
                sequence.prefilled = sequence.prefill_tokens
                sequence.phase = Phase.ASIDE
            else:
                del self._prefills.sequences[sequence]
            self.aside[sequence] = None

    def _go_on(self) -> None:
        for sequence in self.aside:
            if sequence.phase is Phase.ASIDE:
                self._decoding.join(sequence)
        self.aside.clear()
        prefills = {s: None for s in self._running.active if s.phase is Phase.PREFILL}
        self._prefills.sequences = prefills  # oldest admission first, as ever

    def check_integrity(self) -> None:
        """Raise AssertionError unless who is aside is running and of another adapter, and the policy's counts hold."""
        self.policy.check_integrity()
        assert not self.aside or self.policy.merged is not None, "somebody is aside and nothing is merged"
        for sequence in self._running.active:
            others = self.policy.merged is not None and sequence.request.adapter != self.policy.merged
            assert (sequence in self.aside) == others, "the wrong sequences run"
        assert all(sequence in self._running.active for sequence in self.aside)


def without_lora(shape: StepShape) -> StepShape:
    """Return the shape of a step whose rows all have the merged adapter."""
    return replace(
        shape, lora_tokens=0, lora_adapters=0, lora_bytes=0, lora_single_bytes=0, lora_token_bytes=0
    )

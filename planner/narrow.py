"""One replica: which settings and which policies serve it best. Many on a short stretch of the trace, few on a longer one.

A *contest* finds the best of some configurations on a piece of the trace without the highest rate of each: that of one,
the leader, is found; the others are asked for more than that, which those that are worse fail early; whoever can leads the
next round. When nobody can, the others are asked for a little less, to know who is close.

1. *Screen*: in each group (TP degree and way to cut adapters) a contest of all settings on the busiest SCREEN_REQUESTS.
   Groups whose leader, times the replicas there are GPUs for, is far behind the best are not looked into further.
2. *Window*: a contest of the KEPT best of each group that is left on the busiest WINDOW_REQUESTS.
3. *Policies*: from each such winner, every single other policy, and then settings again under the new policy, is asked for
   a rate a tie higher than its own, as long as one succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config import ServingConfig
from planner.jobs import Challenge
from planner.ledger import Ledger
from planner.space import Values
from planner.trial import TIE, Trial, order
from planner.variants import Variants
from planner.workload import Piece

SCREEN_TOLERANCE = 0.05
WINDOW_TOLERANCE = 0.03
MARGIN = {"screen": 0.04, "window": 0.03}  # below the leader's rate: where the others are asked
KEPT = 3  # settings of a group that come from the screen to the window
SCREEN_GUESS = 0.6  # of the ceiling
FAR_BEHIND = 0.55  # of the best group's estimate: not looked into
NEAR = 0.7  # of the best: its settings and policies are looked into on the window
MOST_ROUNDS = 4

Group = tuple[int, str]


def group_of(config: ServingConfig) -> Group:
    """Return what settings are compared within."""
    return config.tp, config.lora_sharding


@dataclass(slots=True, eq=False)
class Contest:
    """Who is best of some configurations: the leader's trial, and the others best first as far as that is known."""

    leader: ServingConfig
    others: list[ServingConfig]
    trial: Trial | None = None
    close: list[ServingConfig] = field(default_factory=list)  # met the SLO near the leader's rate, best first

    @property
    def ranked(self) -> list[ServingConfig]:
        """The best first: the leader, and who came close to it."""
        return [self.leader, *self.close]


class Narrowing:
    """Finds the best configurations of one replica."""

    def __init__(self, ledger: Ledger, variants: Variants, policies: Values) -> None:
        self._ledger = ledger
        self._variants = variants
        self._policies = policies

    def best(
        self, configs: list[ServingConfig], most_replicas: Callable[[int], int]
    ) -> dict[Group, list[Trial]]:
        """Return each group's best trials, best first: on the window, or on the screen where they are far behind."""
        groups: dict[Group, list[ServingConfig]] = {}
        for config in configs:
            groups.setdefault(group_of(config), []).append(config)
        contests = [_start(members) for members in groups.values()]
        guesses = [SCREEN_GUESS * self._ledger.ceiling_rps(contest.leader) for contest in contests]
        self._lead("screening settings", contests, "screen", guesses, 0.5)

        def estimate_rps(contest: Contest) -> float:
            if contest.trial is None:
                return 0.0
            return contest.trial.sustainable_rps * most_replicas(contest.leader.tp)

        best_rps = max(map(estimate_rps, contests), default=0.0)
        near = [contest for contest in contests if estimate_rps(contest) >= FAR_BEHIND * best_rps]
        self._settle("screening settings", near, "screen")
        finals = [
            Contest(c.leader, _kept(c, groups[group_of(c.leader)]), c.trial)
            for c in near
            if c.trial is not None
        ]
        guesses = [0.0 if c.trial is None else c.trial.sustainable_rps for c in finals]
        self._lead("the best settings", finals, "window", guesses, 0.08)
        best_rps = max(map(estimate_rps, finals), default=0.0)
        nearest = [contest for contest in finals if estimate_rps(contest) >= NEAR * best_rps]
        self._settle("the best settings", nearest, "window")
        self._improve(nearest)
        far = [contest for contest in contests if contest not in near]
        found: dict[Group, list[Trial]] = {}
        for contest in (*finals, *far):
            trials = [self._ledger.findings.trials.get(config) for config in contest.ranked]
            known = [trial for trial in trials if trial is not None and trial.sustainable_rps > 0]
            if known:
                found[group_of(contest.leader)] = known
        return found

    # ---- contests ----

    def _lead(
        self, stage: str, contests: Sequence[Contest], piece: Piece, guesses: list[float], reach: float
    ) -> None:
        """Find the leaders' highest rates; a leader that meets the SLO at no rate is followed by the next one."""
        tolerance = SCREEN_TOLERANCE if piece == "screen" else WINDOW_TOLERANCE
        waiting = list(zip(contests, guesses, strict=True))
        while waiting:
            work = [
                self._ledger.rate_job(c.leader, piece, guess or self._guess(c.leader), tolerance, reach)
                for c, guess in waiting
            ]
            self._ledger.rates(stage, work)
            again = []
            for contest, _ in waiting:
                trial = self._ledger.findings.trials.get(contest.leader)
                contest.trial = trial if trial is not None and trial.piece == piece else None
                failed = contest.trial is not None and not contest.trial.sustainable_rps
                if failed and contest.others:
                    contest.leader = contest.others.pop(0)
                    again.append((contest, 0.0))
            waiting = [] if self._ledger.timed_out else again

    def _guess(self, config: ServingConfig) -> float:
        return SCREEN_GUESS * self._ledger.ceiling_rps(config)

    def _settle(self, stage: str, contests: Sequence[Contest], piece: Piece) -> None:
        """Ask the others for more than the leader sustains until nobody can; then who comes close to it."""
        open_ = [contest for contest in contests if _rps(contest) > 0]
        left = {id(contest): list(contest.others or contest.close) for contest in open_}
        for _ in range(MOST_ROUNDS):
            if not open_ or self._ledger.timed_out:
                return
            passed = self._ask(
                stage, [(c, config, _beyond_rps(c)) for c in open_ for config in left[id(c)]], piece
            )
            open_ = [contest for contest in open_ if passed.get(id(contest))]
            for contest in open_:
                won = min(passed[id(contest)], key=_by_attainment).config
                left[id(contest)] = [trial.config for trial in passed[id(contest)] if trial.config != won]
                contest.close = [contest.leader, *contest.close]
                contest.leader = won
            self._lead(stage, open_, piece, [_beyond_rps(contest) * 1.02 for contest in open_], 0.06)
        self._rank(stage, contests, piece)

    def _rank(self, stage: str, contests: Sequence[Contest], piece: Piece) -> None:
        """Find who comes close to the leaders: first who sustained more so far, then the larger limits, which bind last."""
        open_ = [contest for contest in contests if _rps(contest) > 0]
        asked = [
            (contest, config, _rps(contest) * (1 - MARGIN[piece]))
            for contest in open_
            for config in dict.fromkeys((*contest.close, *contest.others))
            if config != contest.leader
        ]
        passed = self._ask(stage, asked, piece)
        for contest in open_:
            near = passed.get(id(contest), [])
            near.sort(
                key=lambda trial: (
                    *_by_attainment(trial)[:1],
                    -trial.config.max_num_seqs,
                    order(trial.config),
                )
            )
            contest.close = [trial.config for trial in near]

    def _ask(
        self, stage: str, asked: Sequence[tuple[Contest, ServingConfig, float]], piece: Piece
    ) -> dict[int, list[Trial]]:
        """Ask each configuration for a rate; return who met the SLO at it, by contest."""
        work = [Challenge(config=config, piece=piece, rate_rps=rate_rps) for _, config, rate_rps in asked]
        passed: dict[int, list[Trial]] = {}
        for (contest, _, _), answer in zip(asked, self._ledger.run(stage, work), strict=True):
            if isinstance(answer, list) and answer[0].at_best is not None:
                passed.setdefault(id(contest), []).append(answer[0])
        return passed

    # ---- policies ----

    def _improve(self, contests: Sequence[Contest]) -> None:
        """Change one policy at a time, and settings under the new ones, while that gains more than a tie."""
        open_ = [contest for contest in contests if _rps(contest) > 0]
        for _ in range(MOST_ROUNDS):
            if not open_ or self._ledger.timed_out:
                return
            asked = [(c, config, _beyond_rps(c)) for c in open_ for config in self._neighbours(c)]
            winners = self._ask("policies", asked, "window")
            open_ = [contest for contest in open_ if id(contest) in winners]
            for contest in open_:
                won = min(winners[id(contest)], key=_by_attainment)
                contest.close = [contest.leader, *contest.close]
                contest.leader = won.config
            self._lead(
                "policies", open_, "window", [_beyond_rps(contest) * (1 + TIE) for contest in open_], 0.05
            )

    def _neighbours(self, contest: Contest) -> list[ServingConfig]:
        """Return the leader with one policy changed, and the close settings under its policies."""
        found: list[ServingConfig] = []
        leader = contest.leader
        for changes in self._variants.others(leader, self._policies):
            config = self._ledger.varied(self._variants, leader, changes)
            if config is not None:
                found.append(config)
        policies: dict[str, Any] = {name: getattr(leader, name) for name in self._policies}
        if any(policies[name] != values[0] for name, values in self._policies.items()):
            for other in contest.close:
                config = self._ledger.varied(self._variants, other, policies)
                if config is not None:
                    found.append(config)
        known = self._ledger.findings.trials
        return [config for config in dict.fromkeys(found) if config != leader and config not in known]


def _kept(contest: Contest, members: Sequence[ServingConfig]) -> list[ServingConfig]:
    """Return who goes on beside the leader: who came close, and the leader with the next larger limits, which bind later on longer stretches."""
    leader = contest.leader
    larger = [
        next((c for c in members if _limits(c) == wanted), None)
        for wanted in (
            (_next(members, "max_num_seqs", leader), leader.max_num_batched_tokens),
            (leader.max_num_seqs, _next(members, "max_num_batched_tokens", leader)),
        )
    ]
    close = contest.close[: KEPT - 1]
    return list(dict.fromkeys((*close, *(c for c in larger if c is not None and c != leader))))


def _limits(config: ServingConfig) -> tuple[int, int]:
    return config.max_num_seqs, config.max_num_batched_tokens


def _next(members: Sequence[ServingConfig], name: str, leader: ServingConfig) -> int:
    """Return the next larger value of a limit, or the leader's own."""
    own: int = getattr(leader, name)
    return min((getattr(c, name) for c in members if getattr(c, name) > own), default=own)


def _start(members: list[ServingConfig]) -> Contest:
    """Begin with the middle one."""
    leader = members[len(members) // 2]
    return Contest(leader, [config for config in members if config != leader])


def _rps(contest: Contest) -> float:
    return 0.0 if contest.trial is None else contest.trial.sustainable_rps


def _beyond_rps(contest: Contest) -> float:
    """Return a rate that is more than a tie above the leader's, and that it was not seen to sustain."""
    above_rps = 0.0 if contest.trial is None else contest.trial.above_rps
    return max(_rps(contest) * (1 + TIE), above_rps)


def _by_attainment(trial: Trial) -> tuple[float, Any]:
    return (0.0 if trial.at_best is None else -trial.at_best.attainment, order(trial.config))

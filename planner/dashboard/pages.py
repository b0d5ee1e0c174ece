"""Which pages there are, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.dashboard import adapter_rank, attainment, compare, memory, pareto, plan, traffic, trust
from planner.dashboard.state import Current, current_or_stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page: its place in the address, its title, and what draws it for a scenario."""

    path: str
    title: str
    icon: str
    draw: Callable[[Current], None]
    default: bool = False

    def show(self) -> None:
        """Draw the page for the scenario of the form, or say what is wrong with that."""
        self.draw(current_or_stop(self.title))


PAGES = (
    Page(path="plan", title="Plan", icon=":material/checklist:", draw=plan.draw, default=True),
    Page(path="attainment", title="SLO against rate", icon=":material/show_chart:", draw=attainment.draw),
    Page(path="memory", title="Memory", icon=":material/memory:", draw=memory.draw),
    Page(path="trust", title="Trust", icon=":material/verified:", draw=trust.draw),
    Page(path="pareto", title="Speed against throughput", icon=":material/scatter_plot:", draw=pareto.draw),
    Page(path="adapters", title="Adapters × rank", icon=":material/grid_on:", draw=adapter_rank.draw),
    Page(path="traffic", title="Adapter traffic", icon=":material/bar_chart:", draw=traffic.draw),
    Page(path="compare", title="Compare and cost", icon=":material/compare_arrows:", draw=compare.draw),
)

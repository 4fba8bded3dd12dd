"""What the state machines of these tests have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exploration import effort
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    run_state_machine_as_test,
)


class Counting(RuleBasedStateMachine):
    """One that counts its steps."""

    steps = 0

    @invariant()
    def _count(self) -> None:
        type(self).steps += 1


def run(machine: type[Counting], long: bool, short: int, full: int, record_figure: Callable[[str, Any], None]) -> None:
    machine.steps = 0
    run_state_machine_as_test(machine, settings=settings(effort(long, short, full), stateful_step_count=25))
    record_figure(f"steps of {machine.__name__}", machine.steps)

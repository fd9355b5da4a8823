"""Work on the main thread in steps, between which the window lives: generators that yield after each step.

A step takes a fraction of a second at most. Scripts exhaust such a generator, the panel lets a timer do it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import qt

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


def exhaust(steps: Steps[Result]) -> Result:
    """All steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Stepper:
    """Runs one generator from the event loop: a step, then whatever the user did meanwhile, then the next."""

    def __init__(
        self, steps: Steps[Result], done: Callable[[Result], None], failed: Callable[[Exception], None]
    ) -> None:
        self._steps, self._done, self._failed = steps, done, failed
        self._timer: Any = qt.QTimer()
        self._timer.setSingleShot(True)
        self._timer.connect("timeout()", self._step)
        self._timer.start(0)

    def cancel(self) -> None:
        """End the generator where it stands; what it has made so far it takes back itself (GeneratorExit)."""
        self._end()
        self._steps.close()

    def _step(self) -> None:
        try:
            next(self._steps)
        except StopIteration as end:
            self._end()
            self._done(end.value)
        except Exception as error:  # noqa: BLE001 - a slot has no caller: the owner shows it
            self._end()
            self._failed(error)
        else:
            if self._timer is not None:  # else it was cancelled in the step
                self._timer.start(0)

    def _end(self) -> None:
        """Without the timer's connection, which would keep this Stepper."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.deleteLater()
            self._timer = None

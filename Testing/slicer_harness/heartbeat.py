"""How long the window was blocked: the longest pause of a Qt timer that should fire all the time."""

from __future__ import annotations

import time
from types import TracebackType

import qt


class Heartbeat:
    """with Heartbeat() as heartbeat: ...; heartbeat.longest_s is the longest time in which no event was handled."""

    EVERY_MS = 5

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._last = 0.0
        self._timer = qt.QTimer()
        self._timer.connect("timeout()", self._beat)

    def __enter__(self) -> Heartbeat:
        self._last = time.perf_counter()
        self._timer.start(self.EVERY_MS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beat()
        self._timer.stop()

    def _beat(self) -> None:
        now = time.perf_counter()
        self.longest_s = max(self.longest_s, now - self._last)
        self._last = now

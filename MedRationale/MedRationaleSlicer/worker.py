"""The worker process (MedRationaleLib.worker) as the panel sees it: started, listened to, ended."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import qt
import slicer
from slicer.i18n import tr as _

import MedRationaleLib

HOME = Path(MedRationaleLib.__file__).resolve().parents[1]
"""`python -m` takes the library from the folder that it is started in."""
JOB_FILE, LOG_FILE = "job.json", "worker.log"
SILENCE_S = 60.0
"""A worker tells that it is alive every two seconds; one that is silent for this long hangs."""
STUCK_S = 300.0
"""One that tells nothing but that, and has its processor stand still for this long, waits for what does not come."""
IDLE_CPU_S = 0.05
"""Processor time between two signs of life that is none: the signs themselves cost some."""
GARBAGE_LINES = 20
"""So many lines that are no messages are kept, to be quoted."""
CODES_OF_KILLED = (-9, 137)
KINDS = {
    "started": {"pid": int, "version": str},
    "alive": {"cpu_s": (int, float)},
    "progress": {"stage": str, "text": str, "fraction": (int, float)},
    "log": {"level": str, "text": str},
    "done": {"folder": str, "warnings": list},
    "failed": {"text": str, "code": int},
}
"""Messages and what they must hold: Resources/Schemas/worker_message.schema.json, as far as it is relied on here."""


@dataclass(frozen=True)
class Outcome:
    """How a worker ended: with a "done" message, or with a sentence."""

    done: dict[str, Any] | None
    error: str | None = None


class Launch(Protocol):
    """slicer.util.launchConsoleProcess, or a stand-in of the tests."""

    def __call__(self, args: list[str], **options: Any) -> Any:
        """Start a process."""


def message_of(line: str) -> dict[str, Any] | None:
    """The message in a line of output; None where there is none."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    needed = KINDS.get(message.get("type")) if isinstance(message, dict) else None
    if needed is None or not all(isinstance(message.get(key), kind) for key, kind in needed.items()):
        return None
    return message


def python_slicer() -> str:
    """PythonSlicer, Slicer's Python without the application."""
    found = shutil.which("PythonSlicer")
    if found is None:
        raise RuntimeError(_("Expected PythonSlicer beside Slicer, found none; install Slicer again."))
    return found


class Worker:
    """One job in a process of its own.

    Args:
        folder: holds job.json; the worker's log goes there.
        progress: told (what is being done, fraction of the whole).
        ended: told the Outcome, once, in the main thread; not after cancel().
    """

    def __init__(
        self,
        folder: Path,
        *,
        progress: Callable[[str, float], None],
        ended: Callable[[Outcome], None],
        launch: Launch | None = None,
    ) -> None:
        self.folder = folder
        self._progress, self._ended = progress, ended
        self._launch = launch or slicer.util.launchConsoleProcess
        self._process: Any = None
        self._pid: int | None = None
        self._done: dict[str, Any] | None = None
        self._failed: str | None = None
        self._garbage: list[str] = []
        self._heard = self._worked = time.monotonic()
        self._cpu_s = 0.0
        self._idle: str | None = None
        self._over = False
        self._watch: Any = None

    def start(self) -> None:
        """Start it, and return; messages come through the event loop."""
        self._process = self._launch(
            self._command, cwd=str(HOME), blocking=False, logCallback=self._line, completedCallback=self._exit
        )
        self._heard = self._worked = time.monotonic()
        self._watch = qt.QTimer()
        self._watch.connect("timeout()", self._check)
        self._watch.start(2000)

    def run(self) -> None:
        """Start it and wait for its end (scripts)."""
        self._process = self._launch(self._command, cwd=str(HOME), blocking=True)
        self._heard = self._worked = time.monotonic()
        ended = threading.Event()
        threading.Thread(target=self._end_idle, args=(ended,), daemon=True).start()
        try:
            for line in self._process.stdout:
                self._line(line)
            code = self._process.wait()
        finally:
            ended.set()
        if self._idle is None:
            self._exit(code)
        else:
            self._finish()
            self._ended(Outcome(None, self._idle))

    def cancel(self) -> None:
        """End the process and whatever it has started; nothing is told any more.

        Where it has not told its process id yet, it is ended as soon as it does.
        """
        self._finish()
        if self._pid is not None or os.name == "nt":
            self._kill()

    @property
    def _command(self) -> list[str]:
        return [python_slicer(), "-m", "MedRationaleLib.worker", str(self.folder / JOB_FILE)]

    def _line(self, line: str) -> None:
        message = message_of(line)
        if self._over:
            if message is not None and message["type"] == "started":
                self._pid = message["pid"]
                self._kill()
            return
        if not line.strip():
            return
        if message is None:
            logging.info("worker: %s", line.rstrip())
            self._garbage = [*self._garbage, line.strip()][-GARBAGE_LINES:]
            return
        self._heard = time.monotonic()
        kind = message["type"]
        if kind != "alive" or message["cpu_s"] > self._cpu_s + IDLE_CPU_S:
            self._worked = self._heard
            self._cpu_s = message.get("cpu_s", self._cpu_s)
        if kind == "started":
            self._pid = message["pid"]
        elif kind == "progress":
            self._progress(message["text"], min(max(float(message["fraction"]), 0.0), 1.0))
        elif kind == "log":
            logging.warning("worker: %s", message["text"])
            self._progress(message["text"], -1.0)
        elif kind == "done":
            self._done = message
        elif kind == "failed":
            self._failed = message["text"]
            if message["code"] != 2:  # no bad input: what led to it belongs in Slicer's log
                self._last_words()

    def _exit(self, code: int) -> None:
        if self._over:
            return
        self._finish()
        if self._failed is not None:
            self._ended(Outcome(None, self._failed))
        elif self._done is not None and code == 0:
            self._ended(Outcome(self._done))
        else:
            self._ended(Outcome(None, self._sentence(code)))

    def _sentence(self, code: int) -> str:
        if code in CODES_OF_KILLED:
            return _(
                "The analysis was ended by the system, as a rule because memory ran out; close other programmes or "
                "choose another device."
            )
        told = self._last_words()
        if not told:
            return _("The analysis ended unexpectedly (exit code {code}); the application log has the rest.").format(
                code=code
            )
        return _(
            "The analysis ended unexpectedly (exit code {code}, last words: {told}); the application log has the rest."
        ).format(code=code, told=told)

    def _last_words(self) -> str:
        """The last line that is no message, else the last of the worker's log, which goes to Slicer's log."""
        try:
            lines = (self.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        if lines:
            logging.error("worker's log:\n%s", "\n".join(lines[-50:]))
        return (lines or self._garbage or [""])[-1][:200]

    def _check(self) -> None:
        idle = self._idleness()
        if idle is not None:
            self._finish()
            self._kill()
            self._ended(Outcome(None, idle))

    def _end_idle(self, ended: threading.Event) -> None:
        """For run(), which waits for lines: ends a worker that does nothing, which ends the waiting."""
        while not ended.wait(min(2.0, SILENCE_S / 2)):
            self._idle = self._idleness()
            if self._idle is not None:
                self._kill()
                return

    def _idleness(self) -> str | None:
        """The sentence where the worker hangs: nothing heard of it, or neither progress nor processor time spent."""
        now = time.monotonic()
        if now - self._heard > SILENCE_S:
            text = _("The analysis gave no sign of life for {seconds:.0f} s and was ended; start it again.")
            return text.format(seconds=now - self._heard)
        if now - self._worked > STUCK_S:
            text = _("The analysis did nothing for {seconds:.0f} s and was ended; start it again.")
            return text.format(seconds=now - self._worked)
        return None

    def _finish(self) -> None:
        self._over = True
        if self._watch is not None:
            self._watch.stop()
            self._watch.deleteLater()  # with its connection, which would keep this Worker
            self._watch = None

    def _kill(self) -> None:
        """The worker has its own process group; PythonSlicer may be a launcher that is not in it."""
        if self._process is None:
            return
        if os.name == "nt":
            command = ["taskkill", "/F", "/T", "/PID", str(self._process.pid)]
            hidden = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # no console window over Slicer's
            subprocess.run(command, capture_output=True, check=False, creationflags=hidden)
        elif self._pid is not None:
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                logging.debug("the worker %d is gone already", self._pid)
        if self._process.poll() is None:
            self._process.kill()

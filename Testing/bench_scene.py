"""How long the panel takes to bring results into the scene and to switch heatmaps, and how long its window is blocked.

On the phantom, a full-size examination, with the real worker: `make bench-scene`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path

from phantom_session import phantom_session

ROUNDS = 5
PAUSE = "longest pause of the window"
TARGETS = {"building the scene": 1.0, "switching a heatmap": 0.2, PAUSE: 0.2}
"""Seconds, at most; a pause in every round, the others in the median one. The first round has all to import."""


def main() -> int:
    """Print medians and worst of ROUNDS; exit code 1 where one misses its target, of the pauses the worst."""
    with phantom_session() as session:
        from MedRationaleSlicer import run
        from MedRationaleSlicer.results import Results
        from MedRationaleSlicer.steps import exhaust
        from slicer_harness.heartbeat import Heartbeat

        panel, kept = session.panel, session.folder / "kept"
        after = run.AssessTask.after

        def keeping(task: run.AssessTask, message: dict) -> object:
            shutil.copytree(message["folder"], kept, dirs_exist_ok=True)
            return (yield from after(task, message))

        run.AssessTask.after = keeping  # the results' files are deleted when they are in the scene
        measured: dict[str, list[float]] = {name: [] for name in TARGETS}
        for _ in range(ROUNDS):
            with Heartbeat() as heartbeat:
                panel.ui.applyButton.click()
                session.wait()
            measured[PAUSE].append(heartbeat.longest_s)
        inputs = {name: panel.results.current.input(name) for name in ("t2w", "adc", "dwi")}
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            results = exhaust(Results.create(kept, inputs))
            results.heatmap(next(s.evidence for s in results.findings[0].rationale if s.evidence))
            measured["building the scene"].append(time.perf_counter() - begun)
        steps = [s.node for s in results.findings[0].rationale if s.evidence]
        for node in (*steps, *steps):
            begun = time.perf_counter()
            session.select(0, node)
            view = session.views.sliceWidget("Red")
            view.sliceLogic().GetBlend().Update()
            measured["switching a heatmap"].append(time.perf_counter() - begun)
    missed = 0
    for name, seconds in measured.items():
        median, worst = statistics.median(seconds), max(seconds)
        missed += (worst if name == PAUSE else median) > TARGETS[name]
        sys.stdout.write(
            f"{name:<28} median {median:.3f} s, worst {worst:.3f} s of {len(seconds)} (at most {TARGETS[name]:.1f} s)\n"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())

"""What the command line shows: progress by stage, the summary of an Assessment, and where the time went."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from MedRationaleLib.assessment import Assessment

STAGES = {
    "read": "reading the examination",
    "import": "importing torch",
    "load": "loading the model",
    "model": "running the model",
    "masks": "cleaning the masks",
    "findings": "walking the decision tree",
    "evidence": "drawing the evidence",
    "write": "writing the results",
    "phantom": "drawing the phantom",
    "medsam": "reading the image encoder",
    "biomedclip": "reading the text tower",
    "embed": "embedding the concepts",
    "verify": "reading all weights",
}
"""Stage -> what is shown of it, in the order in which predict comes through them; then those of other commands."""
PLAIN_WIDTH = 200
"""Characters a line where the output is no terminal, so that no row of a table is folded."""


def console_for(stream: Any) -> Console:
    """Colours and the window's width in a terminal, plain wide lines elsewhere."""
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def summarise(assessment: Assessment, report: Path, console: Console) -> None:
    """The findings as a table, volumes, what weakens them, and where the report is."""
    from MedRationaleLib.report import is_synthetic, not_shown  # brings SimpleITK, so not before it is needed

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=not console.is_terminal)

    if is_synthetic(assessment):
        say("Synthetic images: a computer drew them, no patient was imaged.", "bold")
    for note in dict.fromkeys((*assessment.study.warnings, *assessment.warnings)):
        say(f"Warning: {note}", "yellow")
    if assessment.findings:
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 2, 0, 0))
        for name in ("Lesion", "Zone", "Sector"):
            table.add_column(name)
        for name in ("Size mm", "Volume ml", "T2W", "DWI", "PI-RADS", "Likelihood*"):
            table.add_column(name, justify="right")
        for finding in assessment.findings:
            t2w = "–" if finding.t2w_score is None else str(finding.t2w_score)
            numbers = (f"{finding.size_mm:.1f}", f"{finding.volume_ml:.2f}", t2w, finding.dwi_in_words)
            likelihood = f"{finding.likelihood:.2f}"
            table.add_row(finding.id, finding.zone, finding.sector, *numbers, finding.category_in_words, likelihood)
        console.print(table)
        if all(finding.pirads < 3 for finding in assessment.findings):
            say("No finding of category 3 or more.", "bold")
    elif assessment.volumes_ml.get("gland"):
        say("No suspicious lesion was found.", "bold")
    else:
        say("Not assessed: no prostate was found, so no lesion was looked for.", "bold")
    if assessment.findings:
        say(
            "* that such a candidate is a lesion, as fitted on synthetic examinations; not the probability of cancer",
            "dim",
        )
    if below := not_shown(assessment.not_shown, assessment.manifest):
        say(below, "dim")
    volumes = assessment.volumes_ml
    zones = ", ".join(f"{name.upper()} {volumes[name]:.1f}" for name in ("pz", "tz") if name in volumes)
    ellipsoid = f"; ellipsoid formula {volumes['ellipsoid']:.1f} ml" if "ellipsoid" in volumes else ""
    known = assessment.study.patient.get("psa_density_ng_ml2")
    density = "" if known is None else f"; PSA density {known:.2f} ng/ml²"
    say(f"Gland {volumes.get('gland', 0.0):.1f} ml ({zones}){ellipsoid}{density}")
    for note in weakened_answers(assessment):
        say(f"Weaker: {note}", "yellow")
    for finding in assessment.findings:
        for note in finding.contradictions:
            say(f"Contradiction in {finding.id}: {note}", "yellow")
    say("This assists a reader; it does not diagnose.", "dim")
    say(f"Report: {report}", "bold")


def weakened_answers(assessment: Assessment) -> Iterator[str]:
    """For each set of missing sequences, the questions whose answers rest on them and the findings concerned."""
    nodes: dict[tuple[str, ...], dict[str, None]] = {}
    concerned: dict[tuple[str, ...], dict[str, None]] = {}
    for finding in assessment.findings:
        for step in finding.rationale:
            if step.weakened_by:
                nodes.setdefault(step.weakened_by, {})[_in_words(step.node)] = None
                concerned.setdefault(step.weakened_by, {})[finding.id] = None
    for missing, names in nodes.items():
        without = " and ".join(map(_in_words, missing))
        yield f"{', '.join(concerned[missing])}: {', '.join(names)} (without {without})"


class Stages:
    """Shows what is being done, and remembers how long it took: `stages("masks", 0.5)`."""

    def __init__(self, show: Callable[[str, float], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show
        self._current: str | None = None
        self._since = time.perf_counter()

    def __call__(self, stage: str, fraction: float) -> None:
        self.lap()
        self._current = stage
        self._show(stage, fraction)

    def lap(self) -> None:
        """Book the time since the last call to the stage that was under way."""
        now = time.perf_counter()
        if self._current is not None:
            self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._since
        self._since = now


@contextmanager
def show_stages(quiet: bool) -> Iterator[Stages]:
    """Progress on stderr: bars in a terminal, a line per stage elsewhere, nothing where it is to be quiet."""
    seen: dict[str, Any] = {}
    if quiet or not sys.stderr.isatty():

        def show_line(stage: str, fraction: float) -> None:
            if stage not in seen and not quiet:
                sys.stderr.write(f"{STAGES.get(stage, stage)} ...\n")
                sys.stderr.flush()
            seen[stage] = fraction

        stages = Stages(show_line)
        yield stages
        stages.lap()
        return
    # A descriptor of its own, because image_files.quiet_itk silences that of stderr while it reads.
    with os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace") as terminal:
        columns = (TextColumn("{task.description:<26}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console_for(terminal)) as bars:

            def show_bar(stage: str, fraction: float) -> None:
                if stage not in seen:
                    for task in seen.values():
                        bars.update(task, total=1.0, completed=1.0)
                    # Without a total a bar pulses, which suits stages that do not say how far they are.
                    seen[stage] = bars.add_task(STAGES.get(stage, stage), total=None)
                if fraction > 0:
                    bars.update(seen[stage], total=1.0, completed=min(fraction, 1.0))

            stages = Stages(show_bar)
            yield stages
            stages.lap()
            for task in seen.values():
                bars.update(task, total=1.0, completed=1.0)


@contextmanager
def show_transfer(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of files being fetched, told as (file, bytes there, bytes in all): bars in a terminal, else a line at
    every tenth; nothing where it is to be quiet."""
    if quiet:
        yield lambda name, done, total: None
        return
    if not sys.stderr.isatty():
        told: dict[str, int] = {}

        def show_line(name: str, done: int, total: int) -> None:
            tenths = 10 * done // max(total, 1)
            if tenths > told.get(name, -1) and (total > 1e6 or done == total):
                told[name] = tenths
                sys.stderr.write(f"{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB\n")
                sys.stderr.flush()

        yield show_line
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console_for(sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def show_bar(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield show_bar


def show_profile(seconds: dict[str, float], console: Console) -> None:
    """Where the time went, in the order of the stages, and the peak memory where the system tells it."""
    total = sum(seconds.values())
    rows = [f"{name:<10}{value:8.2f} s {100 * value / total:5.0f} %" for name, value in seconds.items()]
    rows.append(f"{'total':<10}{total:8.2f} s")
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kibibytes
        rows.append(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB")
    console.print("\n".join(rows), markup=False)


def _in_words(name: str) -> str:
    """ "adc_signal" -> "ADC signal"."""
    return " ".join(word.upper() if word in ("adc", "dwi", "t2w", "dce", "epe") else word for word in name.split("_"))

"""Many examinations with one loaded model: a result folder for each, and one table that is whole at any moment."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from MedRationaleLib import __version__
from MedRationaleLib.batch_input import SUMMARY_FILE, StudySource, is_summary
from MedRationaleLib.console import STAGES, console_for
from MedRationaleLib.errors import InputError
from MedRationaleLib.failures import explain
from MedRationaleLib.files import MANIFEST, atomic_path, check_writable, written_files
from MedRationaleLib.output import write_results
from MedRationaleLib.serialization import ASSESSMENT_FILE, findings_of, plain, read_json

if TYPE_CHECKING:
    from MedRationaleLib.cli import Assessor

log = logging.getLogger(__name__)
LOCK_FILE = ".batch.lock"
NO_PROSTATE = "No prostate was found in the images; check that the right series were given."


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of summary.csv: one finding, an examination without any, or one that failed or was not assessed."""

    id: str
    status: Literal["done", "not assessed", "failed"]
    """ "not assessed" where no prostate was found, so that no lesion was looked for."""
    error: str = ""
    """Why it failed or was not assessed, in one sentence."""
    findings: int | None = None
    """How many the examination has; its other rows have the others."""
    finding: str | None = None
    """Id of this one, also of its segment."""
    zone: str | None = None
    sector: str | None = None
    size_mm: float | None = None
    volume_ml: float | None = None
    likelihood: float | None = None
    t2w_score: int | None = None
    dwi_score: int | None = None
    dwi_inferred: bool | None = None
    """As Finding.dwi_inferred."""
    pirads: int | None = None
    gland_ml: float | None = None
    seconds: float | None = None
    """For the whole examination, from reading to writing."""
    warnings: int | None = None
    """How many; its report and its assessment.json have them in words."""


COLUMNS = tuple(column.name for column in fields(Row))


@dataclass(kw_only=True)
class Summary:
    """summary.csv, written anew after every examination."""

    folder: Path
    order: tuple[str, ...]
    """Ids of all examinations; the file has its rows in this order, whichever was done first."""
    rows: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / SUMMARY_FILE

    def check(self) -> None:
        """Raise InputError if it could not be written: asked before the long work, not after it."""
        check_writable(self.folder)
        if self.path.exists() and not is_summary(self.path):
            raise InputError(
                f"Expected to write {SUMMARY_FILE} in {self.folder}, where a file of that name is not from "
                "MedRationale: choose another output folder or move that file."
            )

    def write(self) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            for name in self.order:
                table.writerows([getattr(row, column) for column in COLUMNS] for row in self.rows.get(name, ()))

    def count(self, status: str) -> int:
        """How many examinations have this status."""
        return sum(rows[0].status == status for rows in self.rows.values())


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is asked of every examination."""

    predictor: Assessor
    retrieval: str
    decision_tree: str
    command_line: str
    """For the manifests."""

    def request(self, source: StudySource) -> dict[str, Any]:
        """What decides a result, and stands in its manifest; an earlier result with the same is not computed again."""
        return {
            "medrationale": __version__,
            "weights_sha256": self.predictor.checkpoint.sha256,
            "postprocessing": plain(self.predictor.postprocessing),
            **self.predictor.settings,
            "retrieval": self.retrieval,
            "decision_tree": self.decision_tree,
            "inputs": source.fingerprint(),
        }

    def run(self, sources: Sequence[StudySource], summary: Summary, *, resume: bool, quiet: bool) -> None:
        """Assess the sources one after the other; a failure is recorded and the next one's turn comes.

        With `resume` those that an earlier run finished are taken from there, all of them first. Raises InputError
        where another batch is writing into the folder.
        """
        summary.folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(summary.folder):
            _clear_leftovers(summary.folder)
            self._run(sources, summary, resume=resume, quiet=quiet)

    def _run(self, sources: Sequence[StudySource], summary: Summary, *, resume: bool, quiet: bool) -> None:
        if resume:
            for source in sources:
                if rows := self._earlier(source, summary.folder / source.id):
                    summary.rows[source.id] = rows
        left = [source for source in sources if source.id not in summary.rows]
        others = {path.parent for path in summary.folder.glob(f"*/{MANIFEST}") if written_files(path.parent)}
        others -= {summary.folder / source.id for source in sources}
        summary.write()
        with show_examinations(len(left), quiet) as shown:
            if others:
                shown.say(
                    f"{summary.folder} also holds results of {len(others)} that an earlier batch read; they stay, and "
                    f"{SUMMARY_FILE} is of this batch alone"
                )
            if earlier := len(sources) - len(left):
                shown.say(f"{earlier} of {len(sources)} done earlier, with the same inputs and settings")
            for source in left:
                shown.begin(source.id)
                summary.rows[source.id] = rows = self._rows(source, summary.folder / source.id, shown)
                summary.write()
                shown.end(rows, [] if rows[0].status == "failed" else _warnings(summary.folder / source.id))

    def _earlier(self, source: StudySource, folder: Path) -> list[Row] | None:
        """The rows of a result that is whole and was asked for in the same way; None where there is none."""
        try:
            same = read_json(folder / MANIFEST).get("request") == self.request(source)
            whole = all((folder / name).is_file() for name in written_files(folder))
            return _rows_of(source.id, folder) if same and whole else None
        except (InputError, OSError, AttributeError, LookupError, TypeError):  # none, or no more what it was
            return None

    def _rows(self, source: StudySource, folder: Path, shown: Shown) -> list[Row]:
        started = time.perf_counter()
        try:
            self._assess(source, folder, shown)
            return _rows_of(source.id, folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other examinations do not suffer from it
            log.info("%s", source.id, exc_info=True)
            sentence = str(error) if isinstance(error, InputError) else explain(error)[0]
            if written_files(folder):
                sentence += f" The results in {folder} are those of an earlier run."
            seconds = round(time.perf_counter() - started, 1)
            return [Row(id=source.id, status="failed", error=" ".join(sentence.split()), seconds=seconds)]

    def _assess(self, source: StudySource, folder: Path, shown: Shown) -> None:
        request = self.request(source)  # before reading: a file that changes meanwhile is not what it says
        started = time.perf_counter()
        shown.stage("read", 0.0)
        study = source.read()
        read = round(time.perf_counter() - started, 3)
        assessment = self.predictor.assess(
            study,
            progress=shown.stage,
            retrieval=self.retrieval,
            decision_tree=self.decision_tree,
            dce=source.dce,
        )
        shown.stage("write", 0.0)
        assessment.manifest["timings_s"] = {"read": read} | assessment.manifest.get("timings_s", {})
        assessment.manifest |= {"command_line": self.command_line, "request": request}
        if folder.is_dir():
            _clear_leftovers(folder)
        write_results(assessment, folder)


def _rows_of(name: str, folder: Path) -> list[Row]:
    """From the files of a result, so that it makes no difference which run wrote them."""
    record, manifest = read_json(folder / ASSESSMENT_FILE), read_json(folder / MANIFEST)
    gland_ml = record["volumes_ml"].get("gland")
    of_all: dict[str, Any] = {
        "id": name,
        "status": "done" if gland_ml else "not assessed",
        "error": "" if gland_ml else NO_PROSTATE,
        "findings": len(record["findings"]),
        "gland_ml": gland_ml,
        "seconds": round(sum(manifest["timings_s"].values()), 1),
        "warnings": len(_warnings_of(record)),
    }
    own = ("zone", "sector", "size_mm", "volume_ml", "likelihood", "t2w_score", "dwi_score", "dwi_inferred", "pirads")
    return [
        Row(**of_all, finding=finding.id, **{column: getattr(finding, column) for column in own})
        for finding in findings_of(record)
    ] or [Row(**of_all)]


def _warnings(folder: Path) -> list[str]:
    return _warnings_of(read_json(folder / ASSESSMENT_FILE))


def _warnings_of(record: Mapping[str, Any]) -> list[str]:
    """In words, each once."""
    return list(dict.fromkeys((*record["study"]["warnings"], *record["warnings"])))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks the folder against another batch; the system takes the lock from a process that is killed."""
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"Expected one batch at a time in {folder}, got a second one; wait for the first, or choose another folder."
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks: as good as can be there
        log.info("no lock in %s", folder, exc_info=True)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps it until it is released, and then as an empty file
            path.unlink()
        lock.release()


def _clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of a run that was killed (see files.py)."""
    for left in folder.glob(".medrationale-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


class Shown:
    """A batch as it is seen: a bar in a terminal, a line per examination elsewhere; only failures where it is quiet."""

    def __init__(self, total: int, bars: Progress | None, quiet: bool) -> None:
        self._total, self._bars, self._quiet = total, bars, quiet
        self._done, self._name = 0, ""
        self._warned: set[str] = set()
        self._task = bars.add_task("", total=total) if bars else None

    def begin(self, name: str) -> None:
        self._name = name

    def stage(self, stage: str, fraction: float) -> None:
        """The Predictor's progress."""
        if self._bars and self._task is not None:
            self._bars.update(self._task, description=f"{self._name}: {STAGES.get(stage, stage)}")

    def end(self, rows: Sequence[Row], warnings: Sequence[str]) -> None:
        """Tell what came out, and of the warnings those that no earlier examination of the batch had."""
        self._done += 1
        self.say(f"[{self._done}/{self._total}] {self._name}: {_in_words(rows)}", failed=rows[0].status == "failed")
        for warning in warnings:
            if warning not in self._warned:
                self.say(f"    Warning: {warning}")
        self._warned |= set(warnings)
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=self._done)

    def say(self, text: str, *, failed: bool = False) -> None:
        if self._bars:
            self._bars.console.print(Text(text, "red" if failed else ""))
        elif failed or not self._quiet:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


@contextmanager
def show_examinations(total: int, quiet: bool) -> Iterator[Shown]:
    """Shows on stderr how a batch of `total` goes."""
    if quiet or not sys.stderr.isatty():
        yield Shown(total, None, quiet)
        return
    # A descriptor of its own, because image_files.quiet_itk silences that of stderr while it reads.
    with os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace") as terminal:
        left = (TextColumn("left"), TimeRemainingColumn())
        columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left)
        # The speed is that of the whole batch: one examination takes longer than rich's usual 30 s of memory.
        with Progress(*columns, console=console_for(terminal), speed_estimate_period=1e6) as bars:
            yield Shown(total, bars, quiet)


def _in_words(rows: Sequence[Row]) -> str:
    first = rows[0]
    if first.error:
        return f"{first.status}: {first.error}"
    if not first.findings:
        return f"no suspicious lesion ({first.seconds:.0f} s)"
    highest = max(row.pirads for row in rows if row.pirads is not None)
    return f"{first.findings} finding{'s' if first.findings > 1 else ''}, PI-RADS {highest} ({first.seconds:.0f} s)"

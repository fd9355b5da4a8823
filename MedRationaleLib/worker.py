"""`python -m MedRationaleLib.worker JOB.json`: one job in a process of its own, told about in JSON lines on stdout.

The Slicer panel runs this in PythonSlicer, so that its window stays alive, a cancelled run can be ended, and a crash of
the model is not a crash of Slicer. Every line is a Message (schema: Resources/Schemas/worker_message.schema.json); what
libraries print goes to `worker.log` in the job's folder. The job ends with one "done" or one "failed".
"""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from MedRationaleLib import __version__
from MedRationaleLib.errors import InputError
from MedRationaleLib.failures import explain

ALIVE_EVERY_S = 2.0
"""A sign of life is sent this often; a process that is silent for much longer hangs."""
LOG_FILE = "worker.log"
STAGES = {
    "read": ("reading the examination", 0.00),
    "import": ("importing torch", 0.08),
    "load": ("loading the model", 0.35),
    "model": ("running the model", 0.45),
    "masks": ("cleaning the masks", 0.75),
    "findings": ("walking the decision tree", 0.80),
    "evidence": ("drawing the evidence", 0.82),
    "write": ("writing the results", 0.88),
}
"""Stage -> what is shown of it, and the part of the whole time that has passed when it begins (prostate on a CPU)."""
Task = Literal["assess", "read"]
Dce = Literal["positive", "negative", "not available"]
SEQUENCES = ("t2w", "adc", "dwi")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One sequence of a job."""

    path: str
    """Image file."""
    name: str
    """What the user knows it as."""
    series_uid: str | None = None
    b_value: float | None = None
    """s/mm² of the DWI where known."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is asked to do; JOB.json holds these fields."""

    task: Task
    """Assess an examination, or find its three sequences in a folder and write them as images."""
    out: str
    """New folder for the results."""
    inputs: Mapping[str, Input] = field(default_factory=dict)
    """"t2w", "adc", "dwi" -> image; to assess."""
    folder: str | None = None
    """DICOM or case folder; to read."""
    patient: Mapping[str, Any] = field(default_factory=dict)
    """What the Assessment says of the patient and the study."""
    model: str = "compact"
    device: str = "auto"
    dce: Dce = "not available"
    psa_ng_ml: float | None = None

    def write(self, path: Path) -> None:
        """As JOB.json."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """From JOB.json."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            job = cls(**(data | {"inputs": {name: Input(**row) for name, row in data["inputs"].items()}}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"Expected a job in {path}, got {type(error).__name__}: {error}; start it again."
            ) from error
        sequences = [("sequence", name, SEQUENCES) for name in job.inputs]
        for what, value, known in (("task", job.task, get_args(Task)), ("dce", job.dce, get_args(Dce)), *sequences):
            if value not in known:
                raise InputError(
                    f"Expected as {what} in {path} one of {', '.join(known)}, got {value!r}; start it again."
                )
        return job


class Messages:
    """Writes Messages, one JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._over = stream, threading.Lock(), False

    def send(self, kind: str, **content: Any) -> None:
        """One line; none after "done" or "failed". A reader that is gone ends the process: nobody waits for it."""
        with self._lock:
            if self._over:
                return
            self._over = kind in ("done", "failed")
            try:
                self._stream.write(json.dumps({"type": kind, **content}) + "\n")
                self._stream.flush()
            except OSError:
                os._exit(1)

    def progress(self, stage: str, fraction: float) -> None:
        """How far the whole job is: the stage's beginning, and its own fraction of the way to the next one's."""
        text, begins = STAGES[stage]
        ends = min((start for _, start in STAGES.values() if start > begins), default=1.0)
        self.send("progress", stage=stage, text=text, fraction=round(begins + min(fraction, 1.0) * (ends - begins), 3))


class _LogLines(logging.Handler):
    def __init__(self, messages: Messages) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning" if record.levelno < logging.ERROR else "error"
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a library's own mistake in a message is not to end the job
            text = str(record.msg)
        self._messages.send("log", level=level, text=text)


def run(job: Job, messages: Messages) -> None:
    """Do the job; "done" is sent when its files are whole. Raises what goes wrong."""
    {"assess": _assess, "read": _read}[job.task](job, messages)


def _assess(job: Job, messages: Messages) -> None:
    from MedRationaleLib.image_files import read_image
    from MedRationaleLib.study import NAMES, SeriesProvenance, Study

    messages.progress("read", 0.0)
    images, provenance = {}, {}
    for name, source in job.inputs.items():
        images[name], sha256 = read_image(source.path, NAMES[name])
        provenance[name] = SeriesProvenance(
            sequence=name,
            path=source.name,
            reason=f"chosen as {NAMES[name]}",
            sha256=sha256,
            series_uid=source.series_uid,
            b_value=source.b_value if name == "dwi" else None,
        )
    if "t2w" not in images:
        raise InputError("T2W: expected an axial T2W, without which nothing can be said, got none; choose one.")
    study = Study.from_images(
        t2w=images["t2w"], adc=images.get("adc"), dwi=images.get("dwi"), provenance=provenance, patient=job.patient
    )
    if job.psa_ng_ml is not None:
        study = study.with_psa(job.psa_ng_ml)
    messages.progress("import", 0.0)
    from MedRationaleLib.inference import Predictor

    import torch  # noqa: F401 - here, so that its time is told apart from the model's  # isort: skip

    messages.progress("load", 0.0)
    predictor = Predictor.load(job.model, device=job.device)
    assessment = predictor.assess(study, progress=messages.progress, dce=job.dce)
    messages.progress("write", 0.0)
    from MedRationaleLib.output import write_results

    write_results(assessment, job.out)
    messages.send("done", folder=job.out, warnings=list(dict.fromkeys((*study.warnings, *assessment.warnings))))


def _read(job: Job, messages: Messages) -> None:
    """The three sequences of a folder as images, on the grids that they were stored on."""
    import SimpleITK as sitk

    from MedRationaleLib.dicom_reading import read_examination
    from MedRationaleLib.files import staged_folder
    from MedRationaleLib.image_files import SUFFIXES, read_image
    from MedRationaleLib.serialization import plain
    from MedRationaleLib.study import NAMES, Study

    messages.progress("read", 0.0)
    if not job.folder or not Path(job.folder).is_dir():
        raise InputError(f"Expected a folder with an examination, got {job.folder}, which is none; choose another.")
    folder = Path(job.folder)
    if any(path.name.lower().endswith(tuple(SUFFIXES)) for path in folder.iterdir() if path.is_file()):
        study = Study.from_case(folder)
        images = {name: read_image(source.path, NAMES[name])[0] for name, source in study.provenance.items()}
        provenance, patient, notes = study.provenance, study.patient, list(study.warnings)
    else:
        examination = read_examination(folder, {})
        images, provenance = examination.images, examination.provenance
        patient, notes = examination.patient, list(examination.warnings)
    sequences: dict[str, Any] = {}
    with staged_folder(job.out) as stage:
        for index, (name, image) in enumerate(images.items()):
            messages.send("progress", stage="read", text=f"writing {NAMES[name]}", fraction=0.5 + index / 6)
            sitk.WriteImage(image, str(stage / f"{name}.nrrd"))
            source = provenance[name]
            sequences[name] = {
                "file": f"{name}.nrrd",
                "name": source.series_description or Path(source.path).name.split(".")[0],
                "reason": source.reason,
                "series_uid": source.series_uid,
                "b_value": source.b_value,
            }
    messages.send("done", folder=job.out, warnings=notes, sequences=sequences, patient=plain(patient))


def main(argv: list[str] | None = None) -> int:
    """Run JOB.json; 0 done, 1 a fault or too little memory, 2 bad input."""
    arguments = sys.argv[1:] if argv is None else argv
    parent = os.getppid()  # before anything is said, upon which it may end
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m MedRationaleLib.worker JOB.json\n")
        return 2
    path = Path(arguments[0])
    if os.name == "posix" and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # a group of its own, so that who started it can end it with all that it starts
    with _own_stdout(path.parent / LOG_FILE) as stream:
        messages = Messages(stream)
        messages.send("started", pid=os.getpid(), version=__version__)
        threading.Thread(target=_keep_alive, args=(messages, parent), daemon=True).start()
        logging.basicConfig(level=logging.INFO, handlers=[_LogLines(messages), logging.StreamHandler()], force=True)
        try:
            run(Job.read(path), messages)
        except InputError as error:
            messages.send("failed", text=" ".join(str(error).split()), code=2)
            return 2
        except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, the user gets one sentence
            traceback.print_exc()
            text, code = explain(error)
            messages.send("failed", text=" ".join(text.split()), code=code)
            return code
    return 0


@contextmanager
def _own_stdout(log: Path) -> Iterator[TextIO]:
    """The real stdout for messages; whatever else is printed, also by native code, goes to the log."""
    sys.stdout.flush()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a library prints must not fail on a system's narrow encoding
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream, _open(log) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file)
        yield stream
        sys.stdout.flush()
        sys.stderr.flush()
        faulthandler.disable()


def _open(log: Path) -> TextIO:
    """The log; where its folder is gone, nothing is kept, so that the failure of the job itself is still told."""
    try:
        return log.open("w", encoding="utf-8")
    except OSError:
        return open(os.devnull, "w", encoding="utf-8")


def _keep_alive(messages: Messages, parent: int) -> None:
    """Signs of life, with the processor time spent, which stands still where all wait.

    Ends the process when that which started it is gone (told by a new parent, not on Windows).
    """
    while True:
        threading.Event().wait(ALIVE_EVERY_S)
        if os.name == "posix" and os.getppid() != parent:
            os._exit(1)
        messages.send("alive", cpu_s=round(time.process_time(), 2))


if __name__ == "__main__":
    sys.exit(main())

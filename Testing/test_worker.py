"""The worker as a real child process: what it says, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import SimpleITK as sitk

from MedRationaleLib import decision_tree, worker
from MedRationaleLib.errors import InputError
from MedRationaleLib.output import ASSESSMENT_FILE, MANIFEST, REPORT_FILE, SEGMENTATION_FILE
from MedRationaleLib.phantom import PhantomPaths, write_phantom
from MedRationaleLib.resources import resource_path
from MedRationaleLib.serialization import load_assessment
from MedRationaleLib.study import NAMES
from MedRationaleLib.worker import ALIVE_EVERY_S, LOG_FILE, STAGES, Input, Job

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, "-m", "MedRationaleLib.worker"]
SENTENCE = re.compile(r"[^\n]{20,600}[.;]?")

PATCHED = """
import logging, os, sys, time, types
from MedRationaleLib import worker
{patch}
sys.exit(worker.main(sys.argv[1:]))
"""
HANGING = """
def hang(job, messages):
    time.sleep(60)
worker._read = hang
"""
NOISY = """
def chatter(job, messages):
    messages.progress("read", 0.0)
    print("printed by Python")
    os.write(1, b"printed by native code\\n")
    sys.stderr.write("an error stream\\n")
    logging.getLogger("library").warning("a %s warning", "formatted")
    logging.getLogger("library").error("%d is no number", "this")
    logging.getLogger("library").info("not for the panel")
    os.system("echo printed by a child")
    time.sleep(2.4 * worker.ALIVE_EVERY_S)
    messages.send("done", folder=job.out, warnings=[])
    logging.getLogger("library").warning("said too late")
    time.sleep(1.2 * worker.ALIVE_EVERY_S)
worker._read = chatter
"""
FAILING_MODEL = """
class Predictor:
    @staticmethod
    def load(*arguments, **options):
        return Predictor()
    def assess(self, *arguments, **options):
        raise {error}
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["MedRationaleLib.inference"] = inference = types.ModuleType("inference")
inference.Predictor = Predictor
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
sys.stdin.read()
"""


@cache
def validator() -> Any:
    import jsonschema

    schema = json.loads(resource_path("Schemas/worker_message.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@dataclass(frozen=True)
class Said:
    """What a worker has said until its end."""

    messages: list[dict[str, Any]]
    code: int
    errors: str = ""

    @property
    def last(self) -> dict[str, Any]:
        return self.messages[-1]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]


def run(job: Path, command: list[str] | None = None) -> Said:
    """Runs a job to its end; every line is a message, the first says who works, the last how it went."""
    child = subprocess.run(
        [*(command or RUN), str(job)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    messages = [json.loads(line) for line in child.stdout.splitlines()]
    for message in messages:
        validator().validate(message)
    said = Said(messages, child.returncode, child.stderr)
    kinds = [message["type"] for message in messages]
    assert kinds[0] == "started" and kinds[-1] in ("done", "failed"), child.stderr
    assert [kinds.count(each) for each in ("started", kinds[-1])] == [1, 1]
    assert said.errors == ""
    return said


def patched(patch: str) -> list[str]:
    return [sys.executable, "-c", PATCHED.format(patch=patch)]


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def failed_in_one_sentence(said: Said, code: int, folder: Path, kept: set[str]) -> str:
    """The sentence; nothing was written beside the log and what was there before."""
    assert said.last["type"] == "failed" and said.last["code"] == said.code == code
    text = str(said.last["text"])
    assert SENTENCE.fullmatch(text) and "Traceback" not in text
    assert set(written(folder)) == kept | {LOG_FILE}
    return text


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> PhantomPaths:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "case")


@pytest.fixture
def job(tmp_path: Path) -> Callable[[Job], Path]:
    """Writes a job into a folder of its own."""

    def write(what: Job) -> Path:
        path = tmp_path / "job" / "job.json"
        path.parent.mkdir(exist_ok=True)
        what.write(path)
        return path

    return write


def read_job(tmp_path: Path, folder: Path | str) -> Job:
    return Job(task="read", out=str(tmp_path / "job" / "images"), folder=str(folder))


def assess_job(tmp_path: Path, phantom: PhantomPaths, **changes: Any) -> Job:
    files = {"t2w": phantom.t2w, "adc": phantom.adc, "dwi": phantom.dwi}
    inputs = {name: Input(path=str(path), name=f"volume {name}") for name, path in files.items()}
    return replace(Job(task="assess", out=str(tmp_path / "job" / "results"), inputs=inputs, device="cpu"), **changes)


# A job that goes well


def test_a_folder_is_read_into_three_images_on_their_own_grids(
    job: Callable[[Job], Path], tmp_path: Path, phantom: PhantomPaths
) -> None:
    said = run(job(read_job(tmp_path, phantom.folder)))
    assert said.code == 0 and said.all("progress")
    out = tmp_path / "job" / "images"
    assert said.last["folder"] == str(out)
    assert written(out) == ["adc.nrrd", "dwi.nrrd", "t2w.nrrd"]
    for name, path in (("t2w", phantom.t2w), ("adc", phantom.adc), ("dwi", phantom.dwi)):
        found = said.last["sequences"][name]
        image, stored = sitk.ReadImage(str(out / found["file"])), sitk.ReadImage(str(path))
        assert image.GetSize() == stored.GetSize()
        assert image.GetOrigin() == pytest.approx(stored.GetOrigin())
        assert image.GetDirection() == pytest.approx(stored.GetDirection())
        assert (sitk.GetArrayViewFromImage(image) == sitk.GetArrayViewFromImage(stored)).all()
        assert found["name"] == path.name.split(".")[0] and found["reason"]
    assert said.last["sequences"]["dwi"]["b_value"] > 0
    assert said.last["patient"]["id"]


@pytest.fixture(scope="module")
def assessed(tmp_path_factory: pytest.TempPathFactory, phantom: PhantomPaths) -> tuple[Said, Path]:
    folder = tmp_path_factory.mktemp("assessed")
    what = assess_job(folder, phantom, patient={"id": "somebody"}, psa_ng_ml=6.0, dce="positive")
    (folder / "job").mkdir()
    what.write(folder / "job" / "job.json")
    return run(folder / "job" / "job.json"), folder / "job" / "results"


def test_an_examination_is_assessed_into_the_files_of_predict(assessed: tuple[Said, Path]) -> None:
    said, out = assessed
    assert said.code == 0 and said.last["folder"] == str(out)
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    assert written(out) == sorted(manifest["files"])
    assert {ASSESSMENT_FILE, MANIFEST, REPORT_FILE, SEGMENTATION_FILE} < set(manifest["files"])
    assessment = load_assessment(out)
    assert assessment.findings and assessment.evidence
    assert list(dict.fromkeys((*assessment.study.warnings, *assessment.warnings))) == said.last["warnings"]


def test_what_the_job_tells_is_in_the_assessment(assessed: tuple[Said, Path]) -> None:
    data = json.loads((assessed[1] / ASSESSMENT_FILE).read_text(encoding="utf-8"))
    patient = data["study"]["patient"]
    assert patient["id"] == "somebody" and patient["psa_ng_ml"] == 6.0
    assert patient["psa_density_ng_ml2"] == pytest.approx(6.0 / data["volumes_ml"]["ellipsoid"], abs=1e-3)
    assert data["study"]["sequences"]["t2w"]["path"] == "volume t2w"


def test_progress_goes_through_all_stages_and_never_back(assessed: tuple[Said, Path]) -> None:
    steps = assessed[0].all("progress")
    assert list(dict.fromkeys(step["stage"] for step in steps)) == list(STAGES)
    fractions = [step["fraction"] for step in steps]
    assert fractions == sorted(fractions) and fractions[0] == 0


def test_a_job_is_read_back_as_it_was_written(tmp_path: Path, phantom: PhantomPaths) -> None:
    what = assess_job(tmp_path, phantom, patient={"id": "1"}, psa_ng_ml=4.5, dce="negative")
    what.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == what


# What is said meanwhile


def test_what_libraries_print_goes_to_the_log_and_signs_of_life_come_every_two_seconds(
    job: Callable[[Job], Path], tmp_path: Path
) -> None:
    path = job(read_job(tmp_path, tmp_path))
    child = subprocess.Popen(
        [*patched(NOISY), str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert child.stdout is not None and child.stderr is not None
    heard = [(time.monotonic(), json.loads(line)) for line in child.stdout]
    assert child.wait() == 0 and child.stderr.read() == ""
    for _, message in heard:
        validator().validate(message)
    kinds = [message["type"] for _, message in heard]
    assert kinds == ["started", "progress", "log", "log", "alive", "alive", "done"]
    assert [message["text"] for _, message in heard[2:4]] == ["a formatted warning", "%d is no number"]
    assert [message["level"] for _, message in heard[2:4]] == ["warning", "error"]
    alive = [when for when, message in heard if message["type"] == "alive"]
    begin = heard[0][0]
    gaps = [later - earlier for earlier, later in zip([begin, *alive], alive, strict=False)]
    assert all(0.5 * ALIVE_EVERY_S < gap < 2 * ALIVE_EVERY_S for gap in gaps), gaps
    log = (path.parent / LOG_FILE).read_text(encoding="utf-8")
    for printed in ("Python", "native code", "a child"):
        assert f"printed by {printed}" in log
    assert "an error stream" in log and "a formatted warning" in log and "said too late" in log


# A job that fails


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Expected a job"),
        (b"\xff\xfe{", "Expected a job"),
        (b'{"task": "read"', "Expected a job"),
        (b"[1, 2]", "Expected a job"),
        (b'{"task": "read", "out": "x", "inputs": {}, "colour": "red"}', "colour"),
        (b'{"task": "dance", "out": "x", "inputs": {}}', "'dance'"),
        (b'{"task": "assess", "out": "x", "inputs": {}, "dce": "maybe"}', "'maybe'"),
        (b'{"task": "assess", "out": "x", "inputs": {"cbv": {"path": "x", "name": "x"}}}', "'cbv'"),
        (b'{"task": "assess", "out": "x", "inputs": {"t2w": {"file": "x"}}}', "file"),
        (b'{"task": "assess", "out": "x", "inputs": {}}', "T2W: expected"),
        (b'{"task": "read", "out": "x", "inputs": {}}', "Expected a folder"),
    ],
    ids=[
        "missing",
        "no text",
        "cut off",
        "a list",
        "unknown field",
        "task",
        "dce",
        "sequence",
        "input",
        "t2w",
        "folder",
    ],
)
def test_a_job_that_is_none_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "job.json"
    if content is not None:
        path.write_bytes(content)
    said = run(path)
    text = failed_in_one_sentence(said, 2, tmp_path, {"job.json"} if content is not None else set())
    assert words in text


def test_a_job_in_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    said = run(tmp_path / "nowhere" / "job.json")
    assert said.last["type"] == "failed" and said.code == 2 and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_one_sentence(job: Callable[[Job], Path], tmp_path: Path) -> None:
    path = job(read_job(tmp_path, tmp_path / "nowhere"))
    assert "nowhere" in failed_in_one_sentence(run(path), 2, path.parent, {"job.json"})


@pytest.mark.parametrize("content", ["empty", "text", "one series of something else"])
def test_a_folder_without_an_examination_is_one_sentence(
    job: Callable[[Job], Path], tmp_path: Path, content: str, phantom: PhantomPaths
) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    if content == "text":
        (folder / "notes.txt").write_text("no image")
    elif content != "empty":
        (folder / "x_localizer.mha").write_bytes(phantom.adc.read_bytes())
    path = job(read_job(tmp_path, folder))
    failed_in_one_sentence(run(path), 2, path.parent, {"job.json"})


@pytest.mark.parametrize("task", ["read", "assess"])
def test_a_truncated_image_is_one_sentence_and_leaves_nothing_half_written(
    job: Callable[[Job], Path], tmp_path: Path, phantom: PhantomPaths, task: str
) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    for image in (phantom.t2w, phantom.adc, phantom.dwi):
        content = image.read_bytes()
        (folder / image.name).write_bytes(content if image != phantom.adc else content[: len(content) // 2])
    if task == "read":
        path = job(read_job(tmp_path, folder))
    else:
        moved = {name: folder / getattr(phantom, name).name for name in ("t2w", "adc", "dwi")}
        inputs = {name: Input(path=str(image), name=name) for name, image in moved.items()}
        path = job(assess_job(tmp_path, phantom, inputs=inputs))
    text = failed_in_one_sentence(run(path), 2, path.parent, {"job.json"})
    assert text.startswith("ADC") and "truncated" in text


@pytest.mark.parametrize(
    "error", ["MemoryError()", 'RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")'], ids=["host", "gpu"]
)
def test_too_little_memory_is_one_sentence_that_says_so(
    job: Callable[[Job], Path], tmp_path: Path, phantom: PhantomPaths, error: str
) -> None:
    path = job(assess_job(tmp_path, phantom))
    said = run(path, patched(FAILING_MODEL.format(error=error)))
    assert "out of memory" in failed_in_one_sentence(said, 1, path.parent, {"job.json"})


def test_a_fault_of_the_programme_is_one_sentence_and_its_traceback_is_in_the_log(
    job: Callable[[Job], Path], tmp_path: Path, phantom: PhantomPaths
) -> None:
    path = job(assess_job(tmp_path, phantom))
    said = run(path, patched(FAILING_MODEL.format(error='ZeroDivisionError("first\\nsecond")')))
    assert "ZeroDivisionError: first second" in failed_in_one_sentence(said, 1, path.parent, {"job.json"})
    log = (path.parent / LOG_FILE).read_text(encoding="utf-8")
    assert "Traceback" in log and "ZeroDivisionError" in log


def test_a_job_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asdict(Job(task="read", out="x"))).replace("read", "write"), encoding="utf-8")
    with pytest.raises(InputError, match="one of assess, read, got 'write'"):
        Job.read(path)


def test_the_job_knows_the_words_of_the_engine() -> None:
    assert get_args(worker.Dce) == get_args(decision_tree.Dce)
    assert tuple(NAMES) == worker.SEQUENCES


def test_without_a_job_it_says_how_it_is_started() -> None:
    child = subprocess.run(RUN, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert child.returncode == 2 and child.stdout == "" and child.stderr.startswith("usage: ")


# How it ends before its time

posix = pytest.mark.skipif(os.name != "posix", reason="processes have parents and groups on POSIX only")


@posix
def test_it_is_in_a_process_group_of_its_own_which_can_be_ended(job: Callable[[Job], Path], tmp_path: Path) -> None:
    child = subprocess.Popen(
        [*patched(HANGING), str(job(read_job(tmp_path, tmp_path)))], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    started = json.loads(child.stdout.readline())
    assert started["pid"] == child.pid == os.getpgid(child.pid) != os.getpgid(0)
    os.killpg(started["pid"], signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL
    child.stdout.close()


@posix
def test_it_ends_when_who_started_it_is_killed(job: Callable[[Job], Path], tmp_path: Path) -> None:
    """Its output is a pipe that it alone holds in the end: the pipe closes when it ends."""
    path = job(read_job(tmp_path, tmp_path))
    ours, its = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, PATCHED.format(patch=HANGING), str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=its,
    )
    os.close(its)
    with os.fdopen(ours, "rb", buffering=0) as output:
        assert b"started" in output.read(1000)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 6 * ALIVE_EVERY_S
        rest = b"more"
        while rest and time.monotonic() < end:
            ready, _, _ = select.select([output], [], [], 0.5)
            rest = output.read(1000) if ready else b"more"
        assert rest == b"", "it goes on without its parent"
    assert parent.stdin is not None
    parent.stdin.close()


def test_it_ends_when_nobody_listens_any_more(job: Callable[[Job], Path], tmp_path: Path) -> None:
    child = subprocess.Popen(
        [*patched(HANGING), str(job(read_job(tmp_path, tmp_path)))], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert json.loads(child.stdout.readline())["type"] == "started"
    child.stdout.close()
    assert child.wait(timeout=6 * ALIVE_EVERY_S) == 1

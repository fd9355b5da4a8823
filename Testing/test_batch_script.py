"""The script that Slicer runs without a window: whatever happens, Slicer is told to end, with the right code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "MedRationale" / "Scripts" / "batch.py"
STAND_IN = """
import importlib.metadata, json, os, pathlib, subprocess, sys, types

told = pathlib.Path(os.environ["TOLD"])


def exit(code):
    (told / "exit").write_text(str(code))


def launchConsoleProcess(args, cwd=None, blocking=True):
    (told / "command").write_text(json.dumps({"args": args, "cwd": cwd, "blocking": blocking}))
    command = [sys.executable, "-c", os.environ["CHILD"]]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    process = subprocess.Popen(command, cwd=cwd, **pipe)
    (told / "pid").write_text(str(process.pid))
    if os.environ.get("FAULT"):
        process.stdout = types.SimpleNamespace(reconfigure=lambda errors: 1 / 0, close=process.stdout.close)
    return process


util = types.SimpleNamespace(exit=exit, launchConsoleProcess=launchConsoleProcess)
i18n = types.ModuleType("slicer.i18n")
i18n.tr = lambda text: text
sys.modules["slicer.i18n"] = i18n

known = importlib.metadata.version


def version(name):
    if name in os.environ.get("LACKS", "").split():
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)


importlib.metadata.version = version
"""
"""The part of the module `slicer` that the script needs; TOLD is a folder for what was asked of it."""
DONE = "import sys; sys.stderr.write('[1/1] one: 1 finding\\n'); print('1 of 1 examinations done'); sys.exit({code})"
WAITS = "import subprocess, sys, time; print('ready', flush=True); time.sleep(60)"
LAUNCHES = (
    "import pathlib, os, subprocess, sys; "
    f"python = subprocess.Popen([sys.executable, '-c', {WAITS!r}]); "
    "pathlib.Path(os.environ['TOLD'], 'python').write_text(str(python.pid)); python.wait()"
)
"""As PythonSlicer does: a launcher that starts Python as its own child."""


class Slicer:
    """The script in a process with the stand-in, and what it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "modules" / "slicer").mkdir(parents=True)
        (folder / "modules" / "slicer" / "__init__.py").write_text(STAND_IN)

    def start(self, *argv: str, child: str = DONE.format(code=0), **environment: str) -> subprocess.Popen[str]:
        variables = {"TOLD": str(self.folder), "PYTHONPATH": str(self.folder / "modules"), "CHILD": child}
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv], env={**os.environ, **variables, **environment}, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def run(self, *argv: str, **options: str) -> tuple[int, str, str]:
        """(code that Slicer was told to end with, stdout, stderr)"""
        process = self.start(*argv, **options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err  # nothing was raised: that would leave Slicer running
        return self.exit_code, out, err

    @property
    def exit_code(self) -> int:
        return int((self.folder / "exit").read_text())

    @property
    def command(self) -> dict[str, object]:
        return json.loads((self.folder / "command").read_text())


@pytest.fixture
def slicer(tmp_path: Path) -> Slicer:
    return Slicer(tmp_path)


BOTH = ("--input", "in", "--output", "out")


def test_the_batch_runs_in_pythonslicer_and_its_lines_and_its_code_are_passed_on(slicer):
    options = ("--resume", "--model", "other", "--device", "cpu")
    assert slicer.run("--", *BOTH, *options)[:2] == (0, "[1/1] one: 1 finding\n1 of 1 examinations done\n")
    given = ["--input", str(slicer.folder / "in"), "--output", str(slicer.folder / "out")]
    expected = ["-m", "MedRationaleLib.cli", "batch", *given, "--model", "other", "--device", "cpu", "--resume"]
    assert slicer.command["args"][0].endswith("PythonSlicer") and slicer.command["args"][1:] == expected
    assert (Path(slicer.command["cwd"]) / "MedRationaleLib").is_dir() and slicer.command["blocking"]


def test_the_options_are_those_that_the_batch_takes(slicer):
    from MedRationaleLib.arguments import parse

    slicer.run(*BOTH)
    args = parse(slicer.command["args"][3:])
    assert (args.command, args.output, args.resume) == ("batch", slicer.folder / "out", False)


@pytest.mark.parametrize("code", [1, 2, 130])
def test_slicer_ends_with_the_code_of_the_batch(slicer, code):
    assert slicer.run(*BOTH, child=DONE.format(code=code))[0] == code


def test_wrong_arguments_start_nothing_and_end_slicer_with_2(slicer):
    for argv in (("--input", "in"), (*BOTH, "--device", "tpu"), (*BOTH, "--colour")):
        code, _, err = slicer.run(*argv)
        assert code == 2 and "error: " in err
    assert slicer.run("--", "--help")[0] == 0
    assert not (slicer.folder / "command").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that kill")
def test_a_child_that_is_killed_is_one_sentence_and_code_1(slicer):
    code, out, err = slicer.run(*BOTH, child="import os; print('x', flush=True); os.kill(os.getpid(), 9)")
    assert code == 1 and out == "x\n"
    assert err == (
        "medrationale: the process that assesses was ended by SIGKILL; what is done is kept, --resume goes on.\n"
    )


def test_a_fault_of_the_script_ends_slicer_and_the_child_too(slicer):
    code, _, err = slicer.run(*BOTH, child=WAITS, FAULT="yes")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("medrationale: this is a fault of")
    assert ended(slicer.folder / "pid")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that can be met")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_slicer_that_is_told_to_end_takes_the_launcher_and_its_python_along(slicer, number):
    process = slicer.start(*BOTH, child=LAUNCHES)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert slicer.exit_code == 130 and err.startswith("medrationale: interrupted; what is done is kept")
    assert ended(slicer.folder / "pid") and ended(slicer.folder / "python")


def test_missing_packages_are_named_with_the_remedy_and_start_nothing(slicer):
    code, _, err = slicer.run(*BOTH, LACKS="rich safetensors")
    assert code == 1 and err.startswith("medrationale: Expected the Python packages rich")
    assert "safetensors" in err and err.endswith("run the command again with --install.\n")
    assert not (slicer.folder / "command").exists()


def test_packages_that_cannot_be_installed_are_one_sentence(slicer):
    code, _, err = slicer.run(*BOTH, "--install", LACKS="rich")  # the stand-in has no slicer.packaging
    assert code == 1 and len(err.splitlines()) == 1 and err.startswith("medrationale: Expected Slicer 5.12 or newer")
    assert not (slicer.folder / "command").exists()


def test_install_goes_on_with_the_batch_where_nothing_is_missing(slicer):
    assert slicer.run(*BOTH, "--install")[0] == 0
    assert "--install" not in slicer.command["args"]


def ended(file: Path) -> bool:
    """Whether the process whose id is in the file ends soon; what nobody waits for stays as a zombie."""
    pid = int(file.read_text())
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False

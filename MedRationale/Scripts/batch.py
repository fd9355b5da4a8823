"""Many examinations, assessed by Slicer without a window; `-- --help` at the end of this command lists the options:

  Slicer --no-splash --no-main-window --python-script MedRationale/Scripts/batch.py -- --input DIR --output DIR

The work is done by `medrationale batch` in a PythonSlicer of its own. Slicer ends with its exit code, whatever happens:
a script that raises would leave Slicer running.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the batch and end Slicer."""
    import slicer

    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)  # so that Slicer, when it is told to end, ends its child
        code = run(sys.argv[1:], slicer)
    except KeyboardInterrupt:
        say("interrupted; what is done is kept, and --resume goes on from there.")
        code = 130
    except SystemExit as end:  # of argparse, after --help or wrong arguments
        code = end.code if isinstance(end.code, int) else 1
    except RuntimeError as error:
        say(str(error))
    except Exception as error:  # noqa: BLE001 - the last resort: Slicer has to end
        traceback.print_exc()
        say(f"this is a fault of the script ({type(error).__name__}: {error}); please report the lines above.")
    finally:
        slicer.util.exit(code)


def run(argv: Sequence[str], slicer: Any) -> int:
    """The exit code of `medrationale batch`. Raises RuntimeError with one sentence where that could not run."""
    args = parse(argv)
    module = Path(__file__).resolve().parents[1]
    root = next(folder for folder in (module, *module.parents) if (folder / "MedRationaleLib").is_dir())
    for folder in (str(module), str(root)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    from MedRationaleSlicer import installation

    if args.install:
        installation.ensure_installed(ask=False)
    elif missing := installation.missing():
        raise RuntimeError(
            f"Expected the Python packages {', '.join(missing)} in this Slicer, which lacks them; run the command "
            "again with --install."
        )
    command = [shutil.which("PythonSlicer") or "PythonSlicer", "-m", "MedRationaleLib.cli", "batch"]
    command += ["--input", os.path.abspath(args.input), "--output", os.path.abspath(args.output)]
    command += ["--model", os.path.abspath(args.model) if os.path.isdir(args.model) else args.model]
    command += ["--device", args.device, *(["--resume"] if args.resume else [])]
    with child(slicer, command, root) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
        code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        raise RuntimeError(f"the process that assesses was ended by {name}; what is done is kept, --resume goes on.")
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="batch.py", description="Assess many examinations without a window.")
    parser.add_argument("--input", required=True, metavar="PATH", help="folder of examinations, or a manifest.csv")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="leave out what an earlier run has finished")
    parser.add_argument("--model", default="compact", metavar="NAME", help="shipped model or model folder (compact)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(auto)")
    parser.add_argument("--install", action="store_true", help="install missing Python packages first")
    return parser.parse_args(argv[1:] if argv[:1] == ["--"] else argv)


@contextmanager
def child(slicer: Any, command: list[str], folder: Path) -> Iterator[Any]:
    """The process of `command` in `folder`, its two outputs in one; it does not outlive the block."""
    process = slicer.util.launchConsoleProcess(command, cwd=str(folder), blocking=True)
    try:
        process.stdout.reconfigure(errors="replace")  # it is decoded as the system's locale has it
        yield process
    finally:
        if process.poll() is None:
            end(process)
        process.stdout.close()


def end(process: Any) -> None:
    """End a process with its descendants: PythonSlicer is a launcher, and its Python would go on without it."""
    family = [process.pid]
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        if ps := shutil.which("ps"):
            table = subprocess.run([ps, "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
            pairs = [[int(number) for number in line.split()] for line in table.splitlines()]
            for parent in family:  # which grows meanwhile
                family += [pid for pid, its_parent in pairs if its_parent == parent]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def say(sentence: str) -> None:
    sys.stderr.write(f"medrationale: {' '.join(sentence.split())}\n")


if __name__ == "__main__":
    main()

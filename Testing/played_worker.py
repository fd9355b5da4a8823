"""Plays MedRationaleLib.worker for the panel's tests: played_worker.py HOW RESULTS -m MedRationaleLib.worker JOB.

It speaks the worker's messages and delivers prepared results, or misbehaves in the way that HOW names.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def send(kind: str, **content: object) -> None:
    sys.stdout.write(json.dumps({"type": kind, **content}) + "\n")
    sys.stdout.flush()


def main() -> int:
    how, results, *_, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if how == "dies at once":
        sys.stderr.write("ImportError: no module named torch\n")
        return 1
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    send("started", pid=os.getpid(), version="played")
    send("progress", stage="model", text="running the model", fraction=0.5)
    if how == "slow":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(results, "pids").write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
        time.sleep(600)
    elif how == "crashes":
        Path(path).with_name("worker.log").write_text("Fatal Python error: Segmentation fault\n", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "prints garbage":
        sys.stdout.write("{not json\n[1, 2]\n" + json.dumps({"type": "done"}) + "\nsome words\n")
        return 0
    elif how == "is silent":
        time.sleep(600)
    elif how == "waits for nothing":
        while True:
            send("alive", cpu_s=1.0)
            time.sleep(0.2)
    elif how == "computes":
        for tenth in range(40):
            send("alive", cpu_s=1.0 + tenth / 10)
            time.sleep(0.1)
    elif how == "fails":
        send("failed", text="T2W: expected an axial series, got a sagittal one; give the axial T2W.", code=2)
        return 2
    elif how == "says done without results":
        send("done", folder=job["out"], warnings=[])
        return 0
    send("log", level="warning", text="the memory of cuda does not suffice for 2 stack(s) at once")
    shutil.copytree(Path(results) / "results", job["out"])
    send("done", folder=job["out"], warnings=[])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which state of the project made a file of figures."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Of the working copy that this runs from, "+" where it has changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

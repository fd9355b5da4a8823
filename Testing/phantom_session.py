"""The panel in the stand-in application with the phantom in it: what the screenshots and the bench share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "MedRationale" / "MedRationale.py"
SECONDS = 300.0
"""Longest wait for the model; it takes some ten seconds on two idle cores."""


@dataclass
class Session:
    """The panel, the views, and how to wait."""

    panel: Any
    views: Any
    folder: Path

    def wait(self) -> None:
        """Until the panel is idle; RuntimeError with what it says where that was no success."""
        from slicer_harness.application import wait_until

        wait_until(lambda: self.panel.ui.applyButton.text == "Apply", seconds=SECONDS)

    def select(self, finding: int, node: str) -> None:
        """Click a finding, then a step of its rationale."""
        self.panel.ui.findingsTable.selectRow(finding)
        model = self.panel.ui.rationaleTree.model()
        row = next(r for r in range(model.rowCount()) if model.index(r, 0).data(0x0100) == node)
        self.panel.ui.rationaleTree.setCurrentIndex(model.index(row, 0))


@contextmanager
def phantom_session(size: tuple[int, int] = (512, 512)) -> Iterator[Session]:
    """The phantom loaded from its folder by the panel; nothing has run yet."""
    for folder in (ROOT, ROOT / "Testing"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from slicer_harness import probes

    missing = probes.missing_for_slicer()
    if missing:
        raise SystemExit(missing)
    from slicer_harness import application

    app = application.bootstrap()
    from slicer_harness import module_loader
    from slicer_harness.offscreen_views import OffscreenLayoutManager

    app.layout_manager = OffscreenLayoutManager(size)
    module_loader.load(MODULE)
    with tempfile.TemporaryDirectory() as folder:
        write = [
            sys.executable,
            "-m",
            "MedRationaleLib.cli",
            "phantom",
            "--quiet",
            "--out",
            str(Path(folder) / "phantom"),
        ]
        subprocess.run(write, cwd=ROOT, check=True)  # the panel starts without the engine
        session = Session(module_loader.show("MedRationale"), app.layout_manager, Path(folder))
        session.panel.loadFolder(str(Path(folder) / "phantom"))
        session.wait()
        yield session
    module_loader.close("MedRationale")
    app.layout_manager.close()

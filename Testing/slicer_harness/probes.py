"""What this machine can do, asked in child processes: without their libraries Qt aborts and VTK segfaults."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

SECONDS = 60
SYSTEM_LIBRARIES = (
    "apt-get install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri libxkbcommon0 libdbus-1-3 libfontconfig1"
)

_QT = """
import sys
from PySide6 import QtUiTools, QtWidgets
sys.exit(0 if QtWidgets.QApplication(["probe"]).platformName() == "offscreen" else 1)
"""
_GL = """
import vtk
window = vtk.vtkRenderWindow()
window.SetOffScreenRendering(1)
window.AddRenderer(vtk.vtkRenderer())
window.Render()
"""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process."""
    return {**os.environ, **extra}


def run(code: str, **extra: str) -> str | None:
    """None when a child process runs the code to its end, else the last line that it said, or how it ended."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(**extra),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"ended by signal {-child.returncode}"
    said = child.stderr.strip().splitlines()
    return said[-1] if said else f"ended with code {child.returncode}"


@functools.cache
def missing_for_slicer() -> str | None:
    """Why the stand-in cannot start here, in one sentence; None when it can."""
    for module, package in (("slicer", "slicer-core"), ("PySide6", "PySide6_Essentials")):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{package} is not installed (pip install -e '.[dev]'; it has no wheels for some platforms)"
    problem = run("import slicer, vtk")
    if problem:
        return f"slicer-core cannot be imported: {problem} ({SYSTEM_LIBRARIES})"
    problem = run(_QT, QT_QPA_PLATFORM="offscreen")
    return f"Qt cannot start off-screen: {problem} ({SYSTEM_LIBRARIES})" if problem else None


@functools.cache
def gl_window() -> str | None:
    """The class of render window that can draw without a display, for VTK_DEFAULT_OPENGL_WINDOW; None without GL."""
    for name in ("vtkEGLRenderWindow", "vtkOSOpenGLRenderWindow"):
        if run(_GL, VTK_DEFAULT_OPENGL_WINDOW=name) is None:
            return name
    return None


def has_gl() -> bool:
    """Whether VTK can draw here."""
    return gl_window() is not None

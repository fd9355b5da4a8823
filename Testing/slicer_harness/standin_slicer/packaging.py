"""Stands for slicer.packaging of Slicer 5.12 and later: it checks what is installed, and never installs.

What a module asked for is in INSTALLER.calls. The signatures and the order of the steps (check, ask, install, offer a
restart) were read in Slicer's source of summer 2026. Left out: progress windows, PythonSlicer's own branch, and
pip_check's recursion into extras, of which the named package alone is checked here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
from packaging.requirements import InvalidRequirement, Requirement

Requirements = str | Requirement | list[str | Requirement]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of pip_ensure, pip_install or pip_uninstall."""

    function: str
    requirements: tuple[str, ...]
    requester: str | None = None
    constraints: str | None = None


@dataclasses.dataclass
class Installer:
    """What tests read, and how they make the installation fail."""

    calls: list[Call] = dataclasses.field(default_factory=list)
    missing: set[str] = dataclasses.field(default_factory=set)
    """Names that count as not installed until they are installed here."""
    provided: set[str] = dataclasses.field(default_factory=set)
    """Names that count as installed, in whatever version."""
    fails: bool = False
    """pip ends with code 1."""

    def reset(self) -> None:
        """As at the start: between tests."""
        self.__init__()

    def install(self, call: Call) -> int:
        """Records the call, and returns what pip would end with."""
        self.calls.append(call)
        if self.fails:
            return 1
        names = {Requirement(each).name.lower() for each in call.requirements}
        self.missing -= names
        self.provided |= names
        return 0


INSTALLER = Installer()


def load_requirements(path: str | Path) -> list[Requirement]:
    """The requirements of a file; comments, empty lines and pip's options are passed over."""
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def load_pyproject_dependencies(path: str | Path) -> list[Requirement]:
    """[project.dependencies] of a pyproject.toml; KeyError without a [project] table."""
    import tomllib  # Python 3.11; Slicer's is newer

    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"]
    return [Requirement(each) for each in project.get("dependencies", [])]


def _as_requirements(requirements: Requirements) -> list[Requirement]:
    if isinstance(requirements, Requirement):
        return [requirements]
    if isinstance(requirements, list):
        return [Requirement(each) if isinstance(each, str) else each for each in requirements]
    if not isinstance(requirements, str):
        raise TypeError(f"expected str, Requirement or list, not {type(requirements).__name__}")
    try:
        return [Requirement(requirements)]
    except InvalidRequirement:
        return [Requirement(each) for each in requirements.split()]


def pip_check(req: Requirements) -> bool:
    """Whether all of them are installed in a version that fits; a marker for another platform counts as fitting."""
    return all(map(_is_satisfied, _as_requirements(req)))


def _is_satisfied(requirement: Requirement) -> bool:
    name = requirement.name.lower()
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    if name in INSTALLER.missing:
        return False
    if name in INSTALLER.provided:
        return True
    try:
        return importlib.metadata.version(requirement.name) in requirement.specifier
    except importlib.metadata.PackageNotFoundError:
        return False


def pip_ensure(
    requirements: Requirements,
    constraints: str | Path | None = None,
    skip_packages: list[str] | None = None,
    prompt_install: bool = True,
    prompt_restart: bool = True,
    requester: str | None = None,
    skip_in_testing: bool = True,
    show_progress: bool = True,
) -> list[str] | None:
    """Checks, asks, and calls pip_install for what is missing.

    RuntimeError when the user declines, CalledProcessError when pip fails. Nothing happens in testing mode unless
    skip_in_testing is False. A restart is never offered: nothing was really replaced.
    """
    needed = _as_requirements(requirements)
    INSTALLER.calls.append(Call("pip_ensure", tuple(map(str, needed)), requester, _as_text(constraints)))
    missing = [str(each) for each in needed if not pip_check(each)]
    if not missing:
        return None
    if skip_in_testing and slicer.app.testingEnabled():
        logging.info("Testing mode is enabled: pip_ensure skips %s", ", ".join(missing))
        return None
    if prompt_install:
        title = f"{requester} - Install Python Packages" if requester else "Install Python Packages"
        text = f"{len(missing)} Python package(s) need to be installed. Continue?"
        if not slicer.util.confirmOkCancelDisplay(text, title, detailedText="\n".join(missing)):
            raise RuntimeError("User declined package installation")
    return pip_install(missing, constraints, skip_packages=skip_packages, requester=requester)


def pip_install(
    requirements: str | list[str],
    constraints: str | Path | None = None,
    no_deps_requirements: str | list[str] | None = None,
    skip_packages: list[str] | None = None,
    blocking: bool = True,
    show_progress: bool = True,
    requester: str | None = None,
    parent: Any = None,
    logCallback: Callable[[str], None] | None = None,
    completedCallback: Callable[[int], None] | None = None,
) -> list[str] | None:
    """Records the call; CalledProcessError when the test wants pip to fail. Not blocking, it still ends at once."""
    if skip_packages is not None and (no_deps_requirements is not None or not blocking):
        raise ValueError("skip_packages needs blocking=True, and does not go with no_deps_requirements")
    names = requirements.split() if isinstance(requirements, str) else [str(each) for each in requirements]
    code = INSTALLER.install(Call("pip_install", tuple(names), requester, _as_text(constraints)))
    if blocking and code:
        raise subprocess.CalledProcessError(code, ["PythonSlicer", "-m", "pip", "install", *names])
    if not blocking and completedCallback is not None:
        completedCallback(code)
    return [] if skip_packages is not None else None


def pip_uninstall(requirements: str | list[str], **_options: Any) -> None:
    """Records the call."""
    names = requirements.split() if isinstance(requirements, str) else [str(each) for each in requirements]
    INSTALLER.calls.append(Call("pip_uninstall", tuple(names)))


def isPipInstallInProgress() -> bool:
    """Never: installing takes no time here."""
    return False


def _as_text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)

"""The Python packages that a first run needs: what is missing, how large it is, and their installation with consent."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

REQUIREMENTS = Path(__file__).resolve().parents[1] / "Resources" / "requirements.txt"
TORCH = ">=2.5"
TORCH_GB, OTHERS_GB = "0.2 GB for the CPU, 2 to 3 GB for an NVIDIA GPU", "0.1 GB"
"""Downloads, as PyPI and PyTorch's index had them in 2026."""


def missing(torch: bool = True) -> list[str]:
    """Requirements that are not installed, or too old: those of the file, and torch unless it is not needed."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    wanted = [f"torch{TORCH}", *wanted] if torch else wanted
    return [requirement for requirement in wanted if not _installed(requirement)]


def ensure_installed(ask: bool = True, *, install: bool = True, torch: bool = True) -> None:
    """Install what is missing, after asking. Raises RuntimeError with one sentence where that is not to be.

    Args:
        ask: before installing; a script says `install` instead.
        install: False only checks.
        torch: whether it is needed, too: reading a folder does without.
    """
    wanted = missing(torch)
    if not wanted:
        return
    if not install:
        raise RuntimeError(
            _("Expected the Python packages {packages}, which are not installed; press Apply in the panel once, or "
              "call with install=True.").format(packages=", ".join(wanted))
        )  # fmt: skip
    rest = [requirement for requirement in wanted if not requirement.startswith("torch")]
    # Before anything is asked and gigabytes are downloaded.
    pytorch = _pytorch_extension() if len(rest) < len(wanted) else None
    pip_ensure = _pip_ensure() if rest else None
    sizes = [_("torch {size}").format(size=TORCH_GB)] if pytorch is not None else []
    sizes += [_("the others {size}").format(size=OTHERS_GB)] if rest and sizes else [OTHERS_GB] if rest else []
    text = _(
        "MedRationale runs its model with Python packages that are not installed yet: {packages}.\n\n"
        "Download: {sizes}. This needs the network once; images are never sent anywhere. Install them now?"
    ).format(packages=", ".join(wanted), sizes="; ".join(sizes))
    if ask and not slicer.util.confirmOkCancelDisplay(text, _("Install Python packages")):
        raise RuntimeError(
            _("The Python packages were not installed, so nothing was run; press Apply to be asked again.")
        )
    logging.info("MedRationale installs %s", ", ".join(wanted))
    if pytorch is not None:
        _install_torch(pytorch)
    if pip_ensure is not None:
        _install(pip_ensure, rest)
    still = missing(torch)
    if still:
        raise RuntimeError(
            _(
                "Expected {packages} after the installation, but they are not there; restart Slicer and try again."
            ).format(packages=", ".join(still))
        )


def _pytorch_extension() -> Any:
    try:
        import PyTorchUtils
    except ImportError as error:
        raise RuntimeError(
            _("Expected Slicer's PyTorch extension, which installs torch; get it in the Extensions Manager.")
        ) from error
    return PyTorchUtils.PyTorchUtilsLogic()


def _pip_ensure() -> Callable[..., Any]:
    try:
        from slicer.packaging import pip_ensure
    except ImportError as error:
        raise RuntimeError(
            _("Expected Slicer 5.12 or newer, which installs Python packages safely; please update Slicer.")
        ) from error
    return pip_ensure


def _install_torch(pytorch: Any) -> None:
    try:
        torch = pytorch.installTorch(askConfirmation=False, torchVersionRequirement=TORCH)
    except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(_failed("torch", error)) from error
    if torch is None:
        raise RuntimeError(_failed("torch", "PyTorch extension"))


def _install(pip_ensure: Callable[..., Any], requirements: list[str]) -> None:
    try:
        pip_ensure(requirements, prompt_install=False, requester="MedRationale")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(_failed(", ".join(requirements), error)) from error


def _failed(what: str, error: object) -> str:
    return _(
        "{what} could not be installed ({error}); check the network, or install them without it as the README says."
    ).format(what=what, error=str(error).splitlines()[0][:200] if str(error) else type(error).__name__)


def _installed(requirement: str) -> bool:
    """By name and least version, without the package `packaging`, which may be missing itself."""
    name, least = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return _numbers(version) >= _numbers(least)


def _numbers(version: str) -> list[int]:
    numbers = [int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split(".")]
    while numbers[-1:] == [0]:  # 1 is not older than 1.0
        numbers.pop()
    return numbers

"""Stands for the PyTorch extension's module PyTorchUtils: says that torch is there or not, and records what is asked.

Names, arguments and the order of the steps were read in the extension's source of 2024 and later; it installs torch and
torchvision through light-the-torch, which is left out.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from typing import Any

import slicer

from .application import Module

MODULE = "PyTorchUtils"


@dataclasses.dataclass
class TorchState:
    """What the test says about torch, and what the panel did with it."""

    installed: bool = True
    """Whether torch counts as installed now."""
    installable: bool = True
    """Whether installing it succeeds; otherwise installTorch raises RuntimeError."""
    module: Any = None
    """What stands for the module torch; None for the real one."""
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The arguments of each installTorch."""


def install(state: TorchState | None = None) -> TorchState:
    """Adds the extension: `import PyTorchUtils` and slicer.modules.pytorchutils work from now on."""
    state = state or TorchState()
    module = types.ModuleType(MODULE, "Stands for the module of the PyTorch extension.")
    module.PyTorchUtilsLogic = _make_logic(state)
    sys.modules[MODULE] = module
    setattr(slicer.modules, MODULE.lower(), Module(MODULE, path=f"/nowhere/{MODULE}.py"))
    return state


def remove() -> None:
    """Takes the extension away again; importing it then fails as it does without the extension."""
    sys.modules.pop(MODULE, None)
    if hasattr(slicer.modules, MODULE.lower()):
        delattr(slicer.modules, MODULE.lower())


def _make_logic(state: TorchState) -> type:
    class PyTorchUtilsLogic:
        """The part of the real logic that asks for torch."""

        @staticmethod
        def torchInstalled() -> bool:
            return state.installed

        @property
        def torch(self) -> Any:
            return self.importTorch()

        def importTorch(self) -> Any:
            if not state.installed:
                return self.installTorch()
            return state.module if state.module is not None else importlib.import_module("torch")

        def installTorch(
            self,
            askConfirmation: bool = False,
            forceComputationBackend: str | None = None,
            torchVersionRequirement: str | None = None,
            torchvisionVersionRequirement: str | None = None,
        ) -> Any:
            """The module torch, or None when the user declines."""
            state.calls.append(
                {
                    "askConfirmation": askConfirmation,
                    "forceComputationBackend": forceComputationBackend,
                    "torchVersionRequirement": torchVersionRequirement,
                    "torchvisionVersionRequirement": torchvisionVersionRequirement,
                }
            )
            if askConfirmation and not slicer.app.commandOptions().testingEnabled:
                question = "PyTorch will be downloaded and installed. The process might take some minutes."
                if not slicer.util.confirmOkCancelDisplay(question):
                    return None
            if not state.installable:
                raise RuntimeError("light-the-torch found no torch for this computer")
            state.installed = True
            return self.importTorch()

        def getDevice(self) -> Any:
            torch = self.torch
            return torch.device("cuda") if torch.cuda.is_available() else "cpu"

        @property
        def cuda(self) -> bool:
            return self.getDevice() != "cpu"

    return PyTorchUtilsLogic

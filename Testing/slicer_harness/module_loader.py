"""Loads scripted modules as Slicer does: imports <Module>.py, makes its module object, and its panel when asked."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import qt
import slicer

from .application import Module, delete_deferred
from .qmrml_widgets import qMRMLWidget


class ModuleParent:
    """Stands for qSlicerScriptedLoadableModule: what a module's constructor writes its title into."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.name = path.stem
        self.icon: Any = None
        self.hidden = False
        self.associatedNodeTypes: list[str] = []


class PanelParent(qMRMLWidget):
    """Stands for qSlicerScriptedLoadableModuleWidget: the panel's parent, which enters, leaves and reloads it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._panel: Any = None
        self.isEntered = False
        self.setLayout(qt.QVBoxLayout())
        self.setMRMLScene(slicer.mrmlScene)

    def self(self) -> Any:
        """The module's widget object; the name is Slicer's."""
        return self._panel

    def reload(self) -> None:
        """Makes the panel, from the module as it is imported now."""
        self._panel = getattr(sys.modules[self._name], f"{self._name}Widget")(self)
        setattr(slicer.modules, f"{self._name}Widget", self._panel)
        self._panel.setup()
        if self.isEntered and hasattr(self._panel, "enter"):
            self._panel.enter()

    def enter(self) -> None:
        """The user has chosen the module."""
        self.isEntered = True
        if hasattr(self._panel, "enter"):
            self._panel.enter()

    def exit(self) -> None:
        """The user has chosen another module."""
        self.isEntered = False
        if hasattr(self._panel, "exit"):
            self._panel.exit()


class ScriptedModule(Module):
    """slicer.modules.<name> of a scripted module."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path=str(path))
        self._parent: PanelParent | None = None

    def widgetRepresentation(self) -> PanelParent:
        """The panel's parent, made on the first call; .self() is the module's widget object."""
        if self._parent is None:
            self._parent = PanelParent(self.name)
            self._parent.reload()
        return self._parent

    def forget_widget(self) -> None:
        """Leaves the panel, cleans it up and deletes it, as at the end of the application."""
        if self._parent is None:
            return
        if self._parent.isEntered:
            self._parent.exit()
        slicer.app.moduleManager().emit("moduleAboutToBeUnloaded(QString)", self.name)
        if hasattr(slicer.modules, f"{self.name}Widget"):
            delattr(slicer.modules, f"{self.name}Widget")
        self._parent.deleteLater()
        self._parent = None


# What slicer.util.getModuleWidget() and getModuleLogic() ask for.
slicer.qSlicerScriptedLoadableModule = ScriptedModule
slicer.qSlicerScriptedLoadableModuleWidget = PanelParent


def load(path: str | Path) -> types.ModuleType:
    """Imports a module's file and registers it: slicer.modules.<name> and slicer.modules.<Name>Instance."""
    path = Path(path).resolve()
    name = path.stem
    if str(path.parent) not in sys.path:  # which is all of its own that a module finds on Slicer's path
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    parent = ModuleParent(path)
    instance = getattr(module, name)(parent)
    entry = ScriptedModule(name, path)
    entry.title = parent.title
    setattr(slicer.modules, name.lower(), entry)
    setattr(slicer.modules, f"{name}Instance", instance)
    return module


def show(name: str) -> Any:
    """Chooses a loaded module, as the user would: the widget object of its panel, set up and entered."""
    parent = getattr(slicer.modules, name.lower()).widgetRepresentation()
    if not parent.isEntered:
        parent.enter()
    return parent.self()


def close(name: str) -> None:
    """Ends the panel of a module."""
    getattr(slicer.modules, name.lower()).forget_widget()
    slicer.app.processEvents()
    delete_deferred()

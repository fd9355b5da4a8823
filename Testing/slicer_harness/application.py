"""Starts what stands for the Slicer application, once per process: slicer.mrmlScene, slicer.app, slicer.modules, qt.

The scene, its nodes, the module logics and the storage are slicer-core's, hence real; so is Qt. What hangs on
slicer.app is a stand-in, kept to what slicer.util and a scripted module ask for.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
import vtk

from . import dialogs, probes, qt_standin, widgets
from .core_io import CoreIOManager

HERE = Path(__file__).resolve().parent
# slicer-core's module logics, in the order in which they are set up: a segmentation needs volumes and colours.
MODULE_LOGICS = {
    "Volumes": "vtkSlicerVolumesLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Tables": "vtkSlicerTablesLogic",
    "Texts": "vtkSlicerTextsLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Models": "vtkSlicerModelsLogic",
    "CropVolume": "vtkSlicerCropVolumeLogic",
}


class Signals:
    """PythonQt's connect("name(type)", f) for objects that are no Qt objects here; emit() is the tests' to call."""

    def __init__(self) -> None:
        self._slots: dict[str, list[Callable[..., Any]]] = {}

    def connect(self, signal: str, slot: Callable[..., Any]) -> bool:
        self._slots.setdefault(signal, []).append(slot)
        return True

    def disconnect(self, signal: str, slot: Callable[..., Any] | None = None) -> bool:
        kept = [known for known in self._slots.get(signal, []) if slot is not None and known != slot]
        found = len(kept) < len(self._slots.get(signal, []))
        self._slots[signal] = kept
        return found

    def emit(self, signal: str, *arguments: Any) -> None:
        for slot in list(self._slots.get(signal, [])):
            slot(*arguments)


class ModuleManager(Signals):
    """Stands for qSlicerModuleManager."""

    def module(self, name: str) -> Any:
        return getattr(slicer.modules, name.lower(), None)

    def modulesNames(self) -> list[str]:
        found = (getattr(value, "name", None) for value in vars(slicer.modules).values())
        return sorted({name for name in found if isinstance(name, str)})


class Module:
    """Stands for qSlicerAbstractCoreModule: what slicer.modules.volumes, say, is."""

    def __init__(self, name: str, logic: Any = None, path: str = "") -> None:
        self.name = self.title = name
        self.path = path
        self._logic = logic

    def logic(self) -> Any:
        return self._logic

    def widgetRepresentation(self) -> Any:
        return None


class Application(Signals):
    """Stands for qSlicerApplication. Attributes that tests set: `testing` and `layout_manager`."""

    applicationName = "Slicer"
    majorVersion = 5
    minorVersion = 13
    applicationVersion = "5.13.0-standin"
    revision = "standin"

    def __init__(self, qapplication: Any) -> None:
        super().__init__()
        self._qapplication = qapplication
        self._startup_environment = qt_standin.QtCore.QProcessEnvironment.systemEnvironment()
        self._folder = tempfile.TemporaryDirectory(prefix="slicer-standin-")
        self._moduleManager = ModuleManager()
        self._coreIOManager = CoreIOManager()
        self.applicationLogic_: Any = None
        self.temporaryPath = str(Path(self._folder.name) / "temporary")
        self.slicerHome = str(Path(self._folder.name) / "home")
        for folder in (self.temporaryPath, self.slicerHome):
            Path(folder).mkdir()
        self.testing = False
        self.layout_manager: Any = None
        self.exit_code: int | None = None
        qt_standin.use_settings_in(Path(self._folder.name) / "settings")

    def mrmlScene(self) -> Any:
        return slicer.mrmlScene

    def applicationLogic(self) -> Any:
        return self.applicationLogic_

    def coreIOManager(self) -> CoreIOManager:
        return self._coreIOManager

    ioManager = coreIOManager

    def moduleManager(self) -> ModuleManager:
        return self._moduleManager

    def layoutManager(self) -> Any:
        """None, as with --no-main-window, until a test installs off-screen views."""
        return self.layout_manager

    def testingEnabled(self) -> bool:
        return self.testing

    def commandOptions(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(noMainWindow=slicer.util.mainWindow() is None, testingEnabled=self.testing)

    def arguments(self) -> list[str]:
        return list(sys.argv)

    def startupEnvironment(self) -> Any:
        """The environment before this stand-in changed it, as Slicer's is without the launcher's values."""
        return self._startup_environment

    def processEvents(self, *arguments: Any) -> None:
        self._qapplication.processEvents()

    def userSettings(self) -> Any:
        """A throw-away .ini file, the same that qt.QSettings() opens."""
        return qt_standin.QtCore.QSettings()

    settings = revisionUserSettings = userSettings

    def topLevelWidgets(self) -> list[Any]:
        return self._qapplication.topLevelWidgets()

    def setOverrideCursor(self, cursor: Any) -> None:
        self._qapplication.setOverrideCursor(cursor)

    def restoreOverrideCursor(self) -> None:
        self._qapplication.restoreOverrideCursor()

    def pauseRender(self) -> None:
        """Nothing renders by itself here."""

    resumeRender = pauseRender

    def setRenderPaused(self, paused: bool) -> None:
        """Nothing renders by itself here."""

    def translate(self, context: str, text: str) -> str:
        return text

    def exit(self, code: int = 0) -> None:
        """Remembers the code and goes on; in Slicer the application ends when its event loop does."""
        self.exit_code = code

    quit = exit


class _SubjectHierarchyItems:
    """Gives every node that users see its item in the subject hierarchy: in Slicer, Qt plugins do, at these events."""

    CLASSES = ("vtkMRMLDisplayableNode", "vtkMRMLTableNode", "vtkMRMLTextNode")

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        scene.AddObserver(scene.NodeAddedEvent, self._added)
        scene.AddObserver(scene.NodeAboutToBeRemovedEvent, self._removed)
        scene.AddObserver(scene.EndImportEvent, self._imported)
        scene.AddObserver(scene.EndCloseEvent, self._closed)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _added(self, scene: Any, event: str, node: Any) -> None:
        if not self._scene.IsImporting():
            self._add(node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _removed(self, scene: Any, event: str, node: Any) -> None:
        # Not for the hierarchy itself: asking for it, while the scene merges two of them, starts the merging anew.
        if self._scene.IsClosing() or not self._has_item(node):
            return
        hierarchy = self._scene.GetSubjectHierarchyNode()
        item = hierarchy.GetItemByDataNode(node) if hierarchy else 0
        if item:
            hierarchy.RemoveItem(item, False, False)

    def _imported(self, scene: Any, event: str) -> None:
        self._scene.GetSubjectHierarchyNode()  # merges the hierarchy of the file
        for i in range(self._scene.GetNumberOfNodes()):
            self._add(self._scene.GetNthNode(i))

    def _closed(self, scene: Any, event: str) -> None:
        # The scene itself would go on with the old one if anything in Python still held that.
        slicer.vtkMRMLSubjectHierarchyNode.ResolveSubjectHierarchy(self._scene)

    def _add(self, node: Any) -> None:
        if node.GetHideFromEditors() or not self._has_item(node):
            return
        hierarchy = self._scene.GetSubjectHierarchyNode()
        if hierarchy and not hierarchy.GetItemByDataNode(node):
            hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)

    def _has_item(self, node: Any) -> bool:
        return any(map(node.IsA, self.CLASSES))


def _make_scene(app: Application) -> Any:
    """The scene with what Slicer puts into it at start-up, and app.applicationLogic()."""
    scene = slicer.vtkMRMLScene()
    slicer.mrmlScene = scene
    scene.RegisterNodeClass(slicer.vtkMRMLCommandLineModuleNode())
    crosshair = slicer.vtkMRMLCrosshairNode()
    crosshair.SetCrosshairName("default")
    scene.AddNode(crosshair)

    logic = app.applicationLogic_ = slicer.vtkSlicerApplicationLogic()
    logic.SetTemporaryPath(app.temporaryPath)
    logic.SetMRMLScene(scene)
    logic.SetSliceLogics(vtk.vtkCollection())
    logic.SetViewLogics(vtk.vtkCollection())
    logic.GetColorLogic().SetMRMLScene(scene)
    logic.GetColorLogic().AddDefaultColorNodes()
    slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance().SetMRMLApplicationLogic(logic)
    slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance().SetMRMLApplicationLogic(logic)
    slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene, True)
    _make_data_io(app, scene, logic)
    return scene


def _make_data_io(app: Application, scene: Any, logic: Any) -> None:
    """Importing a scene that names files needs the remote and the data IO logic."""
    remote = slicer.vtkMRMLRemoteIOLogic()
    remote.SetMRMLScene(scene)
    remote.SetMRMLApplicationLogic(logic)
    remote.GetCacheManager().SetRemoteCacheDirectory(app.temporaryPath)
    data_io = slicer.vtkDataIOManagerLogic()
    data_io.SetMRMLScene(scene)
    data_io.SetMRMLApplicationLogic(logic)
    data_io.SetAndObserveDataIOManager(remote.GetDataIOManager())
    remote.AddDataIOToScene()
    app.data_io = (remote, data_io)  # they live as long as the application


def _make_modules(app: Application, scene: Any) -> None:
    """slicer.modules, with the logics that slicer-core has."""
    modules = types.ModuleType("slicer.modules", "Stands for Slicer's table of modules.")
    sys.modules["slicer.modules"] = slicer.modules = modules
    logics = {"Colors": app.applicationLogic().GetColorLogic()}
    logics |= {name: getattr(slicer, kind)() for name, kind in MODULE_LOGICS.items() if hasattr(slicer, kind)}
    for name, logic in logics.items():
        logic.SetMRMLScene(scene)
        logic.SetMRMLApplicationLogic(app.applicationLogic())
        app.applicationLogic().SetModuleLogic(name, logic)
        setattr(modules, name.lower(), Module(name, logic))


def _put_python_slicer_on_path(folder: Path) -> None:
    """PythonSlicer, which modules start for work outside the application, is this Python."""
    folder.mkdir()
    program = folder / "PythonSlicer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def delete_deferred() -> None:
    """Deletes what deleteLater() was called on, which the event loop does only when control returns to it."""
    qt_standin.QtCore.QCoreApplication.sendPostedEvents(None, qt_standin.QtCore.QEvent.Type.DeferredDelete)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Runs the Qt event loop until the condition holds; AssertionError when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {seconds} s")
        slicer.app.processEvents()
        delete_deferred()
        time.sleep(0.005)  # leaves the processor to the process or thread that is waited for


@functools.cache
def bootstrap() -> Application:
    """Starts the stand-in; later calls return the same application."""
    window = probes.gl_window()
    if window:
        os.environ["VTK_DEFAULT_OPENGL_WINDOW"] = window
    # Modules of slicer that the wheel lacks.
    slicer.__path__.append(str(HERE / "standin_slicer"))
    qapplication = qt_standin.install()
    widgets.install()
    dialogs.install()
    app = slicer.app = Application(qapplication)
    scene = _make_scene(app)
    _make_modules(app, scene)
    app.subject_hierarchy_items = _SubjectHierarchyItems(scene)
    _put_python_slicer_on_path(Path(app.slicerHome) / "bin")
    logging.getLogger(__name__).debug("the stand-in for Slicer is up")
    return app

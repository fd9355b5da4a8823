"""Fixtures of the tests that need Slicer: the stand-in application, a scene, views, panels, answers to dialogs.

Nothing of Slicer or Qt is imported before a test asks for it; where they cannot start, that test is skipped.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest
from slicer_harness import probes

if TYPE_CHECKING:
    from slicer_harness.application import Application
    from slicer_harness.dialogs import Dialogs
    from slicer_harness.offscreen_views import OffscreenLayoutManager
    from slicer_harness.torch_standin import TorchState
    from slicer_harness.vtk_messages import VtkMessages


class SlotErrors:
    """Collects exceptions that leave a slot of Qt or an observer of VTK: both only print them, and go on."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._before = sys.excepthook

    def start(self) -> SlotErrors:
        self._before = sys.excepthook
        sys.excepthook = self._collect
        return self

    def stop(self) -> None:
        sys.excepthook = self._before

    def take(self) -> list[BaseException]:
        """Those so far, which are forgotten: for a test that provokes one."""
        errors, self.errors = self.errors, []
        return errors

    def check(self) -> None:
        """Raises AssertionError when there is one."""
        if self.errors:
            told = ["".join(traceback.format_exception(error)) for error in self.errors]
            raise AssertionError("left a slot or an observer:\n" + "\n".join(told))

    def _collect(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.errors.append(error)


class NewNodes:
    """The nodes that came into the scene since this was made, or since forget()."""

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        self._known: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Those there now are no longer new."""
        self._known = {node.GetID() for node in self._all()}

    def names(self) -> list[str]:
        """Class and name of each, sorted: "vtkMRMLTextNode Rationale"."""
        new = [node for node in self._all() if node.GetID() not in self._known]
        return sorted(f"{node.GetClassName()} {node.GetName()}" for node in new)

    def _all(self) -> list[Any]:
        return [self._scene.GetNthNode(i) for i in range(self._scene.GetNumberOfNodes())]


@pytest.fixture(scope="session")
def slicer_app() -> Iterator[Application]:
    """The stand-in for Slicer: slicer.app, slicer.mrmlScene, slicer.modules, qt and ctk work from here on."""
    reason = probes.missing_for_slicer()
    if reason:
        pytest.skip(reason)
    environment = dict(os.environ)
    from slicer_harness import application

    yield application.bootstrap()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def vtk_messages(slicer_app: Application) -> Iterator[VtkMessages]:
    """What VTK and MRML say during the test; scene checks at the end that there is no error among it."""
    from slicer_harness.vtk_messages import VtkMessages

    with VtkMessages() as messages:
        yield messages


@pytest.fixture
def slot_errors(slicer_app: Application) -> Iterator[SlotErrors]:
    """Exceptions that nobody caught in slots and observers; scene checks at the end that there are none."""
    errors = SlotErrors().start()
    yield errors
    errors.stop()


@pytest.fixture
def scene(slicer_app: Application, vtk_messages: VtkMessages, slot_errors: SlotErrors) -> Iterator[Any]:
    """slicer.mrmlScene, emptied, with settings, dialogs and installer as new.

    Afterwards VTK must have reported no error, no exception left a slot, and no dialog gone unanswered.
    """
    import slicer
    import slicer.packaging
    from slicer_harness.dialogs import DIALOGS

    slicer.mrmlScene.Clear(0)
    slicer_app.testing = False
    slicer_app.exit_code = None
    slicer_app.disconnect("startupCompleted()")  # of modules that earlier tests have loaded
    slicer_app.userSettings().clear()
    slicer.packaging.INSTALLER.reset()
    DIALOGS.clear()
    yield slicer.mrmlScene
    slicer_app.processEvents()
    slicer.mrmlScene.Clear(0)
    vtk_messages.check()
    slot_errors.check()
    DIALOGS.check()


@pytest.fixture
def new_nodes(scene: Any) -> NewNodes:
    """Tells which nodes the test has added to the scene."""
    return NewNodes(scene)


@pytest.fixture
def dialogs(scene: Any) -> Iterator[Dialogs]:
    """A main window, so that messages are shown, and the answers to them: dialogs.answer("words", "Ok").

    Without this fixture there is no main window, and slicer.util only logs what it would say.
    """
    import qt
    from slicer_harness.application import delete_deferred
    from slicer_harness.dialogs import DIALOGS

    window = qt.QMainWindow()
    window.objectName = "qSlicerMainWindow"
    yield DIALOGS
    window.deleteLater()
    delete_deferred()


@pytest.fixture
def offscreen_views(slicer_app: Application, scene: Any) -> Iterator[OffscreenLayoutManager]:
    """slicer.app.layoutManager() with Red, Green, Yellow and a 3-D view; their pictures need `needs_gl`, too."""
    from slicer_harness.offscreen_views import OffscreenLayoutManager

    manager = slicer_app.layout_manager = OffscreenLayoutManager()
    yield manager
    slicer_app.layout_manager = None
    manager.close()


@pytest.fixture
def needs_gl() -> None:
    """Skips the test where VTK cannot draw; it would end the whole process there."""
    if not probes.has_gl():
        pytest.skip(f"VTK finds no GL to draw with off-screen ({probes.SYSTEM_LIBRARIES})")


@pytest.fixture
def open_panel(scene: Any) -> Iterator[Callable[[Path], Any]]:
    """Loads a module's file and chooses the module: returns the widget object, closed after the test."""
    from slicer_harness import module_loader

    names = []

    def open_(path: Path) -> Any:
        module_loader.load(path)
        names.append(path.stem)
        return module_loader.show(path.stem)

    yield open_
    for name in names:
        module_loader.close(name)


@pytest.fixture
def torch_extension(scene: Any) -> Iterator[TorchState]:
    """The PyTorch extension is there and says that torch is installed; the test may say otherwise."""
    from slicer_harness import torch_standin

    yield torch_standin.install()
    torch_standin.remove()


@pytest.fixture
def wait_until(slicer_app: Application) -> Callable[..., None]:
    """Runs the real event loop until a condition holds: wait_until(lambda: done, seconds=10)."""
    from slicer_harness.application import wait_until

    return wait_until

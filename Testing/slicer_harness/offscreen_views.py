"""Slice and 3-D views that are drawn off-screen by slicer-core's real logics and displayable managers, without Qt.

The logics work without GL; only picture() draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

SLICE_VIEWS = {"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}
SLICE_MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLColorLegendDisplayableManager",
)
THREE_D_MANAGERS = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLModelDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager3D",
    "vtkMRMLMarkupsDisplayableManager",
)
SIZE = (256, 256)


class _Drawing:
    """A render window with displayable managers for one view node."""

    def __init__(self, factory: Any, managers: Sequence[str], node: Any, size: tuple[int, int]) -> None:
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(*size)
        self.renderer = vtk.vtkRenderer()
        self.window.AddRenderer(self.renderer)
        self.interactor = vtk.vtkRenderWindowInteractor()
        self.interactor.SetRenderWindow(self.window)
        for name in managers:
            if not factory.IsDisplayableManagerRegistered(name):
                factory.RegisterDisplayableManager(name)
        self.managers = slicer.vtkMRMLDisplayableManagerGroup()
        self.managers.SetRenderer(self.renderer)
        self.managers.Initialize(factory, self.renderer)
        self.managers.SetMRMLDisplayableNode(node)

    def pixels(self) -> np.ndarray:
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        image = grab.GetOutput()
        width, height, _ = image.GetDimensions()
        values = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(height, width, -1)
        return values[::-1, :, :3].copy()

    def close(self) -> None:
        self.managers.SetMRMLDisplayableNode(None)
        self.window.Finalize()


class SliceView:
    """Stands for a slice widget and its view: a real slice logic, node and composite node."""

    def __init__(self, name: str, orientation: str, size: tuple[int, int] = SIZE) -> None:
        self.name = name
        self.size = size
        application = slicer.app.applicationLogic()
        self._logic = slicer.vtkMRMLSliceLogic()
        self._logic.SetMRMLApplicationLogic(application)
        application.GetSliceLogics().AddItem(self._logic)
        self._logic.SetMRMLScene(slicer.mrmlScene)
        self._node = self._logic.AddSliceNode(name)
        self._node.SetOrientation(orientation)
        self._logic.ResizeSliceNode(*size)
        self._drawing: _Drawing | None = None

    def sliceLogic(self) -> Any:
        return self._logic

    def mrmlSliceNode(self) -> Any:
        return self._node

    def mrmlSliceCompositeNode(self) -> Any:
        return self._logic.GetSliceCompositeNode()

    def sliceView(self) -> SliceView:
        """Slicer's widget has a view of its own; here they are one."""
        return self

    def scheduleRender(self) -> None:
        """picture() draws when it is asked."""

    forceRender = scheduleRender

    def fit(self) -> None:
        """Shows the whole background volume, in its middle slice."""
        self._logic.ResizeSliceNode(*self.size)
        self._logic.FitSliceToBackground()
        self._logic.SnapSliceOffsetToIJK()

    def pixel_of(self, ras: Sequence[float]) -> tuple[int, int]:
        """Row and column, in picture(), of a point in mm, RAS."""
        ras_to_xy = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(self._node.GetXYToRAS(), ras_to_xy)
        x, y = ras_to_xy.MultiplyPoint((*ras, 1.0))[:2]
        return round(self.size[1] - 1 - y), round(x)

    def picture(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, what the view shows; the first row is the uppermost. Needs GL."""
        if self._drawing is None:
            self._drawing = self._make_drawing()
        self._mapper.SetInputConnection(self._logic.GetImageDataConnection())
        return self._drawing.pixels()

    def _make_drawing(self) -> _Drawing:
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        drawing = _Drawing(factory, SLICE_MANAGERS, self._node, self.size)
        drawing.renderer.GetActiveCamera().ParallelProjectionOn()
        # Slicer shows the blended image with a CTK class that has no Python; an image mapper does the same.
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self._mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        drawing.renderer.AddViewProp(actor)
        return drawing

    def close(self) -> None:
        """Takes the view out of the scene and the application."""
        if self._drawing is not None:
            self._drawing.close()
        composite = self.mrmlSliceCompositeNode()
        slicer.app.applicationLogic().GetSliceLogics().RemoveItem(self._logic)
        self._logic.SetMRMLScene(None)
        for node in (composite, self._node):
            if slicer.mrmlScene.IsNodePresent(node):
                slicer.mrmlScene.RemoveNode(node)


class ThreeDView:
    """Stands for a 3-D widget and its view."""

    def __init__(self, name: str = "1", size: tuple[int, int] = SIZE) -> None:
        self.size = size
        application = slicer.app.applicationLogic()
        self._logic = slicer.vtkMRMLViewLogic()
        self._logic.SetMRMLApplicationLogic(application)
        application.GetViewLogics().AddItem(self._logic)
        self._logic.SetMRMLScene(slicer.mrmlScene)
        self._node = self._logic.AddViewNode(name)
        self._drawing: _Drawing | None = None
        self._focal_point_asked = True

    def mrmlViewNode(self) -> Any:
        return self._node

    def threeDView(self) -> ThreeDView:
        """Slicer's widget has a view of its own; here they are one."""
        return self

    def resetFocalPoint(self) -> None:
        """Fits the box to what is shown, and looks at all of it from the next picture() on."""
        self._node.InvokeEvent(slicer.vtkMRMLViewNode.ResetFocalPointRequestedEvent)
        self._focal_point_asked = True

    resetCamera = resetFocalPoint

    def scheduleRender(self) -> None:
        """picture() draws when it is asked."""

    forceRender = scheduleRender

    def picture(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, what the view shows; the first row is the uppermost. Needs GL."""
        if self._drawing is None:
            factory = slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance()
            self._drawing = _Drawing(factory, THREE_D_MANAGERS, self._node, self.size)
        if self._focal_point_asked:
            self._drawing.window.Render()
            self._drawing.renderer.ResetCamera()
            self._focal_point_asked = False
        return self._drawing.pixels()

    def close(self) -> None:
        """Takes the view out of the scene and the application."""
        if self._drawing is not None:
            self._drawing.close()
        slicer.app.applicationLogic().GetViewLogics().RemoveItem(self._logic)
        self._logic.SetMRMLScene(None)
        if slicer.mrmlScene.IsNodePresent(self._node):
            slicer.mrmlScene.RemoveNode(self._node)


class OffscreenLayoutManager:
    """Stands for qSlicerLayoutManager: three slice views and one 3-D view, whatever the layout."""

    tableViewCount = 0
    plotViewCount = 0
    threeDViewCount = 1

    def __init__(self, size: tuple[int, int] = SIZE) -> None:
        self._slices = {name: SliceView(name, orientation, size) for name, orientation in SLICE_VIEWS.items()}
        self._three_d = ThreeDView(size=size)
        self.layout = slicer.vtkMRMLLayoutNode.SlicerLayoutConventionalView

    def sliceViewNames(self) -> list[str]:
        return list(self._slices)

    def sliceWidget(self, name: str) -> SliceView | None:
        return self._slices.get(name)

    def mrmlSliceLogics(self) -> Any:
        return slicer.app.applicationLogic().GetSliceLogics()

    def threeDWidget(self, index: int) -> ThreeDView:
        return [self._three_d][index]

    def setLayout(self, layout: int) -> None:
        """Remembers the layout; the views stay."""
        self.layout = layout

    def resetSliceViews(self) -> None:
        for view in self._slices.values():
            view.fit()

    def resetThreeDViews(self) -> None:
        self._three_d.resetFocalPoint()

    def close(self) -> None:
        """Takes all views out of the scene again."""
        for view in (*self._slices.values(), self._three_d):
            view.close()

"""The slice views: which volumes they show, and where. Without a main window there are none, and nothing happens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import slicer
import vtk

OBLIQUE = "T2W"


def show(background: Any, foreground: Any = None, opacity: float = 0.5) -> None:
    """Background and heatmap of all slice views; None leaves the background as it is, and takes the heatmap away."""
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if background is not None:
            composite.SetBackgroundVolumeID(background.GetID())
        composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
        composite.SetForegroundOpacity(opacity if foreground is not None else 0.0)


def align(volume: Any) -> None:
    """Turn the slice views into the volume's own planes, and fit it into them: oblique slices are seen as acquired.

    An oblique plane gets a name of its own ("AxialT2W"): a scene saved with Slicer's unnamed one, "Reformat", reports
    errors when it is loaded.
    """
    for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        name = node.GetOrientation().removesuffix(OBLIQUE) + OBLIQUE
        node.RotateToVolumePlane(volume)
        if node.GetOrientation() == "Reformat":
            plane = vtk.vtkMatrix3x3()
            for row, column in itertools.product(range(3), range(3)):
                plane.SetElement(row, column, node.GetSliceToRAS().GetElement(row, column))
            if node.HasSliceOrientationPreset(name):  # of the volume before
                node.RemoveSliceOrientationPreset(name)
            node.AddSliceOrientationPreset(name, plane)
    manager = slicer.app.layoutManager()
    if manager is not None:
        for name in manager.sliceViewNames():
            manager.sliceWidget(name).sliceLogic().FitSliceToAll()


def jump(ras: Sequence[float]) -> None:
    """Move all slice views to a point (RAS, mm)."""
    slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *ras, slicer.vtkMRMLSliceNode.OffsetJumpSlice)


def scale(heatmap: Any, threshold: float, top: float) -> None:
    """Draw heat from 0 to `top`, and hide what is below this fraction of it."""
    display = heatmap.GetDisplayNode()
    display.SetWindowLevelMinMax(0.0, top)
    display.SetThreshold(threshold * top, 1.0)
    display.SetApplyThreshold(threshold > 0)

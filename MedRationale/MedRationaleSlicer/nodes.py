"""Nodes of the scene and how they are made: what Results is built of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

ROLE = "MedRationale.role"
"""Attribute of every node made here."""
COLOR_TABLE = "MedRationale heat"
COLUMNS = {
    "id": "Lesion",
    "pirads": "PI-RADS",
    "zone": "Zone",
    "size_mm": "mm",
    "volume_ml": "ml",
    "t2w_score": "T2W",
    "dwi_score": "DWI",
    "likelihood": "Likelihood",
    "sector": "Sector",
}
"""Field of a finding -> its column."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""And back."""


@contextmanager
def all_or_nothing() -> Iterator[list[Any]]:
    """Nodes put into the list are removed if the block ends early."""
    made: list[Any] = []
    try:
        yield made
    except BaseException:
        for node in made:
            remove_node(node)
        raise


def remove_node(node: Any) -> None:
    """Take a node out of the scene with its display and storage nodes, which the scene would keep."""
    if node.GetScene() is None:
        return
    displays = node.GetNumberOfDisplayNodes() if node.IsA("vtkMRMLDisplayableNode") else 0
    helpers = [node.GetNthDisplayNode(index) for index in range(displays)]
    helpers += [node.GetStorageNode()] if node.IsA("vtkMRMLStorableNode") else []
    slicer.mrmlScene.RemoveNode(node)
    for helper in helpers:
        if helper is not None:
            slicer.mrmlScene.RemoveNode(helper)


def role(name: str) -> str:
    return f"MedRationale.{name}"


def new_node(kind: str, name: str, hidden: bool = False, role: str = "") -> Any:
    """A node of the scene, complete when the scene tells of it: who shows nodes asks then what it is."""
    node = slicer.mrmlScene.CreateNodeByClass(kind)
    node.UnRegister(None)
    node.SetName(slicer.mrmlScene.GenerateUniqueName(name))
    node.SetHideFromEditors(hidden)
    if role:
        node.SetAttribute(ROLE, role)
    return slicer.mrmlScene.AddNode(node)


def text_node(name: str, role: str, made: list[Any], hidden: bool = False) -> Any:
    node = new_node("vtkMRMLTextNode", name, hidden, role)
    made.append(node)
    return node


def into_folder(node: Any, folder: int) -> None:
    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    item = shown.GetItemByDataNode(node) or shown.CreateItem(folder, node)
    shown.SetItemParent(item, folder)


def forget_file(node: Any) -> None:
    """The file that a node came from is temporary: saving the scene must not look for it."""
    storage = node.GetStorageNode()
    if storage is not None:
        slicer.mrmlScene.RemoveNode(storage)


def fill(table: Any, rows: list[Mapping[str, Any]]) -> None:
    """A row a finding, in the columns COLUMNS."""
    table.RemoveAllColumns()
    for key, title in COLUMNS.items():
        column = vtk.vtkStringArray()
        column.SetName(title)
        for row in rows:
            column.InsertNextValue("" if row[key] is None else str(row[key]))
        table.AddColumn(column)


def heat_colors() -> Any:
    """The colours of the report's heatmaps, as a colour table of this scene."""
    found = slicer.mrmlScene.GetFirstNodeByName(COLOR_TABLE)
    if found is not None:
        return found
    from MedRationaleLib.report_images import HEAT_STOPS

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLColorTableNode", COLOR_TABLE)
    node.SetTypeToUser()
    node.SetNumberOfColors(256)
    node.SetHideFromEditors(False)
    stops = [stop for stop, _ in HEAT_STOPS]
    for index in range(256):
        red, green, blue = (
            float(np.interp(index / 255, stops, [color[channel] for _, color in HEAT_STOPS])) / 255
            for channel in range(3)
        )
        node.SetColor(index, f"{index / 255:.2f}", red, green, blue, 1.0)
    return node


def sitk_array(image: Any) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayViewFromImage(image)


def ijk_to_ras(image: Any) -> Any:
    """vtkMatrix4x4 of a SimpleITK image."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return slicer.util.vtkMatrixFromArray(LPS_TO_RAS @ matrix)


def volume_image(node: Any, frame: Any = None) -> Any:
    """SimpleITK image (LPS) of a volume, in the coordinates in which the volume `frame` lies before its transform.

    Raises RuntimeError where a transform is not linear.
    """
    import SimpleITK as sitk

    to_ras = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(to_ras)
    to_frame = np.linalg.inv(to_world(frame)) if frame is not None else np.eye(4)
    matrix = LPS_TO_RAS @ to_frame @ to_world(node) @ slicer.util.arrayFromVTKMatrix(to_ras)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    image = sitk.GetImageFromArray(slicer.util.arrayFromVolume(node))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((matrix[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(matrix[:3, 3].tolist())
    return image


def segment_mask(segmentation: Any, segment: str, volume: Any) -> np.ndarray:
    """(z, y, x) uint8 of a segment on a volume's grid; both under one transform.

    slicer.util.arrayFromSegmentBinaryLabelmap would leave a display node in the scene at each call.
    """
    from vtk.util.numpy_support import vtk_to_numpy

    stored, mask = slicer.vtkOrientedImageData(), slicer.vtkOrientedImageData()
    segmentation.GetBinaryLabelmapRepresentation(segment, stored)
    make = slicer.vtkSlicerSegmentationsModuleLogic.CreateOrientedImageDataFromVolumeNode
    grid = make(volume, segmentation.GetParentTransformNode())
    grid.UnRegister(None)
    slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage(stored, grid, mask, False, False)
    values: np.ndarray = vtk_to_numpy(mask.GetPointData().GetScalars())
    return values.reshape(mask.GetDimensions()[::-1]).astype(np.uint8)


def to_world(node: Any) -> np.ndarray:
    """(4, 4) from a node's own RAS to the world's: its linear transforms."""
    transform = node.GetParentTransformNode() if node is not None else None
    matrix = vtk.vtkMatrix4x4()
    # Asked first: GetMatrixTransformToWorld of a deformable transform reports an error on VTK's window.
    if transform is not None and not (
        transform.IsTransformToWorldLinear() and transform.GetMatrixTransformToWorld(matrix)
    ):
        raise RuntimeError(
            _(
                "Expected {name} as acquired or under a linear transform, got a deformable one; harden it or choose "
                "the original volume."
            ).format(name=node.GetName())
        )
    found: np.ndarray = slicer.util.arrayFromVTKMatrix(matrix)
    return found

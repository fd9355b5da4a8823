"""Stands for qSlicerCoreIOManager: chooses the real MRML storage node for a file, by its ending."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import slicer
import vtk

# The first ending that fits decides, so the longer ones come first.
FILE_TYPES = {
    (".mrml", ".mrb"): "SceneFile",
    (".seg.nrrd", ".seg.nhdr", ".seg.vtm"): "SegmentationFile",
    (".mrk.json", ".mkp.json", ".fcsv"): "MarkupsFile",
    (".ctbl",): "ColorTableFile",
    (".tsv", ".csv"): "TableFile",
    (".txt", ".json", ".xml"): "TextFile",
}
NODE_CLASSES = {
    "SegmentationFile": "vtkMRMLSegmentationNode",
    "MarkupsFile": "vtkMRMLMarkupsFiducialNode",
    "ColorTableFile": "vtkMRMLColorTableNode",
    "TableFile": "vtkMRMLTableNode",
    "TextFile": "vtkMRMLTextNode",
}
# vtkSlicerVolumesLogic's loading options.
LABEL_MAP = 1
SINGLE_FILE = 8


def _default_storage_node(node: Any) -> Any:
    """A storage node of the node's own kind, owned by Python only."""
    if node.IsA("vtkMRMLTextNode"):  # which offers none for short texts
        return slicer.vtkMRMLTextStorageNode()
    storage = node.CreateDefaultStorageNode()
    storage.UnRegister(None)
    return storage


class CoreIOManager:
    """Only what slicer.util asks of it; the method names are Slicer's."""

    def fileType(self, fileName: str) -> str:
        name = str(fileName).lower()
        return next((kind for endings, kind in FILE_TYPES.items() if name.endswith(endings)), "VolumeFile")

    def loadNodes(
        self, fileType: str, properties: Mapping[str, Any], loadedNodes: Any = None, userMessages: Any = None
    ) -> bool:
        path = str(properties["fileName"])
        if not os.path.exists(path):
            self._complain(userMessages, f"File not found: {path}")
            return False
        if fileType == "SceneFile":
            return self._load_scene(path, bool(properties.get("clear")), userMessages)
        name = properties.get("name") or os.path.basename(path).split(".")[0]
        if fileType == "VolumeFile":
            options = LABEL_MAP if properties.get("labelmap") else 0
            options |= SINGLE_FILE if properties.get("singleFile") else 0
            node = slicer.modules.volumes.logic().AddArchetypeVolume(path, name, options)
        else:
            node = self._load_storable(NODE_CLASSES[fileType], path, name, userMessages)
        if node is None:
            return False
        if loadedNodes is not None:
            loadedNodes.AddItem(node)
        return True

    def _load_scene(self, path: str, clear: bool, userMessages: Any) -> bool:
        scene = slicer.mrmlScene
        if clear:
            scene.Clear(0)
        if path.endswith(".mrb"):
            return bool(scene.ReadFromMRB(path, clear, userMessages))
        scene.SetURL(path)
        return bool(scene.Import(userMessages))

    def _load_storable(self, className: str, path: str, name: str, userMessages: Any) -> Any:
        scene = slicer.mrmlScene
        node = scene.AddNewNodeByClass(className, scene.GenerateUniqueName(name))
        storage = _default_storage_node(node)
        storage.SetFileName(path)
        scene.AddNode(storage)
        node.SetAndObserveStorageNodeID(storage.GetID())
        if not storage.ReadData(node):
            if userMessages is not None:
                userMessages.AddMessages(storage.GetUserMessages())
            scene.RemoveNode(node)
            scene.RemoveNode(storage)
            return None
        if hasattr(node, "CreateDefaultDisplayNodes"):
            node.CreateDefaultDisplayNodes()
        return node

    def fileWriterFileType(self, node: Any) -> str:
        return node.GetClassName()

    def fileWriterExtensions(self, node: Any) -> list[str]:
        types = _default_storage_node(node).GetSupportedWriteFileTypes()
        return [types.GetValue(i) for i in range(types.GetNumberOfValues())]

    def extractKnownExtension(self, fileName: str, node: Any) -> str:
        formats = self.fileWriterExtensions(node)
        endings = [slicer.vtkDataFileFormatHelper.GetFileExtensionFromFormatString(text) for text in formats]
        fitting = [ending for ending in endings if str(fileName).lower().endswith(ending.lower())]
        return max(fitting, key=len, default="")

    def saveNodes(self, fileType: str, properties: Mapping[str, Any], userMessages: Any = None) -> bool:
        path = str(properties["fileName"])
        if fileType == "SceneFile":
            return self._save_scene(path, userMessages)
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        if node.GetStorageNode() is None:
            node.AddDefaultStorageNode(path)
        storage = node.GetStorageNode()
        storage.SetFileName(path)
        if "useCompression" in properties:
            storage.SetUseCompression(int(properties["useCompression"]))
        written = bool(storage.WriteData(node))
        if not written and userMessages is not None:
            userMessages.AddMessages(storage.GetUserMessages())
        return written

    def _save_scene(self, path: str, userMessages: Any) -> bool:
        scene = slicer.mrmlScene
        folder = os.path.dirname(path)
        os.makedirs(folder or ".", exist_ok=True)
        scene.SetRootDirectory(folder)
        if path.endswith(".mrml"):
            scene.SetURL(path)
            return bool(scene.Commit())
        if path.endswith(".mrb"):
            return bool(scene.WriteToMRB(path, None, userMessages))
        os.makedirs(path, exist_ok=True)
        return bool(scene.SaveSceneToSlicerDataBundleDirectory(path, None, userMessages))

    def exportNodes(
        self,
        nodeIDs: Sequence[str],
        fileNames: Sequence[str],
        properties: Mapping[str, Any],
        hardenTransform: bool = False,
        userMessages: Any = None,
    ) -> bool:
        """Writes with a storage node of its own, so the nodes do not forget where they came from."""
        written = []
        for nodeID, path in zip(nodeIDs, fileNames, strict=True):
            node = slicer.mrmlScene.GetNodeByID(nodeID)
            storage = _default_storage_node(node)
            storage.SetFileName(str(path))
            written.append(bool(storage.WriteData(node)))
            if not written[-1] and userMessages is not None:
                userMessages.AddMessages(storage.GetUserMessages())
        return all(written)

    @staticmethod
    def _complain(userMessages: Any, text: str) -> None:
        if userMessages is not None:
            userMessages.AddMessage(vtk.vtkCommand.ErrorEvent, text)

"""qt.QUiLoader that knows the look-alikes, and the connections of .ui files whose types only Slicer knows."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from PySide6 import QtCore, QtUiTools

_numbers = itertools.count()
# Widgets of each loaded file: a look-alike loses its Python half when nothing refers to that.
_alive: dict[int, list[Any]] = {}


class UiLoader(QtUiTools.QUiLoader):
    """Loads a .ui file as Slicer does, and refuses what the real widgets would not know, either."""

    look_alikes: Mapping[str, type] = {}

    def load(self, device: Any, parent: Any = None) -> Any:
        tree = ElementTree.fromstring(self._read(device))
        self._check(tree)
        for name in {widget.get("class") for widget in tree.iter("widget")} & set(self.look_alikes):
            self.registerCustomWidget(self.look_alikes[name])
        scene_links = self._take_scene_links(tree)
        buffer = QtCore.QBuffer()
        buffer.setData(ElementTree.tostring(tree))
        buffer.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
        root = super().load(buffer, parent)
        if root is None:
            return None
        objects = [root, *root.findChildren(QtCore.QObject)]
        by_name = {each.objectName: each for each in objects}
        self._check_classes(tree, by_name)
        for sender, receiver in scene_links:
            by_name[sender]._scene_receivers.append(by_name[receiver])
        self._keep_alive(root, objects)
        return root

    @staticmethod
    def _read(device: Any) -> bytes:
        if isinstance(device, QtCore.QIODevice):
            return bytes(device.readAll().data())
        with open(device, "rb") as file:
            return file.read()

    def _check(self, tree: ElementTree.Element) -> None:
        """QUiLoader leaves unknown widgets out and takes any property; a typing error should show."""
        known = set(self.availableWidgets())
        missing = {widget.get("class") for widget in tree.iter("widget")} - known - set(self.look_alikes)
        if missing:
            raise RuntimeError(f"the stand-in has no widgets of the classes {sorted(map(str, missing))}")
        for widget in tree.iter("widget"):
            cls = self.look_alikes.get(widget.get("class", ""))
            for property_ in widget.findall("property") if cls else []:
                name = property_.get("name", "")
                if property_.get("stdset") != "0" and cls.staticMetaObject.indexOfProperty(name) < 0:
                    raise RuntimeError(f"{cls.__name__} '{widget.get('name')}' has no property '{name}'")

    def _check_classes(self, tree: ElementTree.Element, by_name: Mapping[str, Any]) -> None:
        """QUiLoader takes the base class when a widget's constructor raises, and only warns of it."""
        for widget in tree.iter("widget"):
            wanted, name = widget.get("class", ""), widget.get("name", "")
            if wanted in self.look_alikes and type(by_name[name]).__name__ != wanted:
                raise RuntimeError(f"'{name}' could not be made: does {wanted}() raise an exception?")

    @staticmethod
    def _take_scene_links(tree: ElementTree.Element) -> list[tuple[str, str]]:
        """Sender and receiver of each mrmlSceneChanged connection; the elements are taken out of the tree."""
        connections = tree.find("connections")
        found = [each for each in connections or () if "vtkMRML" in each.findtext("signal", "")]
        for each in found:
            connections.remove(each)
        return [(each.findtext("sender", ""), each.findtext("receiver", "")) for each in found]

    @staticmethod
    def _keep_alive(root: Any, objects: list[Any]) -> None:
        number = next(_numbers)

        def forget(*_destroyed: Any) -> None:
            _alive.pop(number, None)

        _alive[number] = objects
        root.destroyed.connect(forget)

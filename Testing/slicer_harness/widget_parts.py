"""What the look-alikes of ctk and qMRML widgets are put together from."""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtWidgets


def stored(kind: Any, name: str, default: Any) -> Any:
    """A Qt property that is only remembered."""

    def get(self: Any) -> Any:
        return self.__dict__.get(f"_{name}", default)

    def put(self: Any, value: Any) -> None:
        self.__dict__[f"_{name}"] = value

    return QtCore.Property(kind, get, put)


def of_part(kind: Any, part: str, name: str) -> Any:
    """A Qt property that is a property of a part of the widget."""

    def get(self: Any) -> Any:
        return QtCore.QObject.property(self.__dict__[part], name)

    def put(self: Any, value: Any) -> None:
        QtCore.QObject.setProperty(self.__dict__[part], name, value)

    return QtCore.Property(kind, get, put)


def lay_out_in_a_row(parent: Any, *parts: Any) -> None:
    """Lays the parts of a widget out side by side."""
    layout = QtWidgets.QHBoxLayout(parent)
    layout.setContentsMargins(0, 0, 0, 0)
    for part in parts:
        layout.addWidget(part)

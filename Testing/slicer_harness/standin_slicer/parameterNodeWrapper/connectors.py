"""How widgets show parameters."""

from __future__ import annotations

import dataclasses
import enum
import pathlib
from collections.abc import Callable
from typing import Any

import ctk
import qt
import slicer

from .parameters import Parameter
from .validators import Choice, Decimals, Maximum, Minimum, SingleStep, WithinRange

INT_LIMITS = (-(2**31), 2**31 - 1)


@dataclasses.dataclass
class Connector:
    """How a widget shows a parameter."""

    signal: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    widget: Any
    slot: Callable[..., None] | None = None

    def connect(self, slot: Callable[..., None]) -> None:
        self.slot = slot
        getattr(self.widget, self.signal).connect(slot)

    def disconnect(self) -> None:
        getattr(self.widget, self.signal).disconnect(self.slot)


def _by_attribute(widget: Any, signal: str, attribute: str) -> Connector:
    def write(value: Any) -> None:
        setattr(widget, attribute, value)

    return Connector(signal, lambda: getattr(widget, attribute), write, widget)


def _connect_button(widget: Any, parameter: Parameter) -> Connector:
    widget.checkable = True
    return _by_attribute(widget, "toggled", "checked")


def _connect_number(widget: Any, parameter: Parameter) -> Connector:
    for kind, attribute in ((Decimals, "decimals"), (SingleStep, "singleStep")):
        if parameter.note(kind) is not None:
            setattr(widget, attribute, parameter.note(kind).value)
    range_ = parameter.note(WithinRange)
    least = range_ or parameter.note(Minimum)
    most = range_ or parameter.note(Maximum)
    if type(widget) in (qt.QSlider, ctk.ctkSliderWidget) and not (least and most):
        raise RuntimeError(f"{parameter.name}: a {type(widget).__name__} needs a range, as WithinRange gives it")
    limits = INT_LIMITS if parameter.type is int else (float("-inf"), float("inf"))
    widget.minimum = least.minimum if least else limits[0]
    widget.maximum = most.maximum if most else limits[1]
    return _by_attribute(widget, "valueChanged", "value")


def _connect_choice(widget: Any, parameter: Parameter) -> Connector:
    if parameter.is_enum:
        label = getattr(parameter.type, "label", lambda member: member.name)
        choices = {label(member): member for member in parameter.type}
    elif parameter.note(Choice) is not None:
        choices = {str(each): each for each in parameter.note(Choice).choices}
    else:
        raise RuntimeError(f"{parameter.name}: a QComboBox needs the Choice annotation or an enum")
    widget.clear()
    widget.addItems(list(choices))
    values = list(choices.values())

    def write(value: Any) -> None:
        widget.currentIndex = values.index(value)

    return Connector("currentIndexChanged", lambda: values[widget.currentIndex], write, widget)


def _connect_text_edit(widget: Any, parameter: Parameter) -> Connector:
    def write(text: str) -> None:
        if widget.toPlainText() != text:  # setting it moves the cursor to the start
            widget.setPlainText(text)

    return Connector("textChanged", widget.toPlainText, write, widget)


def _connect_path(widget: Any, parameter: Parameter) -> Connector:
    def write(path: pathlib.Path) -> None:
        widget.currentPath = str(path)

    return Connector("currentPathChanged", lambda: parameter.type(widget.currentPath), write, widget)


def _connect_node(widget: Any, parameter: Parameter) -> Connector:
    widget.nodeTypes = [parameter.type.__name__]
    return Connector("currentNodeChanged", widget.currentNode, widget.setCurrentNode, widget)


def createGuiConnector(widget: Any, parameter: Parameter) -> Connector:
    """The connector of a widget's very class for a parameter's type."""
    kind = slicer.vtkMRMLNode if parameter.is_node else enum.Enum if parameter.is_enum else parameter.type
    known: dict[tuple[type, type], Callable[[Any, Parameter], Connector]] = {
        (qt.QCheckBox, bool): lambda box, _: _by_attribute(box, "stateChanged", "checked"),
        (qt.QPushButton, bool): _connect_button,
        (qt.QSlider, int): _connect_number,
        (qt.QSpinBox, int): _connect_number,
        (qt.QDoubleSpinBox, float): _connect_number,
        (ctk.ctkSliderWidget, float): _connect_number,
        (qt.QLineEdit, str): lambda edit, _: _by_attribute(edit, "textChanged", "text"),
        (qt.QTextEdit, str): _connect_text_edit,
        (ctk.ctkPathLineEdit, pathlib.Path): _connect_path,
        (slicer.qMRMLNodeComboBox, slicer.vtkMRMLNode): _connect_node,
        **{(qt.QComboBox, each): _connect_choice for each in (bool, int, float, str, enum.Enum)},
    }
    try:
        make = known[(type(widget), kind)]
    except KeyError:
        raise RuntimeError(
            f"no connector for '{parameter.name}', a {parameter.type.__name__}, to a {type(widget).__name__}"
        ) from None
    return make(widget, parameter)

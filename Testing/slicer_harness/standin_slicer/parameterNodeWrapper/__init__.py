"""Stands for slicer.parameterNodeWrapper: typed attributes over a real vtkMRMLScriptedModuleNode, bound to widgets.

Types: bool, int, float, str, pathlib.Path, enums, MRML nodes, and Optional of these. Scalars are stored as Slicer does:
SetParameter, bool as "True" or "False", an enum by its name, a node as a node reference. How Slicer stores an Optional
scalar was not looked up: None is an empty parameter here. Packs, lists, tuples and dicts are left out.

As in Slicer a connector wants the very class of the widget, a ctkSliderWidget wants a range, and a QComboBox wants
Choice or an enum.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import qt
import vtk

from .connectors import Connector, createGuiConnector
from .parameters import Parameter
from .validators import Choice, Decimals, Default, Exclude, Maximum, Minimum, SingleStep, Validator, WithinRange

__all__ = [
    "Choice",
    "Decimals",
    "Default",
    "Exclude",
    "Maximum",
    "Minimum",
    "SingleStep",
    "SlicerParameterNamePropertyName",
    "Validator",
    "WithinRange",
    "createGuiConnector",
    "findChildWidgetForParameter",
    "isParameterNodeWrapper",
    "parameterNodeWrapper",
]

SlicerParameterNamePropertyName = "SlicerParameterName"


class _Wrapper:
    """What the decorator gives a class; the names are Slicer's."""

    allParameters: dict[str, Parameter] = {}
    _is_parameter_node_wrapper = True

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        self._connections: dict[int, tuple[int, list[tuple[Parameter, Connector]]]] = {}
        self._updating = False
        for parameter in self.allParameters.values():
            if not parameter.is_in(parameterNode):
                parameter.write(parameterNode, parameter.default)

    def default(self, name: str) -> Default:
        return Default(self._parameter(name).default)

    def dataType(self, name: str) -> Any:
        return self._parameter(name).hint

    def getValue(self, name: str) -> Any:
        return self._parameter(name).read(self.parameterNode)

    def setValue(self, name: str, value: Any) -> None:
        self._parameter(name).write(self.parameterNode, value)

    def connectGui(self, gui: Any) -> None:
        """Binds the widgets that name a parameter: those below a widget, or the attributes of an object.

        As Slicer's it returns nothing, so that what it binds cannot be disconnected.
        """
        is_widget = getattr(gui, "isWidgetType", lambda: False)()
        widgets = gui.findChildren(qt.QWidget) if is_widget else list(vars(gui).values())
        named = ((widget.property(SlicerParameterNamePropertyName), widget) for widget in widgets)
        self.connectParametersToGui({name: widget for name, widget in named if name})

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        links = []
        for name, widget in mapping.items():
            parameter = self._parameter(name)
            connector = createGuiConnector(widget, parameter)
            connector.write(self.getValue(name))
            connector.connect(self._make_slot(parameter, connector))
            links.append((parameter, connector))
        tag = max(self._connections, default=0) + 1
        observer = self.parameterNode.AddObserver(vtk.vtkCommand.ModifiedEvent, self._update_gui)
        self._connections[tag] = (observer, links)
        return tag

    def disconnectGui(self, tag: int | None) -> None:
        if tag not in self._connections:
            return
        observer, links = self._connections.pop(tag)
        self.parameterNode.RemoveObserver(observer)
        for _parameter, connector in links:
            connector.disconnect()

    def AddObserver(self, event: Any, callback: Callable[..., Any], priority: float = 0.0) -> int:
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        self.parameterNode.RemoveObserver(tag)

    def StartModify(self) -> int:
        return self.parameterNode.StartModify()

    def EndModify(self, wasModified: int) -> int:
        return self.parameterNode.EndModify(wasModified)

    def Modified(self) -> None:
        self.parameterNode.Modified()

    def _parameter(self, name: str) -> Parameter:
        if name not in self.allParameters:
            raise ValueError(f"'{name}' is no parameter of {type(self).__name__}; those are {list(self.allParameters)}")
        return self.allParameters[name]

    def _make_slot(self, parameter: Parameter, connector: Connector) -> Callable[..., None]:
        def slot(*_value: Any) -> None:
            if not self._updating:
                parameter.write(self.parameterNode, connector.read())

        return slot

    def _update_gui(self, *_event: Any) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            for _observer, links in self._connections.values():
                for parameter, connector in links:
                    connector.write(parameter.read(self.parameterNode))
        finally:
            self._updating = False


def _make_property(parameter: Parameter) -> property:
    def get(self: Any) -> Any:
        return parameter.read(self.parameterNode)

    def put(self: Any, value: Any) -> None:
        parameter.write(self.parameterNode, value)

    return property(get, put)


def parameterNodeWrapper(classtype: type | None = None) -> Any:
    """Class decorator: annotated names become parameters, stored in the parameter node that the constructor gets."""
    if classtype is None:
        return parameterNodeWrapper
    hints = typing.get_type_hints(classtype, include_extras=True)
    parameters = {name: Parameter(name, hint, getattr(classtype, name, None)) for name, hint in hints.items()}
    reserved = [name for name in parameters if hasattr(_Wrapper, name)]
    if reserved:
        raise ValueError(f"names that the wrapper needs for itself: {reserved}")
    own = {name: _make_property(parameter) for name, parameter in parameters.items()}
    for name, member in vars(_Wrapper).items():
        if not (name.startswith("__") and name != "__init__"):
            setattr(classtype, name, member)
    for name, member in own.items():
        setattr(classtype, name, member)
    classtype.allParameters = parameters
    return classtype


def isParameterNodeWrapper(classOrObj: Any) -> bool:
    """Whether it, or its class, was decorated."""
    return getattr(classOrObj, "_is_parameter_node_wrapper", False)


def findChildWidgetForParameter(widget: Any, parameter: str) -> Any:
    """The widget below `widget` that names the parameter, or None."""
    children = widget.findChildren(qt.QWidget)
    return next((each for each in children if each.property(SlicerParameterNamePropertyName) == parameter), None)

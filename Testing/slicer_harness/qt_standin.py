"""Makes the module `qt` of PySide6, with PythonQt's access: properties are attributes, connect takes a signature.

Not PySide6's `__feature__.true_property`: that one removes setText(), isEnabled() and their like, which PythonQt keeps.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import shiboken6  # noqa: E402  the platform is chosen when Qt is imported
from PySide6 import QtCore, QtGui, QtWidgets  # noqa: E402

NAMES_OF_PYSIDE = ("Signal", "Slot", "Property")
ORGANISATION = "slicer-standin"
LOOK_ALIKES = (f"{__package__}.ctk_widgets", f"{__package__}.qmrml_widgets")


class PropertyAttribute:
    """A Qt property as an attribute: instance.text is its value, Class.text is still the method."""

    def __init__(self, name: str, writable: bool, method: Any, is_static: bool) -> None:
        self._name = name
        self._writable = writable
        self._method = method
        self._is_static = is_static  # QTimer.singleShot is a property and a static method

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self if self._method is None else self._method
        if self._method is not None and not self._is_static:
            # The getter, not instance.property(): that one asks an overridden getter, and would come back here.
            try:
                return self._method(instance)
            except TypeError:  # needs arguments, so it is no getter
                pass
        return QtCore.QObject.property(instance, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        if self._writable and QtCore.QObject.setProperty(instance, self._name, value):
            return
        setter = getattr(instance, f"set{self._name[0].upper()}{self._name[1:]}", None)
        if not self._writable or setter is None:
            raise AttributeError(
                f"property '{self._name}' of {type(instance).__name__} is read-only or does not accept {value!r}"
            )
        setter(value)  # PySide6 6.9 converts some enums only for this


def make_properties_attributes(cls: type) -> None:
    """Gives a class of Qt the properties that it adds to its parent's as attributes."""
    meta = getattr(cls, "staticMetaObject", None)
    if meta is None:
        return
    for i in range(meta.propertyCount()):
        name = meta.property(i).name()
        own = cls.__dict__.get(name)
        inherited = i < meta.propertyOffset() and own is None
        if inherited or isinstance(own, (property, PropertyAttribute, QtCore.Property)):
            continue
        method = getattr(cls, name) if own is not None else None
        is_static = isinstance(own, staticmethod)
        setattr(cls, name, PropertyAttribute(name, meta.property(i).isWritable(), method, is_static))


class _Connections:
    """object.connect("clicked(bool)", f) and disconnect: f gets the signature's arguments, as many as it takes."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, str], list[tuple[Callable[..., Any], Callable[..., Any]]]] = {}

    def connect(self, sender: Any, signal: str, slot: Any, method: Any = None) -> bool:
        text = str(signal).lstrip("2")  # PySide6's own QTimer.singleShot comes here as "2timeout()"
        name, _, types_ = text.partition("(")
        types_ = types_.rstrip(") ")
        if method is not None:  # connect(signal, receiver, "slot(bool)")
            slot = method if callable(method) else getattr(slot, str(method).lstrip("1").partition("(")[0])
        wrapped = _takes(types_.count(",") + 1 if types_ else 0, slot)
        bound = getattr(sender, name)
        (bound[types_] if _is_overloaded(bound, types_) else bound).connect(wrapped)
        self._made.setdefault((sender, text), []).append((slot, wrapped))
        return True

    def disconnect(self, sender: Any, signal: str, slot: Any = None) -> bool:
        made = self._made.pop((sender, str(signal)), [])
        kept = [pair for pair in made if slot is not None and pair[0] != slot]
        for _slot, wrapped in made:
            if all(wrapped is not pair[1] for pair in kept):
                getattr(sender, str(signal).partition("(")[0]).disconnect(wrapped)
        if kept:
            self._made[(sender, str(signal))] = kept
        return len(kept) < len(made)


def _is_overloaded(bound: Any, types_: str) -> bool:
    """Whether the signal exists once more with just these types, so that it has to be chosen: QComboBox.activated."""
    try:
        return bool(types_) and bound[types_] is not None
    except (IndexError, KeyError, TypeError):
        return False


def _takes(count: int, slot: Callable[..., Any]) -> Callable[..., Any]:
    """A function of exactly `count` arguments that hands `slot` as many of them as it takes."""
    accepted = count
    try:
        parameters = inspect.signature(slot).parameters.values()
    except (TypeError, ValueError):  # a function of C++
        parameters = ()
    else:
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            accepted = min(count, sum(parameter.kind in positional for parameter in parameters))

    receiver = getattr(slot, "__self__", None)

    def call(*arguments: Any) -> None:
        # A connection of Qt's ends with its receiver.
        if not isinstance(receiver, QtCore.QObject) or shiboken6.isValid(receiver):
            slot(*arguments[:accepted])

    # PySide6 counts the slot's arguments to choose what it sends.
    def none() -> None:
        call()

    def one(a: Any) -> None:
        call(a)

    def two(a: Any, b: Any) -> None:
        call(a, b)

    def three(a: Any, b: Any, c: Any) -> None:
        call(a, b, c)

    return (none, one, two, three)[count]


_connections = _Connections()


def _connect(self: Any, *arguments: Any) -> bool:
    if isinstance(arguments[0], QtCore.QObject):  # the static form: connect(sender, signal, receiver, slot)
        return _connections.connect(*arguments)
    return _connections.connect(self, *arguments)


def _disconnect(self: Any, *arguments: Any) -> bool:
    return _connections.disconnect(self, *arguments)


_METHODS = {"connect": _connect, "disconnect": _disconnect}
_generic_setattr = ctypes.pythonapi.PyObject_GenericSetAttr
_generic_setattr.argtypes = [ctypes.py_object] * 3


def _is_of_cpp(cls: type) -> bool:
    """Whether Slicer has this class from C++: Qt's own, and those that the look-alikes stand for."""
    return cls.__module__.startswith("PySide6.") or cls.__module__ in LOOK_ALIKES


def _is_child(value: Any, name: str) -> bool:
    """Whether QUiLoader offers a child under its name, as PythonQt does."""
    return isinstance(value, QtCore.QObject) and QtCore.QObject.property(value, "objectName") == name


def _strict_setattr(self: Any, name: str, value: Any) -> None:
    """PythonQt refuses attributes that a class of C++ does not have, so typing errors show; PySide6 takes them."""
    cls = type(self)
    known = inspect.getattr_static(cls, name, None)
    if isinstance(known, QtCore.Property) or name.encode() in [bytes(each) for each in self.dynamicPropertyNames()]:
        self.setProperty(name, value)
    elif known is None and _is_of_cpp(cls) and not name.startswith("_") and not _is_child(value, name):
        raise AttributeError(f"'{cls.__name__}' has no attribute '{name}' (PythonQt refuses this, too)")
    else:
        _generic_setattr(self, name, value)


def _teach_qobject() -> None:
    """What PythonQt adds to every object: name, className(), and connect with a signature."""
    qobject = QtCore.QObject
    original = qobject.__getattribute__

    def getattribute(self: Any, name: str) -> Any:
        # PySide6 resolves instance.connect in C++ before it looks at the class.
        return types.MethodType(_METHODS[name], self) if name in _METHODS else original(self, name)

    def get_name(self: Any) -> str:
        return qobject.property(self, "objectName")

    def set_name(self: Any, name: str) -> None:
        qobject.setProperty(self, "objectName", name)

    def class_name(self: Any) -> str:
        return self.metaObject().className()

    qobject.__getattribute__ = getattribute
    qobject.name = property(get_name, set_name)
    qobject.className = class_name


def use_settings_in(folder: Path) -> None:
    """qt.QSettings() opens a file in the folder from now on, and never the user's."""
    settings = QtCore.QSettings
    for scope in (settings.Scope.UserScope, settings.Scope.SystemScope):
        settings.setPath(settings.Format.IniFormat, scope, str(folder))
    settings.setDefaultFormat(settings.Format.IniFormat)
    QtCore.QCoreApplication.setOrganizationName(ORGANISATION)
    QtCore.QCoreApplication.setApplicationName("Slicer")


def install() -> Any:
    """Makes `import qt` work and returns the QApplication."""
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication([ORGANISATION])
    qt = types.ModuleType("qt", "PySide6 with PythonQt's way of access.")
    for module in (QtCore, QtGui, QtWidgets):
        for name in dir(module):
            if not name.startswith("_"):
                setattr(qt, name, getattr(module, name))
    for name in NAMES_OF_PYSIDE:
        setattr(qt, name, getattr(QtCore, name))
    for name in dir(qt):
        cls = getattr(qt, name)
        if isinstance(cls, type) and issubclass(cls, QtCore.QObject):
            make_properties_attributes(cls)
            cls.__setattr__ = _strict_setattr
    _teach_qobject()
    sys.modules["qt"] = qt
    return application

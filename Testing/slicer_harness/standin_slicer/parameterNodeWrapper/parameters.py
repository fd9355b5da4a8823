"""A parameter: its type, its rules, and how the parameter node keeps it."""

from __future__ import annotations

import enum
import pathlib
import types
import typing
from typing import Any

import slicer

from .validators import Default, Validator


class Parameter:
    """One typed attribute: how it is checked, stored and read."""

    def __init__(self, name: str, hint: Any, default: Any) -> None:
        self.name = name
        self.hint = hint
        self.type, self.notes = _split(hint)
        self.optional = False
        if typing.get_origin(self.type) in (typing.Union, types.UnionType):
            members = [each for each in typing.get_args(self.type) if each is not type(None)]
            if len(members) != 1:
                raise TypeError(f"{name}: the stand-in knows Optional, but no other union: {hint}")
            self.type = members[0]
            self.optional = True
        self.is_node = isinstance(self.type, type) and issubclass(self.type, slicer.vtkMRMLNode)
        self.is_enum = isinstance(self.type, type) and issubclass(self.type, enum.Enum)
        if not (self.is_node or self.is_enum or self.type in (bool, int, float, str, pathlib.Path)):
            raise TypeError(f"{name}: the stand-in does not know the type {hint}")
        self.default = self._choose_default(default)

    def note(self, kind: type) -> Any:
        """The first annotation of that kind, or None."""
        return next((each for each in self.notes if isinstance(each, kind)), None)

    def _choose_default(self, default: Any) -> Any:
        if default is not None:
            return default
        annotated = self.note(Default)
        if annotated is not None:
            return annotated.value
        if self.is_node or self.optional:
            return None
        return next(iter(self.type)) if self.is_enum else self.type()

    def check(self, value: Any) -> None:
        if value is None and not (self.is_node or self.optional):
            raise ValueError(f"{self.name} must not be None")
        accepted = (int, float) if self.type is float else self.type
        if value is not None and not isinstance(value, accepted):
            raise TypeError(f"{self.name} must be {self.type.__name__}, not {value!r}")
        for rule in self.notes:
            if isinstance(rule, Validator):
                rule.validate(value)

    def is_in(self, node: Any) -> bool:
        return self.name in node.GetParameterNames()

    def write(self, node: Any, value: Any) -> None:
        self.check(value)
        if self.is_node:
            node.SetParameter(self.name, "")  # says that there is a value, which may be None
            node.SetNodeReferenceID(self.name, value.GetID() if value is not None else None)
        elif value is None:
            node.SetParameter(self.name, "")
        else:
            node.SetParameter(self.name, value.name if self.is_enum else str(value))

    def read(self, node: Any) -> Any:
        if self.is_node:
            return node.GetNodeReference(self.name)
        text = node.GetParameter(self.name)
        if self.optional and text == "":
            return None
        if self.type is bool:
            return text == "True"
        return self.type[text] if self.is_enum else self.type(text)


def _split(hint: Any) -> tuple[Any, list[Any]]:
    """The type and its annotations."""
    if typing.get_origin(hint) is typing.Annotated:
        type_, *notes = typing.get_args(hint)
        return type_, notes
    return hint, []

"""What may stand beside a type in Annotated[...]."""

from __future__ import annotations

import dataclasses
from typing import Any


class Validator:
    """A rule for the values of a parameter."""

    def validate(self, value: Any) -> None:
        """Raises ValueError for a value that breaks the rule."""
        raise NotImplementedError


@dataclasses.dataclass
class WithinRange(Validator):
    """Both ends belong to the range."""

    minimum: float
    maximum: float

    def validate(self, value: Any) -> None:
        _require(value is None or self.minimum <= value <= self.maximum, value, self)


@dataclasses.dataclass
class Minimum(Validator):
    """The least value allowed."""

    minimum: float

    def validate(self, value: Any) -> None:
        _require(value is None or value >= self.minimum, value, self)


@dataclasses.dataclass
class Maximum(Validator):
    """The greatest value allowed."""

    maximum: float

    def validate(self, value: Any) -> None:
        _require(value is None or value <= self.maximum, value, self)


@dataclasses.dataclass
class Choice(Validator):
    """One of these."""

    choices: list[Any]

    def validate(self, value: Any) -> None:
        _require(value in self.choices, value, self)


@dataclasses.dataclass
class Exclude(Validator):
    """None of these."""

    excludedValues: list[Any]

    def validate(self, value: Any) -> None:
        _require(value not in self.excludedValues, value, self)


@dataclasses.dataclass
class Default:
    """The value of a new parameter node."""

    value: Any


@dataclasses.dataclass
class Decimals:
    """Of the spin box or slider."""

    value: int


@dataclasses.dataclass
class SingleStep:
    """Of the spin box or slider."""

    value: float


def _require(fits: bool, value: Any, rule: Validator) -> None:
    if not fits:
        raise ValueError(f"{value!r} breaks {rule}")

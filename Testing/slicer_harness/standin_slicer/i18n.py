"""Stands for slicer.i18n: no translation."""

from __future__ import annotations


def tr(text: str) -> str:
    """The text itself; a translation would be chosen by the module that calls."""
    return text


def translate(context: str, text: str) -> str:
    """The text itself."""
    return text

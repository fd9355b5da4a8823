"""Catches what VTK and MRML say on their output window, so that a test can assert that they said nothing."""

from __future__ import annotations

import re

import vtk

_NEXT_MESSAGE = re.compile(r"(?=^(?:ERROR|Warning|Generic Warning): )", re.MULTILINE)


class VtkMessages:
    """Errors and warnings since the start, or since they were last taken.

    Use as a context manager, or with start() and stop(). VTK's own log on stderr goes on beside it.
    """

    def __init__(self) -> None:
        self._window = vtk.vtkStringOutputWindow()
        self._before: vtk.vtkOutputWindow | None = None
        self._taken = 0

    def start(self) -> VtkMessages:
        """Replaces VTK's output window."""
        self._before = vtk.vtkOutputWindow.GetInstance()
        vtk.vtkOutputWindow.SetInstance(self._window)
        return self

    def stop(self) -> None:
        """Gives VTK the output window back that it had."""
        vtk.vtkOutputWindow.SetInstance(self._before)

    def __enter__(self) -> VtkMessages:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def messages(self) -> list[str]:
        """Everything said, one string per message, oldest first."""
        said = (self._window.GetOutput() or "")[self._taken :]
        return [part.strip() for part in _NEXT_MESSAGE.split(said) if part.strip()]

    def errors(self) -> list[str]:
        """The messages that are errors."""
        return [message for message in self.messages() if message.startswith("ERROR:")]

    def warnings(self) -> list[str]:
        """The messages that are not errors."""
        return [message for message in self.messages() if not message.startswith("ERROR:")]

    def take(self) -> list[str]:
        """Everything said so far, which is forgotten: for a test that provokes an error."""
        said = self.messages()
        self._taken = len(self._window.GetOutput() or "")
        return said

    def check(self) -> None:
        """Raises AssertionError when VTK has reported an error."""
        errors = self.errors()
        if errors:
            raise AssertionError("VTK reported:\n" + "\n".join(errors))

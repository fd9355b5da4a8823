"""Modal dialogs never block here: what they said is recorded, and the test answers beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from PySide6 import QtWidgets

BUTTONS = QtWidgets.QMessageBox.StandardButton
# What closing a box means; only a box without a choice may be answered without the test.
REFUSALS = (BUTTONS.Cancel, BUTTONS.No, BUTTONS.Close, BUTTONS.Abort)
HARMLESS = (BUTTONS.Ok, BUTTONS.Close)

Answer = str | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Shown:
    """A dialog that was shown."""

    kind: str  # its class, or the function that showed it
    title: str
    text: str
    details: str = ""
    buttons: tuple[str, ...] = ()

    def says(self, words: str) -> bool:
        """Whether the words stand in the title, the text or the details, in whatever case."""
        return words.lower() in f"{self.title}\n{self.text}\n{self.details}".lower()


@dataclasses.dataclass
class Dialogs:
    """What was shown, and the answers that are to be given."""

    shown: list[Shown] = dataclasses.field(default_factory=list)
    unexpected: list[Shown] = dataclasses.field(default_factory=list)
    _answers: list[tuple[str, Answer]] = dataclasses.field(default_factory=list)

    def answer(self, words: str, answer: Answer) -> None:
        """Answers the next dialog that says these words.

        A message box takes the name of a button, "Ok" or "Yes"; a menu takes the text of an action; a file dialog takes
        a path, "" for Cancel. Any dialog takes a function, which gets the dialog (the title, where a static function
        shows it), may work its widgets, and returns the result.
        """
        self._answers.append((words, answer))

    @property
    def unused(self) -> list[str]:
        """The words of answers that no dialog asked for."""
        return [words for words, _answer in self._answers]

    @property
    def texts(self) -> list[str]:
        """The texts of the dialogs shown, oldest first."""
        return [each.text for each in self.shown]

    def clear(self) -> None:
        """Forgets all: between tests."""
        self.shown.clear()
        self.unexpected.clear()
        self._answers.clear()

    def check(self) -> None:
        """Raises AssertionError for questions that the test did not answer, and answers that no dialog asked for."""
        if self.unexpected:
            asked = "\n".join(f"{each.kind} '{each.title}': {each.text}" for each in self.unexpected)
            raise AssertionError(f"questions without an answer in the test (dialogs.answer):\n{asked}")
        if self.unused:
            raise AssertionError(f"no dialog said {self.unused}; shown were {self.shown}")

    def show(self, shown: Shown) -> Answer | None:
        """Records a dialog and returns its answer, None if the test has none."""
        self.shown.append(shown)
        for i, (words, answer) in enumerate(self._answers):
            if shown.says(words):
                del self._answers[i]
                return answer
        return None


DIALOGS = Dialogs()


def _value(widget: Any, name: str) -> Any:
    return QtWidgets.QWidget.property(widget, name)


def _standard_button(name: str) -> Any:
    try:
        return BUTTONS[name]
    except KeyError:
        raise AssertionError(f"'{name}' is no standard button; one of {[each.name for each in BUTTONS]}") from None


def _answer_box(shown: Shown, offered: list[Any], box: Any) -> Any:
    """The standard button that the test, or failing that the box itself, chooses."""
    answer = DIALOGS.show(shown)
    if callable(answer):
        return answer(box)
    if answer is not None:
        chosen = _standard_button(answer)
        if chosen not in offered:
            raise AssertionError(f"'{shown.text}' offers {shown.buttons}, not '{answer}'")
        return chosen
    if len(offered) == 1 and offered[0] in HARMLESS:
        return offered[0]
    DIALOGS.unexpected.append(shown)
    return next((button for button in REFUSALS if button in offered), BUTTONS.NoButton)


def _exec_message_box(box: Any) -> Any:
    offered = [button for button in BUTTONS if button != BUTTONS.NoButton and box.button(button) is not None]
    offered = offered or [BUTTONS.Ok]  # as Qt adds it to a box without buttons
    shown = Shown(
        kind=type(box).__name__,
        title=_value(box, "windowTitle").strip(),
        text="\n".join(filter(None, (_value(box, "text"), _value(box, "informativeText")))),
        details=_value(box, "detailedText") or "",
        buttons=tuple(button.name for button in offered),
    )
    return _answer_box(shown, offered, box)


def _exec_dialog(dialog: Any) -> Any:
    if isinstance(dialog, QtWidgets.QMessageBox):
        return _exec_message_box(dialog)
    labels = [_value(label, "text") for label in QtWidgets.QWidget.findChildren(dialog, QtWidgets.QLabel)]
    shown = Shown(type(dialog).__name__, _value(dialog, "windowTitle"), "\n".join(filter(None, labels)))
    answer = DIALOGS.show(shown)
    if callable(answer):
        result = answer(dialog)
        return QtWidgets.QDialog.result(dialog) if result is None else result
    if answer is not None:
        accepted = {"Ok": 1, "Cancel": 0}
        if answer not in accepted:
            raise AssertionError(f"a {shown.kind} is answered by 'Ok', 'Cancel' or a function, not by '{answer}'")
        QtWidgets.QDialog.done(dialog, accepted[answer])
        return accepted[answer]
    if QtWidgets.QWidget.findChildren(dialog, QtWidgets.QAbstractButton):
        DIALOGS.unexpected.append(shown)
    return 0


def _exec_menu(menu: Any, *arguments: Any) -> Any:
    actions = [action for action in QtWidgets.QMenu.actions(menu) if _text(action)]
    shown = Shown(type(menu).__name__, _value(menu, "title"), "\n".join(map(_text, actions)))
    answer = DIALOGS.show(shown)
    chosen = next((action for action in actions if _text(action) == answer), None)
    if answer is not None and chosen is None:
        raise AssertionError(f"the menu has {shown.text.splitlines()}, not '{answer}'")
    if chosen is not None:
        chosen.trigger()
    return chosen


def _text(action: Any) -> str:
    return (action.property("text") or "").replace("&", "")


def _box_function(name: str) -> Callable[..., Any]:
    """Stands for QMessageBox.question and its like."""
    usual = [BUTTONS.Yes, BUTTONS.No] if name == "question" else [BUTTONS.Ok]

    def show(parent: Any, title: str, text: str, buttons: Any = None, default: Any = None) -> Any:
        offered = usual if buttons is None else [each for each in BUTTONS if each in buttons and each.value]
        return _answer_box(Shown(name, title, text, buttons=tuple(each.name for each in offered)), offered, title)

    return show


def _file_function(name: str) -> Callable[..., Any]:
    """Stands for QFileDialog.getOpenFileName and its like. PythonQt returns the path, PySide6 also the filter."""

    def show(parent: Any = None, caption: str = "", folder: str = "", *filters: Any, **options: Any) -> Any:
        shown = Shown(name, caption, folder)
        answer = DIALOGS.show(shown)
        if answer is None:
            DIALOGS.unexpected.append(shown)
            answer = ""
        path = answer(caption) if callable(answer) else answer
        if name != "getOpenFileNames":
            return path
        return [path] if path and isinstance(path, str) else list(path)

    return show


def _refuse_input_dialog(*arguments: Any, **options: Any) -> None:
    raise NotImplementedError("QInputDialog's functions are not in the stand-in: PythonQt's return value is unverified")


def install() -> None:
    """Takes exec_() and the static functions of dialogs and menus over, in the `qt` module and in PySide6."""
    for dialog in (QtWidgets.QDialog, QtWidgets.QMessageBox, QtWidgets.QFileDialog, QtWidgets.QProgressDialog):
        dialog.exec_ = dialog.exec = _exec_dialog
    QtWidgets.QMenu.exec_ = QtWidgets.QMenu.exec = _exec_menu
    for name in ("question", "information", "warning", "critical"):
        setattr(QtWidgets.QMessageBox, name, staticmethod(_box_function(name)))
    for name in ("getOpenFileName", "getOpenFileNames", "getSaveFileName", "getExistingDirectory"):
        setattr(QtWidgets.QFileDialog, name, staticmethod(_file_function(name)))
    for name in ("getText", "getItem", "getInt", "getDouble", "getMultiLineText"):
        setattr(QtWidgets.QInputDialog, name, staticmethod(_refuse_input_dialog))

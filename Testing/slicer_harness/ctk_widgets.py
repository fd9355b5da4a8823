"""Look-alikes of the CTK widgets that the panel uses. Their layout is no evidence about Slicer's.

They have the properties, slots and signals of the real ones (as far as needed) and no other public names.
"""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtGui, QtWidgets

from .widget_parts import lay_out_in_a_row, of_part, stored

HEADER_HEIGHT = 20
HEADER_COLOUR = (205, 210, 220)
SLIDER_STEPS = 1000


class ctkCollapsibleButton(QtWidgets.QAbstractButton):
    """A titled section that folds: checked is the opposite of collapsed."""

    contentsCollapsed = QtCore.Signal(bool)
    collapsedHeight = stored(int, "collapsedHeight", HEADER_HEIGHT)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*[each for each in arguments if not isinstance(each, str)])
        self._collapsed = False
        self._folded: list[Any] = []
        self.setCheckable(True)
        self.setChecked(True)
        self.setText(next((each for each in arguments if isinstance(each, str)), ""))
        self.setContentsMargins(0, HEADER_HEIGHT, 0, 0)
        self.toggled.connect(self._toggle)

    def sizeHint(self) -> Any:
        layout = QtWidgets.QWidget.layout(self)
        inside = layout.sizeHint() if layout is not None and not self._collapsed else QtCore.QSize(0, 0)
        return QtCore.QSize(inside.width(), max(HEADER_HEIGHT, inside.height()))

    def minimumSizeHint(self) -> Any:
        layout = QtWidgets.QWidget.layout(self)
        inside = layout.minimumSize() if layout is not None and not self._collapsed else QtCore.QSize(0, 0)
        return QtCore.QSize(inside.width(), max(HEADER_HEIGHT, inside.height()))

    def hitButton(self, position: Any) -> bool:
        return position.y() < HEADER_HEIGHT

    def paintEvent(self, event: Any) -> None:
        painter = QtGui.QPainter(self)
        header = QtCore.QRect(0, 0, self.geometry.width(), HEADER_HEIGHT)
        painter.fillRect(header, QtGui.QColor(*HEADER_COLOUR))
        mark = "▸" if self._collapsed else "▾"
        painter.drawText(header.adjusted(6, 0, 0, 0), QtCore.Qt.AlignmentFlag.AlignVCenter, f"{mark} {self.text}")
        painter.end()

    def _toggle(self, checked: bool) -> None:
        self._set_collapsed(not checked)

    def showEvent(self, event: Any) -> None:
        """What a .ui file puts into a collapsed section comes after it was collapsed."""
        super().showEvent(event)
        if self._collapsed:
            self._fold()

    def _fold(self) -> None:
        """Hides what is shown, and shows again what was hidden here: a module's own hidden widgets stay so."""
        policy = QtWidgets.QSizePolicy.Policy
        self.setSizePolicy(policy.Preferred, policy.Fixed if self._collapsed else policy.Preferred)
        direct = QtCore.Qt.FindChildOption.FindDirectChildrenOnly
        if self._collapsed:
            shown = [c for c in self.findChildren(QtWidgets.QWidget, options=direct) if not c.isHidden()]
            self._folded += shown
        for child in self._folded:
            child.setVisible(not self._collapsed)
        if not self._collapsed:
            self._folded = []

    def _get_collapsed(self) -> bool:
        return self._collapsed

    def _set_collapsed(self, collapsed: bool) -> None:
        if bool(collapsed) == self._collapsed:
            return
        self._collapsed = bool(collapsed)
        self.setChecked(not collapsed)
        self._fold()
        self.updateGeometry()
        self.update()
        self.contentsCollapsed.emit(self._collapsed)

    collapsed = QtCore.Property(bool, _get_collapsed, _set_collapsed)


class ctkSliderWidget(QtWidgets.QWidget):
    """A slider and a spin box with the same value, which is a float."""

    valueChanged = QtCore.Signal(float)
    valueIsChanging = QtCore.Signal(float)
    tracking = stored(bool, "tracking", True)
    pageStep = stored(float, "pageStep", 10.0)
    tickInterval = stored(float, "tickInterval", 0.0)
    spinBoxVisible = stored(bool, "spinBoxVisible", True)
    value = of_part(float, "_box", "value")
    minimum = of_part(float, "_box", "minimum")
    maximum = of_part(float, "_box", "maximum")
    singleStep = of_part(float, "_box", "singleStep")
    decimals = of_part(int, "_box", "decimals")
    prefix = of_part(str, "_box", "prefix")
    suffix = of_part(str, "_box", "suffix")

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._slider = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal)
        self._slider.setRange(0, SLIDER_STEPS)
        self._box = QtWidgets.QDoubleSpinBox()
        self._box.setRange(0, 100)
        lay_out_in_a_row(self, self._slider, self._box)
        self._slider.valueChanged.connect(self._slid)
        self._box.valueChanged.connect(self._typed)

    def setValue(self, value: float) -> None:
        self._box.setValue(value)

    def reset(self) -> None:
        self._box.setValue(0.0)

    def _slid(self, step: int) -> None:
        self._box.setValue(self.minimum + step / SLIDER_STEPS * (self.maximum - self.minimum))

    def _typed(self, value: float) -> None:
        width = self.maximum - self.minimum
        self._slider.blockSignals(True)
        self._slider.setValue(round(SLIDER_STEPS * (value - self.minimum) / width) if width else 0)
        self._slider.blockSignals(False)
        self.valueIsChanging.emit(value)
        self.valueChanged.emit(value)


class ctkPathLineEdit(QtWidgets.QWidget):
    """A path that can be typed or browsed for."""

    Dirs = 0x001
    Files = 0x002
    Readable = 0x010
    Writable = 0x020

    currentPathChanged = QtCore.Signal(str)
    validInputChanged = QtCore.Signal(bool)
    currentPath = of_part(str, "_edit", "text")
    filters = stored(int, "filters", Files)
    label = stored(str, "label", "")
    nameFilters = stored("QStringList", "nameFilters", [])
    settingKey = stored(str, "settingKey", "")
    showBrowseButton = stored(bool, "showBrowseButton", True)
    showHistoryButton = stored(bool, "showHistoryButton", True)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._edit = QtWidgets.QLineEdit()
        self._button = QtWidgets.QToolButton()
        self._button.setText("...")
        lay_out_in_a_row(self, self._edit, self._button)
        self._edit.textChanged.connect(self.currentPathChanged)
        self._button.clicked.connect(self.browse)

    def setCurrentPath(self, path: str) -> None:
        self._edit.setText(path)

    def addCurrentPathToHistory(self) -> None:
        """The history is not shown here."""

    def browse(self, *_checked: bool) -> None:
        choose = QtWidgets.QFileDialog
        ask = choose.getExistingDirectory if self.filters & self.Dirs else choose.getOpenFileName
        path = ask(self, self.label, self.currentPath)
        if path:
            self.setCurrentPath(path)


class ctkMessageBox(QtWidgets.QMessageBox):
    """What slicer.util.messageBox shows."""

    dontShowAgainVisible = stored(bool, "dontShowAgainVisible", False)
    dontShowAgainSettingsKey = stored(str, "dontShowAgainSettingsKey", "")

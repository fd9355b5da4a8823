"""The findings table and the rationale chain: what stands in them, and what is selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import qt
from slicer.i18n import tr as _

from MedRationaleSlicer.nodes import COLUMNS

if TYPE_CHECKING:
    from MedRationaleLib.assessment import Finding, RationaleStep

SHOWN_DIGITS = {"size_mm": 1, "volume_ml": 2, "likelihood": 2}
NODE_ROLE = 0x0100  # Qt::UserRole
TAKEN, CHANGED, DOUBTFUL, GREY = "#0072b2", "#a83279", "#c14a00", "#5b6470"
"""Colours of answers: the model's or measured, the reader's, contradicted; and of what was not answered."""


def sources() -> dict[str, str]:
    """Who answered, in words."""
    return {"model": _("model"), "measured": _("measured"), "reader": _("reader")}


class FindingsTable:
    """A QTableWidget with a row a finding."""

    def __init__(self, table: Any, selected: Callable[[str], None]) -> None:
        self._table, self._selected, self._ids = table, selected, []
        table.setColumnCount(len(COLUMNS))
        table.setHorizontalHeaderLabels(list(COLUMNS.values()))
        table.verticalHeader().setVisible(False)
        table.connect("itemSelectionChanged()", self._on_selection)

    def show(self, findings: tuple[Finding, ...], chosen: str) -> None:
        """Fill it, and mark the row of `chosen`."""
        self._table.blockSignals(True)
        self._ids = [finding.id for finding in findings]
        self._table.setRowCount(len(findings))
        for row, finding in enumerate(findings):
            for column, key in enumerate(COLUMNS):
                value = getattr(finding, key)
                digits = SHOWN_DIGITS.get(key)
                text = "–" if value is None else str(value) if digits is None else f"{value:.{digits}f}"
                if key == "pirads":
                    text = finding.category_in_words
                elif key == "dwi_score":
                    text = finding.dwi_in_words
                item = qt.QTableWidgetItem(text)
                item.setToolTip(text)
                self._table.setItem(row, column, item)
        _fit(self._table.horizontalHeader(), elided=len(COLUMNS) - 1)
        if chosen in self._ids:
            self._table.selectRow(self._ids.index(chosen))
        else:
            self._table.clearSelection()
        self._table.blockSignals(False)

    def _on_selection(self) -> None:
        row = self._table.currentRow()
        if 0 <= row < len(self._ids):
            self._selected(self._ids[row])


class RationaleChain:
    """A QTreeView: the steps of one finding's path, under each the answers that were less similar."""

    def __init__(self, view: Any, selected: Callable[[str], None]) -> None:
        self._view, self._selected, self._filling = view, selected, False
        self._model = qt.QStandardItemModel()
        view.setModel(self._model)
        view.selectionModel().connect("currentChanged(QModelIndex,QModelIndex)", self._on_current)

    def show(self, finding: Finding | None, tree: Any, chosen: str) -> None:
        """The path of `finding` through the DecisionTree `tree`, with the step of the node `chosen` marked."""
        self._filling = True
        self._model.clear()
        self._model.setHorizontalHeaderLabels([_("Step"), _("Answer"), _("Similarity"), _("Source")])
        questions = [step for step in finding.rationale if step.node in tree.nodes] if finding else []
        for number, step in enumerate(questions, start=1):
            row = self._row(number, step, tree, _contradicted(finding, tree, step))
            self._model.appendRow(row)
            for other in step.runners_up:
                text = tree.bank[other.concept].text if other.concept in tree.bank else other.concept
                row[0].appendRow(_items(["", text, _similarity(other.similarity), ""], GREY, step.node))
            if step.node == chosen:
                self._view.setCurrentIndex(row[0].index())
        _fit(self._view.header(), elided=1)
        self._filling = False

    def _row(self, number: int, step: RationaleStep, tree: Any, contradiction: str | None) -> list[Any]:
        given = step.source == "reader" and step.concept != tree.nodes[step.node].default
        color = CHANGED if step.overridden or given else DOUBTFUL if contradiction else TAKEN
        answer = f"⚠ {step.text}" if contradiction else step.text
        answer = f"{answer} ({step.measurement})" if step.measurement else answer
        source = sources()[step.source] if step.source != "reader" or step.overridden or given else _("not given")
        name = f"{number}. {in_words(step.node)}"
        items = _items([name, answer, _similarity(step.similarity), source], color, step.node)
        told = [tree.nodes[step.node].question, answer, *([contradiction] if contradiction else [])]
        if step.overridden:
            before = tree.bank[step.overridden].text if step.overridden in tree.bank else step.overridden
            told.append(_("The model said: {before}.").format(before=before))
        if step.weakened_by:
            told.append(_("Weaker: {missing} missing here.").format(missing=", ".join(step.weakened_by).upper()))
        for item in items:
            item.setToolTip("\n".join(told))
        return items

    def _on_current(self, index: Any, _before: Any) -> None:
        node = self._model.data(index, NODE_ROLE) if not self._filling else None
        if node:
            self._selected(str(node))


def _fit(header: Any, elided: int) -> None:
    """All columns within the width of the panel: one gives way, whose text is in the tooltip."""
    header.setStretchLastSection(False)
    for column in range(header.count()):
        mode = qt.QHeaderView.Stretch if column == elided else qt.QHeaderView.ResizeToContents
        header.setSectionResizeMode(column, mode)


def _items(texts: list[str], color: str, node: str) -> list[Any]:
    items = [qt.QStandardItem(text) for text in texts]
    for column, item in enumerate(items):
        item.setData(node, NODE_ROLE)
        if column or color == GREY:
            item.setForeground(qt.QBrush(qt.QColor(color)))
    return items


def in_words(node: str) -> str:
    """ "adc_signal" -> "ADC signal"."""
    words = (word.upper() if word in ("adc", "dwi", "t2w", "dce", "epe") else word for word in node.split("_"))
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def _similarity(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _contradicted(finding: Finding, tree: Any, step: RationaleStep) -> str | None:
    """The sentence that contradicts this step's answer; each begins with the question."""
    question = tree.nodes[step.node].question
    return next((sentence for sentence in finding.contradictions if sentence.startswith(question)), None)

"""What the panel shows below Apply: findings, the rationale chain, heatmaps, and the reader's own answers."""

from __future__ import annotations

from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from MedRationaleSlicer import installation, views
from MedRationaleSlicer.nodes import ROLE
from MedRationaleSlicer.rationale_view import FindingsTable, RationaleChain
from MedRationaleSlicer.results import Results

FAINTEST = 0.02
"""Heat that is drawn in the brightest colour at least, as in the report: less is next to nothing."""


class ResultsPanel:
    """The lower half of the panel, as the parameter node says: its results, finding, step and heatmap settings."""

    def __init__(self, ui: Any) -> None:
        self.ui = ui
        self._parameterNode: Any = None
        self._shown: tuple[str, ...] = ()
        self.findings = FindingsTable(ui.findingsTable, self.onFindingSelected)
        self.chain = RationaleChain(ui.rationaleTree, self.onStepSelected)
        ui.resultsSelector.addAttribute("vtkMRMLTextNode", ROLE, "assessment")
        ui.resultsSelector.connect("nodeActivated(vtkMRMLNode*)", self.onResultsSelected)
        ui.undoButton.connect("clicked(bool)", self.onUndo)
        ui.show3DCheckBox.connect("toggled(bool)", self.onShow3D)
        ui.answerComboBox.connect("activated(int)", self.onAnswer)

    def setParameterNode(self, node: Any) -> None:
        """Show another state, None for none; refresh() follows."""
        self._parameterNode, self._shown = node, ()

    def refresh(self, again: bool = False) -> None:
        """Show what the parameter node says; `again` also where it says what it said before."""
        node = self._parameterNode
        state = (node.results.GetID() if node.results else "", node.finding, node.step) if node is not None else ()
        if again or not state or state != self._shown:
            self._shown = state
            self._show()
        self._showHeatmap()

    @property
    def current(self) -> Results | None:
        """What is shown."""
        node = self._parameterNode.results if self._parameterNode is not None else None
        if node is None or not node.GetNodeReference("MedRationale.record"):
            return None
        try:
            results = Results(node)
            findings = results.data["findings"]
        except (ValueError, KeyError, TypeError):
            self.ui.statusLabel.text = _("The assessment in the scene cannot be read any more; run it again.")
            return None
        return results if isinstance(findings, list) else None

    def _show(self) -> None:
        """Everything below Apply, from the results."""
        results, node = self.current, self._parameterNode
        needed = installation.missing() if results is not None else []
        self.ui.installButton.setVisible(bool(needed))
        if needed:
            self.ui.statusLabel.text = _("The scene holds an assessment; to show it, Python packages are needed.")
            results = None
        findings = results.findings if results is not None else ()
        chosen = next((finding for finding in findings if finding.id == node.finding), None)
        tree = results.tree() if results is not None else None
        self.findings.show(findings, node.finding if node is not None else "")
        self.chain.show(chosen, tree, node.step if node is not None else "")
        self.ui.exportButton.enabled = results is not None
        self.ui.show3DCheckBox.enabled = results is not None
        self._showAlone(results)
        self.ui.undoButton.enabled = results is not None and bool(results.overrides)
        data = results.data if results is not None else None
        self.ui.volumesLabel.text = _volumes(data) if data else ""
        notes = dict.fromkeys((*data["study"]["warnings"], *data["warnings"])) if data else {}
        below = [results.not_shown()] if results is not None and results.not_shown() else []
        self.ui.warningsLabel.text = "\n".join([*(f"⚠ {note}" for note in notes), *below])
        self.ui.findingLabel.text = _heading(chosen) if chosen is not None else ""
        self.ui.contradictionsLabel.text = (
            "\n".join(f"⚠ {text}" for text in chosen.contradictions) if chosen is not None else ""
        )
        self._showAnswers(chosen, tree)

    def _showAlone(self, results: Results | None) -> None:
        """The outlines of what is shown, and not of another run on the same slices."""
        if results is None:
            return
        for other in Results.in_scene():
            display = other.segmentation.GetDisplayNode() if other.segmentation is not None else None
            if display is not None:
                display.SetVisibility(other.node is results.node)
        display = results.segmentation.GetDisplayNode() if results.segmentation is not None else None
        self.ui.show3DCheckBox.blockSignals(True)
        self.ui.show3DCheckBox.checked = bool(
            display is not None
            and display.GetVisibility3D()
            and results.segmentation.GetSegmentation().ContainsRepresentation("Closed surface")
        )
        self.ui.show3DCheckBox.blockSignals(False)

    def _showAnswers(self, finding: Any, tree: Any) -> None:
        """The question of the selected step, and its possible answers."""
        box = self.ui.answerComboBox
        box.clear()
        step = next((s for s in finding.rationale if s.node == self._parameterNode.step), None) if finding else None
        box.enabled = step is not None and step.node in tree.nodes
        self.ui.questionLabel.text = tree.nodes[step.node].question if box.enabled else _("Select a step.")
        if not box.enabled:
            return
        for concept in tree.nodes[step.node].candidates(None if step.node == "zone" else finding.zone):
            box.addItem(tree.bank[concept].text, concept)
        box.setCurrentIndex(box.findData(step.concept))

    def onResultsSelected(self, node: Any) -> None:
        """The user chose an assessment."""
        self.ui.statusLabel.text = ""
        self.open(node)

    def open(self, node: Any) -> None:
        """Show an assessment: its T2W, and its first finding; None for none."""
        results = Results(node) if node is not None else None
        findings = results.data["findings"] if results is not None else ()
        self._parameterNode.results, self._parameterNode.step = node, ""
        self._parameterNode.finding = findings[0]["id"] if findings else ""
        if results is not None and results.input("t2w") is not None:
            views.show(results.input("t2w"))
            views.align(results.input("t2w"))
        if findings:
            self.onFindingSelected(self._parameterNode.finding)

    def onFindingSelected(self, finding: str) -> None:
        """Jump to a lesion and outline it."""
        results = self.current
        self._parameterNode.finding, self._parameterNode.step = finding, ""
        if results is None:
            return
        results.emphasise(finding)
        center = next(row["center_mm"] for row in results.data["findings"] if row["id"] == finding)
        views.show(results.input("t2w"))
        views.jump(results.world((-center[0], -center[1], center[2])))

    def onStepSelected(self, step: str) -> None:
        """Show where an answer comes from: its heatmap over the sequence that it is about, at its hottest slice."""
        self._parameterNode.step = step
        results = self.current
        if results is None:
            return
        chosen = self._step(results)
        hottest = results.hottest(chosen.evidence, self._parameterNode.finding) if chosen else None
        if hottest is not None and hottest.in_lesion > 0:
            views.jump(hottest.ras)

    def _step(self, results: Results) -> Any:
        node = self._parameterNode
        finding = next((f for f in results.findings if f.id == node.finding), None)
        return next((s for s in finding.rationale if s.node == node.step), None) if finding else None

    def _showHeatmap(self) -> None:
        """Heatmap, opacity and threshold in the slice views, as the panel says."""
        node, results = self._parameterNode, self.current
        if node is None or results is None or not node.step or installation.missing():
            self.ui.heatmapCheckBox.text = _("show the evidence of the selected step")
            return
        step = self._step(results)
        heatmap = results.heatmap(step.evidence) if step is not None and node.showHeatmap else None
        background = results.background(step) if step is not None else results.input("t2w")
        hottest = results.hottest(step.evidence, node.finding) if heatmap is not None else None
        text = _("show the evidence of the selected step")
        if heatmap is not None:
            top = max(hottest.in_lesion if hottest is not None else 0.0, FAINTEST)
            views.scale(heatmap, node.threshold, top)
        if hottest is not None:
            text = (
                _("⚠ hotter elsewhere: {anywhere:.2f}, and {inside:.2f} in the lesion (brightest colour)")
                if round(hottest.anywhere, 2) > round(hottest.in_lesion, 2)  # as it is told
                else _("up to {inside:.2f} in the lesion (brightest colour), {anywhere:.2f} anywhere")
            ).format(inside=hottest.in_lesion, anywhere=hottest.anywhere)
        elif step is not None and step.evidence is None:
            text = _("{text} (this answer has none)").format(text=text)
        self.ui.heatmapCheckBox.text = text
        views.show(background, heatmap, node.opacity)

    def onShow3D(self, checked: bool) -> None:
        """Surfaces of the segments in the 3-D views."""
        results = self.current
        if results is not None and results.segmentation is not None:
            with slicer.util.tryWithErrorDisplay(_("The surfaces could not be made."), waitCursor=True):
                if checked:
                    results.segmentation.CreateClosedSurfaceRepresentation()
                results.segmentation.GetDisplayNode().SetVisibility3D(checked)

    # ------------------------------------------------------------ the reader

    def onAnswer(self, index: int) -> None:
        """The reader answers the selected step."""
        node, results = self._parameterNode, self.current
        concept = self.ui.answerComboBox.itemData(index)
        step = self._step(results)
        if step is None or concept == step.concept:
            return
        try:
            with slicer.util.tryWithErrorDisplay(_("The answer was not changed.")):
                results.override(node.finding, node.step, str(concept), self._ask)
        finally:
            self.refresh(again=True)

    def _ask(self, node: Any, candidates: tuple[str, ...]) -> str | None:
        """A question that the reader's answer makes necessary."""
        bank = self.current.tree().bank
        dialog = qt.QDialog(slicer.util.mainWindow())
        dialog.setWindowTitle(_("Your answer leads to another question"))
        box, buttons = qt.QComboBox(), qt.QDialogButtonBox()
        for concept in candidates:
            box.addItem(bank[concept].text, concept)
        buttons.setStandardButtons(qt.QDialogButtonBox.Ok | qt.QDialogButtonBox.Cancel)
        buttons.connect("accepted()", dialog.accept)
        buttons.connect("rejected()", dialog.reject)
        layout = qt.QVBoxLayout()
        dialog.setLayout(layout)
        for widget in (qt.QLabel(node.question), box, buttons):
            layout.addWidget(widget)
        accepted = dialog.exec_() == qt.QDialog.Accepted
        return str(box.itemData(box.currentIndex)) if accepted else None

    def onUndo(self, checked: bool = False) -> None:
        """Take the reader's last change back."""
        if self.current is not None:
            self.current.undo()
        self.refresh(again=True)


def _volumes(data: dict[str, Any]) -> str:
    volumes = data["volumes_ml"]
    text = _("Gland {gland:.1f} ml (PZ {pz:.1f}, TZ {tz:.1f}); ellipsoid formula {ellipsoid:.1f} ml").format(**volumes)
    density = data["study"]["patient"].get("psa_density_ng_ml2")
    return text if density is None else _("{text}; PSA density {density:.2f} ng/ml²").format(text=text, density=density)


def _heading(finding: Any) -> str:
    t2w = "–" if finding.t2w_score is None else finding.t2w_score
    return _("{name}: PI-RADS {pirads} (T2W {t2w}, DWI {dwi}, DCE {dce}), {sector}, {size:.1f} mm").format(
        name=finding.id.replace("-", " ").capitalize(), pirads=finding.category_in_words, t2w=t2w,
        dwi=finding.dwi_in_words, dce=finding.dce, sector=finding.sector, size=finding.size_mm,
    )  # fmt: skip

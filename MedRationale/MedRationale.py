"""MedRationale in 3D Slicer: prostate MRI in, findings with their reasons and evidence out."""

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import qt
import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLTextNode
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

REPOSITORY = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("MedRationaleLib") is None:
    sys.path.append(str(REPOSITORY))  # run from a source tree: Slicer adds this module's own folder only
if importlib.util.find_spec("MedRationaleSlicer") is None:
    sys.path.append(str(Path(__file__).resolve().parent))

from MedRationaleSlicer import exporting, inputs, installation, sample_data, views  # noqa: E402
from MedRationaleSlicer.nodes import ROLE, remove_node  # noqa: E402
from MedRationaleSlicer.results import CONCEPT, Results, hidden_nodes  # noqa: E402
from MedRationaleSlicer.results_panel import ResultsPanel  # noqa: E402
from MedRationaleSlicer.run import AssessTask, ReadTask, Request, Task  # noqa: E402

from MedRationaleLib.resources import resource_path  # noqa: E402

SUGGEST_AFTER_MS = 300
"""A volume is in the scene before it has its voxels and its place in the hierarchy."""
SECONDS = {"cpu": 10.0}
"""A run of the shipped model on two CPU cores, imports included; other devices tell after their first run."""


class MedRationale(ScriptedLoadableModule):
    """What Slicer lists."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("MedRationale")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Prostate")]
        self.parent.dependencies = ["Segmentations", "Volumes", "SubjectHierarchy", "Tables", "Texts"]
        self.parent.contributors = ["The MedRationale authors"]
        self.parent.helpText = _(
            "Segments prostate, zones and lesions in T2W, ADC and DWI, and says for each lesion why, in the words of "
            "PI-RADS v2.1, and shows where. It assists a reader; it does not diagnose. Choose the three volumes, press "
            "Apply, then select a lesion, and a step of its rationale."
        )
        self.parent.acknowledgementText = _(
            "The method is that of Ma et al., Why Is There a Tumor?: Tell Me the Reason, Show Me the Evidence, ICML "
            "2025. The shipped model was trained on synthetic images made from label maps of the PI-CAI challenge."
        )
        slicer.app.connect("startupCompleted()", sample_data.register)


@parameterNodeWrapper
class MedRationaleParameterNode:
    """The panel's state, saved with the scene."""

    t2w: vtkMRMLScalarVolumeNode
    adc: vtkMRMLScalarVolumeNode
    dwi: vtkMRMLScalarVolumeNode
    results: vtkMRMLTextNode
    psa: Annotated[float, WithinRange(0, 5000)] = 0.0
    bValue: Annotated[float, WithinRange(0, 10000)] = 0.0
    dce: str = "not available"
    model: str = "compact"
    device: str = "auto"
    showHeatmap: bool = True
    opacity: Annotated[float, WithinRange(0, 1)] = 0.6
    threshold: Annotated[float, WithinRange(0, 1)] = 0.4
    finding: str = ""
    step: str = ""


class MedRationaleWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: Any = None
        self._parameterNode: Any = None
        self._guiTag: Any = None
        self._task: Task | None = None
        self._started = 0.0
        self._told: tuple[Any, ...] = ()
        self._automatic = True  # nobody has chosen a volume by hand

    # ------------------------------------------------------------ set up and take down

    def setup(self) -> None:
        """Build the panel."""
        ScriptedLoadableModuleWidget.setup(self)
        widget = slicer.util.loadUI(self.resourcePath("UI/MedRationale.ui"))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)
        self.logic = MedRationaleLogic()
        self.results = ResultsPanel(self.ui)
        self._suggestSoon = qt.QTimer()
        self._suggestSoon.setSingleShot(True)
        self._suggestSoon.connect("timeout()", self._suggestAgain)
        models = resource_path("Models")  # in a source tree beside the library, inside it where it is installed
        for name in sorted(path.name for path in models.glob("*") if (path / "config.json").is_file()):
            self.ui.modelComboBox.addItem(name)
        for button, slot in (
            (self.ui.applyButton, self.onApply),
            (self.ui.suggestButton, self.onSuggest),
            (self.ui.loadFolderButton, self.onLoadFolder),
            (self.ui.modelFolderButton, self.onModelFolder),
            (self.ui.installButton, self.onInstall),
            (self.ui.exportButton, self.onExport),
        ):
            button.connect("clicked(bool)", slot)
        for box, parameter in self._choices().items():
            box.connect("currentTextChanged(QString)", lambda text, name=parameter: self._chosen(name, text))
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartImportEvent, self.onSceneStartImport)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.NodeAddedEvent, self.onNodeAdded)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.NodeAboutToBeRemovedEvent, self.onNodeAboutToBeRemoved)
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """The panel goes: so does what runs."""
        self._cancel()
        self._suggestSoon.stop()
        self.setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        """The panel is shown."""
        self.initializeParameterNode()

    def exit(self) -> None:
        """Another module is shown; a run goes on."""

    def onReload(self) -> None:
        """Reload the packages too: what is forgotten here, the module imports anew."""
        self._cancel()
        for name in [n for n in sys.modules if n.split(".")[0] in ("MedRationaleSlicer", "MedRationaleLib")]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def onSceneStartClose(self, caller: Any = None, event: Any = None) -> None:
        """The scene goes: so does what runs for it."""
        self._cancel()
        self._finish("")
        self.setParameterNode(None)

    def onSceneStartImport(self, caller: Any = None, event: Any = None) -> None:
        """References are half there during an import; nothing is to write them back."""
        self.setParameterNode(None)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAdded(self, caller: Any, event: Any, node: Any) -> None:
        """More volumes may make a better choice, as long as nobody has chosen."""
        if node.IsA("vtkMRMLScalarVolumeNode") and not slicer.mrmlScene.IsBatchProcessing():
            self._suggestSoon.start(SUGGEST_AFTER_MS)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAboutToBeRemoved(self, caller: Any, event: Any, node: Any) -> None:
        """An assessment that is deleted by hand takes what it hides with it."""
        if not slicer.mrmlScene.IsClosing() and node.GetAttribute(ROLE) == "assessment":
            hidden = hidden_nodes(node)
            qt.QTimer.singleShot(0, lambda: self._afterRemoval(hidden))

    def _afterRemoval(self, hidden: list[Any]) -> None:
        for each in hidden:
            remove_node(each)
        if self._parameterNode is not None and self._parameterNode.results is None:
            left = Results.in_scene()
            self.results.onResultsSelected(left[-1].node if left else None)

    def onSceneEndClose(self, caller: Any = None, event: Any = None) -> None:
        """A new scene, or one that was loaded."""
        self._told, self._automatic = (), True
        if self.parent.isEntered or self._task is not None:
            self.initializeParameterNode()

    def initializeParameterNode(self) -> None:
        """Take up the scene's state; with nothing chosen yet, suggest."""
        node = self.logic.getParameterNode()  # a wrapper of its own each time
        if self._parameterNode is None or node.parameterNode is not self._parameterNode.parameterNode:
            self.setParameterNode(node)
        if self._parameterNode.t2w is None and self._task is None:
            self._take(inputs.suggest())

    def setParameterNode(self, node: Any) -> None:
        """Connect the panel with a state."""
        if self._parameterNode is not None:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._onParameters)
        self._parameterNode = node
        self.results.setParameterNode(node)
        if node is not None:
            # Not connectGui, which returns no tag to disconnect by.
            named = ((widget.property("SlicerParameterName"), widget) for widget in vars(self.ui).values())
            self._guiTag = node.connectParametersToGui({name: widget for name, widget in named if name})
            for box, parameter in self._choices().items():
                _select(box, getattr(node, parameter))
            self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self._onParameters)
        self._onParameters()

    def _choices(self) -> dict[Any, str]:
        return {self.ui.dceComboBox: "dce", self.ui.modelComboBox: "model", self.ui.deviceComboBox: "device"}

    def _chosen(self, parameter: str, text: str) -> None:
        if self._parameterNode is not None and text:
            setattr(self._parameterNode, parameter, text)

    # ------------------------------------------------------------ inputs

    def onSuggest(self, checked: bool = False) -> None:
        """Choose the volumes anew."""
        suggestion = inputs.suggest()
        self._take(suggestion)
        if not suggestion.text:
            self.ui.choiceLabel.text = _(
                "No axial T2W was recognised among the volumes of the scene; choose it yourself."
            )

    def _take(self, suggestion: inputs.Suggestion) -> None:
        self._told = ()
        if suggestion.text:  # also what is unclear: volumes that were chosen before may belong to another examination
            for name in inputs.SEQUENCES:
                setattr(self._parameterNode, name, suggestion[name])
            self._told = self._inputs()
        self._automatic = True
        self.ui.choiceLabel.text = suggestion.text

    def _inputs(self) -> tuple[Any, ...]:
        """Ids of the chosen volumes."""
        nodes = (getattr(self._parameterNode, name) for name in inputs.SEQUENCES)
        return tuple(node.GetID() if node is not None else None for node in nodes)

    def _suggestAgain(self) -> None:
        if self._task is None and self._parameterNode is not None and self._automatic:
            self._take(inputs.suggest())

    def onLoadFolder(self, checked: bool = False) -> None:
        """Ask for a folder and load its examination."""
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), _("Folder of an examination"))
        if folder:
            self.loadFolder(folder)

    def loadFolder(self, folder: str) -> None:
        """Find and load T2W, ADC and DWI in a DICOM folder, or a folder of image files."""
        if self._task is None and self._ready(torch=False):
            self._begin(ReadTask(folder, **self._reports(self.onLoaded)))

    def onLoaded(self, nodes: dict[str, Any]) -> None:
        """A folder's sequences are in the scene."""
        self._finish(_("Loaded {count} sequences; please check them.").format(count=len(nodes)))
        for name in inputs.SEQUENCES:
            setattr(self._parameterNode, name, nodes.get(name))
        self._told, self._automatic = self._inputs(), False
        reasons = {inputs.TITLES[n]: node.GetAttribute("MedRationale.reason") for n, node in nodes.items()}
        self.ui.choiceLabel.text = "\n".join(f"{n}: {reason.split(': ')[0]}" for n, reason in reasons.items())
        self.ui.choiceLabel.toolTip = "\n".join(f"{n}: {reason}" for n, reason in reasons.items())
        views.show(nodes["t2w"])  # first: what is shown is what is fitted
        views.align(nodes["t2w"])

    def onModelFolder(self, checked: bool = False) -> None:
        """Ask for a model folder."""
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), _("Model folder"))
        if folder:
            _select(self.ui.modelComboBox, folder)

    # ------------------------------------------------------------ running

    def onApply(self, checked: bool = False) -> None:
        """Run, or cancel what runs."""
        if self._task is not None:
            self._cancel()
            self._finish(_("Cancelled; nothing was changed."))
        elif self._ready():
            node = self._parameterNode
            chosen = {name: getattr(node, name) for name in inputs.SEQUENCES if getattr(node, name) is not None}
            request = Request(
                inputs=chosen,
                model=node.model,
                device=node.device,
                dce=node.dce,
                psa=node.psa or None,
                b_value=node.bValue or None,
            )
            self._begin(AssessTask(request, **self._reports(self.onAssessed)))

    def onAssessed(self, results: Results) -> None:
        """The results are in the scene."""
        seconds = time.monotonic() - self._started
        slicer.app.userSettings().setValue(self._timeKey(), seconds)
        count = len(results.data["findings"])
        told = _("{count} finding(s), after {seconds:.0f} s.").format(count=count, seconds=seconds)
        if not results.data["volumes_ml"].get("gland"):
            told = _(
                "Not assessed, after {seconds:.0f} s: no prostate was found, so no lesion was looked for. Check that "
                "the right series are chosen."
            ).format(seconds=seconds)
        elif not count:
            told = _(
                "No suspicious lesion was found, after {seconds:.0f} s. That is not proof that there is none: small "
                "and faint ones are missed, so read the images yourself."
            ).format(seconds=seconds)
        self._finish(told)
        self.results.open(results.node)

    def onInstall(self, checked: bool = False) -> None:
        """Install what is missing, after asking."""
        if self._ready():
            self.results.refresh(again=True)

    def onExport(self, checked: bool = False) -> None:
        """Ask for a folder and write everything."""
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), _("Folder for the results"))
        if folder:
            self.ui.statusLabel.text = _("The export failed.")  # unless it does not
            with slicer.util.tryWithErrorDisplay(_("The export failed."), waitCursor=True):
                report = self.logic.export(self.results.current, folder)
                self.ui.statusLabel.text = _("Exported; the report is {path}").format(path=report)

    def _ready(self, torch: bool = True) -> bool:
        """Whether the Python packages are there, or were installed with consent."""
        try:
            installation.ensure_installed(torch=torch)
        except RuntimeError as error:
            self._finish(str(error))
            return False
        return True

    def _reports(self, done: Callable[[Any], None]) -> dict[str, Any]:
        return {"progress": self._onProgress, "done": done, "failed": self._onFailed}

    def _begin(self, task: Task) -> None:
        self._task = task
        self._started = time.monotonic()
        self.ui.applyButton.text = _("Cancel")
        self.ui.progressBar.setVisible(True)
        self._checkCanApply()
        task.start()

    def _onProgress(self, text: str, fraction: float) -> None:
        self.ui.statusLabel.text = f"{text} …"
        if fraction >= 0:
            self.ui.progressBar.setValue(round(1000 * fraction))

    def _onFailed(self, sentence: str) -> None:
        self._finish(sentence)
        slicer.util.errorDisplay(sentence, windowTitle="MedRationale")

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._finish("")

    def _finish(self, sentence: str) -> None:
        self._task = None
        self.ui.applyButton.text = _("Apply")
        self.ui.progressBar.setVisible(False)
        self.ui.progressBar.setValue(0)
        self.ui.statusLabel.text = sentence
        self._checkCanApply()

    # ------------------------------------------------------------ showing

    def _onParameters(self, caller: Any = None, event: Any = None) -> None:
        if slicer.mrmlScene.IsBatchProcessing():
            return
        if self._parameterNode is not None and self._told and self._inputs() != self._told:
            self._told, self._automatic = (), False  # what the label says is not what is chosen any more
            self.ui.choiceLabel.text = self.ui.choiceLabel.toolTip = ""
        self._checkCanApply()
        self.results.refresh()

    def _checkCanApply(self) -> None:
        node, button = self._parameterNode, self.ui.applyButton
        ready = node is not None and node.t2w is not None
        button.enabled = self._task is not None or ready
        button.toolTip = (
            _("End the run; the scene stays as it is.") if self._task is not None
            else _("Segment and explain. {estimate}").format(estimate=self._estimate()) if ready
            else _("Choose the axial T2W first.")
        )  # fmt: skip
        for name in ("suggestButton", "loadFolderButton", "installButton"):
            getattr(self.ui, name).enabled = self._task is None
        self.ui.estimateLabel.text = self._estimate()

    def _timeKey(self) -> str:
        return f"MedRationale/seconds/{os.path.basename(self._parameterNode.model)}/{self._parameterNode.device}"

    def _estimate(self) -> str:
        if self._parameterNode is None:
            return ""
        last = slicer.app.userSettings().value(self._timeKey())
        if last is not None:
            return _("The last run on this device took {seconds:.0f} s.").format(seconds=float(last))
        if self._parameterNode.device in SECONDS:
            seconds = SECONDS[self._parameterNode.device]
            return _("About {seconds:.0f} s on two CPU cores.").format(seconds=seconds)
        return _("The first run tells how long this device takes; two CPU cores take about {seconds:.0f} s.").format(
            seconds=SECONDS["cpu"]
        )


def _select(box: Any, text: str) -> None:
    """Choose an entry, which is added where it is not there."""
    if box.findText(text) < 0:
        box.addItem(text)
    box.setCurrentIndex(box.findText(text))


class MedRationaleLogic(ScriptedLoadableModuleLogic):
    """What the panel does, for scripts; needs no window.

    >>> logic = slicer.util.getModuleLogic("MedRationale")
    >>> assessment = logic.process(t2wNode, adcNode, dwiNode)
    >>> [(finding.sector, finding.pirads) for finding in assessment.findings]
    """

    def getParameterNode(self) -> MedRationaleParameterNode:
        """The panel's state."""
        return MedRationaleParameterNode(super().getParameterNode())

    def process(
        self,
        t2w: vtkMRMLScalarVolumeNode,
        adc: vtkMRMLScalarVolumeNode | None = None,
        dwi: vtkMRMLScalarVolumeNode | None = None,
        *,
        model: str = "compact",
        device: str = "auto",
        dce: str = "not available",
        psa: float | None = None,
        bValue: float | None = None,
        install: bool = False,
        progress: Callable[[str, float], None] | None = None,
    ) -> Any:
        """Assess an examination and wait; the results are in the scene, and returned as an Assessment.

        Args:
            t2w, adc, dwi: volumes, on any grids; ADC and DWI may be missing.
            model: a shipped model's name, or a model folder.
            device: "auto", "cuda", "mps" or "cpu".
            dce: what you saw of contrast enhancement: "positive", "negative" or "not available".
            psa: ng/ml.
            bValue: of the DWI in s/mm², where neither its tags nor its name tell.
            install: first install Python packages that are missing, torch with its gigabytes among them.
            progress: told (what is being done, fraction of the whole; negative where that is not known).

        Raises RuntimeError with one sentence; the scene is as before then.
        """
        volumes = {name: node for name, node in (("t2w", t2w), ("adc", adc), ("dwi", dwi)) if node is not None}
        installation.ensure_installed(ask=False, install=install)
        request = Request(inputs=volumes, model=model, device=device, dce=dce, psa=psa, b_value=bValue)
        results = AssessTask(request, progress=progress).run()
        parameters, assessment = self.getParameterNode(), results.assessment()
        parameters.finding = assessment.findings[0].id if assessment.findings else ""
        parameters.step, parameters.results = "", results.node
        return assessment

    def loadFolder(self, folder: str) -> dict[str, Any]:
        """Load T2W, ADC and DWI of a DICOM folder, or a folder of image files: {"t2w": node, ...}. Waits."""
        installation.ensure_installed(ask=False, install=False, torch=False)
        return ReadTask(folder).run()

    def results(self) -> list[Results]:
        """The assessments in the scene."""
        return Results.in_scene()

    def export(self, results: Results, folder: str) -> str:
        """Write segmentation, heatmaps, report, assessment and scene into a folder; returns the report's path."""
        return exporting.export(results, folder)


class MedRationaleTest(ScriptedLoadableModuleTest):
    """What only the application can show: its own widgets, views and PythonSlicer around the phantom."""

    def setUp(self) -> None:
        """An empty scene."""
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """All of it."""
        self.setUp()
        self.test_console()
        self.setUp()
        self.test_panel()

    def test_console(self) -> None:
        """The phantom's lesion is found and explained, and a changed answer is undone."""
        self.delayDisplay("Drawing the phantom, and running the model on it")
        nodes = sample_data.load_phantom()
        logic = MedRationaleLogic()
        assessment = logic.process(nodes["t2w"], nodes["adc"], nodes["dwi"])
        self.assertGreaterEqual(len(assessment.findings), 1)
        results = logic.results()[-1]
        self.assertIn("gland", results.segmentation.GetSegmentation().GetSegmentIDs())
        before = results.findings
        results.override("lesion-1", "adc_signal", "adc_normal")
        self.assertNotEqual(results.findings, before)
        results.undo()
        self.assertEqual(results.findings, before)
        self.delayDisplay("Console: passed")

    def test_panel(self) -> None:
        """Apply, a finding and a step, as a user clicks them."""
        self.delayDisplay("The panel with the phantom")
        nodes = sample_data.load_phantom()
        panel = slicer.util.getModuleWidget("MedRationale")
        panel.enter()
        panel.ui.suggestButton.click()
        self.assertIs(panel.ui.t2wSelector.currentNode(), nodes["t2w"])
        panel.ui.applyButton.click()
        end = time.monotonic() + 600
        while panel.ui.applyButton.text == _("Cancel") and time.monotonic() < end:
            slicer.app.processEvents()
            time.sleep(0.01)
        self.assertGreaterEqual(panel.ui.findingsTable.rowCount, 1, panel.ui.statusLabel.text)
        panel.ui.findingsTable.selectRow(0)
        steps = panel.ui.rationaleTree.model()
        panel.ui.rationaleTree.setCurrentIndex(steps.index(2, 0))
        heatmaps = [n for n in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode") if n.GetAttribute(CONCEPT)]
        self.assertEqual(len(heatmaps), 1)
        for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
            self.assertEqual(composite.GetForegroundVolumeID(), heatmaps[0].GetID())
        self.delayDisplay("Panel: passed")

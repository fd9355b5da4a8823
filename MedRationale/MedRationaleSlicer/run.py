"""One examination on its way: volumes of the scene -> files -> worker process -> results in the scene."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from MedRationaleSlicer.inputs import SEQUENCE, SEQUENCES, TITLES, b_value, series_uid
from MedRationaleSlicer.nodes import ROLE, volume_image
from MedRationaleSlicer.results import Results
from MedRationaleSlicer.steps import Stepper, Steps, exhaust
from MedRationaleSlicer.worker import JOB_FILE, Launch, Outcome, Worker

SHOWING = (
    "yaml", "jsonschema", "jinja2", "PIL.Image", "skimage.measure", "MedRationaleLib.decision_tree",
    "MedRationaleLib.report", "MedRationaleLib.serialization",
)  # fmt: skip
"""What showing results imports."""
DCE = ("not available", "negative", "positive")
DEVICES = ("auto", "cuda", "mps", "cpu")
WORKER_SHARE = (0.05, 0.90)
"""Part of the whole time that is over when the worker starts, and when it is done."""


PATIENT = "MedRationale.patient"
"""Attribute of a T2W that was read from a folder: what the folder told of patient and study, as JSON."""


@dataclass(frozen=True)
class Request:
    """What is to be assessed, and how."""

    inputs: Mapping[str, Any]
    """"t2w", "adc", "dwi" -> volume node; only those that there are."""
    model: str = "compact"
    device: str = "auto"
    dce: str = "not available"
    psa: float | None = None
    """ng/ml."""
    b_value: float | None = None
    """Of the DWI in s/mm²; by its tags or name where it is not given."""


class Task(ABC):
    """Work in three parts: steps here, the worker process, steps here; it can be cancelled in each."""

    def __init__(
        self,
        *,
        progress: Callable[[str, float], None] | None = None,
        done: Callable[[Any], None] | None = None,
        failed: Callable[[str], None] | None = None,
        launch: Launch | None = None,
    ) -> None:
        self.progress = progress or (lambda text, fraction: None)
        self._done, self._failed = done or (lambda result: None), failed or (lambda text: None)
        self._launch = launch
        self._folder: Path | None = None
        self._part: Stepper | Worker | None = None
        self._meanwhile: Stepper | None = None
        self.running = False

    @abstractmethod
    def before(self) -> Steps[None]:
        """Writes the job."""

    @abstractmethod
    def after(self, message: dict[str, Any]) -> Steps[Any]:
        """Brings what the worker has made into the scene."""

    def meanwhile(self) -> Steps[None]:
        """What can be done here while the worker works."""
        yield

    @property
    def folder(self) -> Path:
        """Temporary folder of this task."""
        if self._folder is None:
            self._folder = Path(slicer.util.tempDirectory("MedRationale"))
        return self._folder

    def start(self) -> None:
        """Begin, and return at once; `done` or `failed` is told from the event loop."""
        self.running = True
        self._part = Stepper(self.before(), self._start_worker, self._fail)

    def run(self) -> Any:
        """Do all of it before returning (scripts). Raises RuntimeError with one sentence where it fails."""
        outcome: list[Outcome] = []
        self.running = True
        try:
            exhaust(self.before())
            worker = Worker(self.folder, progress=self._told, ended=outcome.append, launch=self._launch)
            self._part = worker
            worker.run()
            if outcome[0].done is None:
                raise RuntimeError(outcome[0].error)
            return exhaust(self.after(outcome[0].done))
        finally:
            if isinstance(self._part, Worker) and not outcome:
                self._part.cancel()
            self._clear()

    def cancel(self) -> None:
        """End it wherever it is; the scene is as it was before, and neither `done` nor `failed` is told."""
        if self.running and self._part is not None:
            self._part.cancel()
        self._clear()

    def _start_worker(self, _: None) -> None:
        worker = Worker(self.folder, progress=self._told, ended=self._worker_ended, launch=self._launch)
        try:
            worker.start()
        except (OSError, RuntimeError) as error:
            self._fail(error)
        else:
            self._part = worker
            self._meanwhile = Stepper(self.meanwhile(), lambda _: None, lambda error: logging.warning("%s", error))

    def _worker_ended(self, outcome: Outcome) -> None:
        if outcome.done is None:
            self._clear()
            self._failed(outcome.error or "")
        else:
            self.progress(_("bringing the results into the scene"), WORKER_SHARE[1])
            self._part = Stepper(self.after(outcome.done), self._end, self._fail)

    def _told(self, text: str, fraction: float) -> None:
        begin, end = WORKER_SHARE
        self.progress(text, begin + fraction * (end - begin) if fraction >= 0 else fraction)

    def _end(self, result: Any) -> None:
        self._clear()
        self._done(result)

    def _fail(self, error: Exception) -> None:
        sentence = " ".join(str(error).split())
        if not isinstance(error, (RuntimeError, ValueError, OSError)):
            logging.error("MedRationale: a fault of the programme", exc_info=error)
            text = _("This is a fault of the programme ({error}: {sentence}); please report it.")
            sentence = text.format(error=type(error).__name__, sentence=sentence)
        self._clear()
        self._failed(sentence)

    def _clear(self) -> None:
        if self._meanwhile is not None:
            self._meanwhile.cancel()
        self.running, self._part, self._meanwhile = False, None, None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class AssessTask(Task):
    """Assess the volumes of a Request; the result is a Results."""

    def __init__(self, request: Request, **options: Any) -> None:
        super().__init__(**options)
        for name, node in request.inputs.items():
            if not (hasattr(node, "IsA") and node.IsA("vtkMRMLScalarVolumeNode")) or node.GetScene() is None:
                text = _("{sequence}: expected a scalar volume of the scene, got {given:.60}.")
                raise RuntimeError(text.format(sequence=TITLES[name], given=repr(node)))
            if node.IsA("vtkMRMLLabelMapVolumeNode"):
                text = _("{sequence}: expected an image, got the label map {name}.")
                raise RuntimeError(text.format(sequence=TITLES[name], name=node.GetName()))
            if node.GetAttribute(ROLE):
                text = _("{sequence}: expected an image of the examination, got the heatmap {name}; choose another.")
                raise RuntimeError(text.format(sequence=TITLES[name], name=node.GetName()))
        for what, given, known in (("DCE", request.dce, DCE), (_("device"), request.device, DEVICES)):
            if given not in known:
                text = _("{what}: expected {known}, got {given:.60}.")
                raise RuntimeError(text.format(what=what, known=", ".join(known), given=repr(given)))
        self._request = request
        self._ids = {name: node.GetID() for name, node in request.inputs.items() if node is not None}

    def before(self) -> Steps[None]:
        import SimpleITK as sitk

        from MedRationaleLib.worker import Input, Job

        request = self._request
        if "t2w" not in self._ids:
            raise RuntimeError(_("T2W: expected a volume, got none; choose the axial T2W."))
        inputs, t2w = {}, request.inputs["t2w"]
        for index, (name, node_id) in enumerate(self._ids.items()):
            self.progress(
                _("writing {sequence}").format(sequence=TITLES[name]), WORKER_SHARE[0] * index / len(self._ids)
            )
            yield
            node = slicer.mrmlScene.GetNodeByID(node_id)
            if node is None or node.GetImageData() is None or node.GetImageData().GetPointData().GetScalars() is None:
                text = _("{sequence}: expected a volume with voxels, got none; choose another.")
                raise RuntimeError(text.format(sequence=TITLES[name]))
            path = self.folder / f"{name}.nrrd"
            sitk.WriteImage(volume_image(node, t2w), str(path))
            b = (request.b_value or b_value(node)) if name == "dwi" else None
            inputs[name] = Input(path=str(path), name=node.GetName(), series_uid=series_uid(node), b_value=b)
        yield
        Job(
            task="assess",
            out=str(self.folder / "results"),
            inputs=inputs,
            patient=patient_of(t2w),
            model=request.model,
            device=request.device,
            dce=request.dce,
            psa_ng_ml=request.psa,
        ).write(self.folder / JOB_FILE)

    def meanwhile(self) -> Steps[None]:
        """The first import of these takes longer than a window may stand still, were it done all at once."""
        for name in SHOWING:
            importlib.import_module(name)
            yield

    def after(self, message: dict[str, Any]) -> Steps[Results]:
        inputs = {name: slicer.mrmlScene.GetNodeByID(node_id) for name, node_id in self._ids.items()}
        return (yield from Results.create(Path(message["folder"]), inputs))


class ReadTask(Task):
    """Find the three sequences in a folder (DICOM, or image files) and load them; the result is {sequence: node}."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(**options)
        self._source = str(folder)

    def before(self) -> Steps[None]:
        from MedRationaleLib.worker import Job

        self.progress(_("looking at the folder"), 0.0)
        yield
        Job(task="read", out=str(self.folder / "images"), folder=self._source).write(self.folder / JOB_FILE)

    def after(self, message: dict[str, Any]) -> Steps[dict[str, Any]]:
        from MedRationaleSlicer.nodes import all_or_nothing, forget_file, into_folder

        shown = slicer.mrmlScene.GetSubjectHierarchyNode()
        with all_or_nothing() as made:
            nodes = {}
            for name in SEQUENCES:
                found = message.get("sequences", {}).get(name)
                if found is None:
                    continue
                node = slicer.util.loadVolume(str(Path(message["folder"]) / found["file"]))
                made.append(node)
                nodes[name] = node
                node.SetName(found["name"])
                node.SetAttribute("MedRationale.reason", found["reason"])
                node.SetAttribute(SEQUENCE, name)
                for key, attribute in (("series_uid", "MedRationale.seriesUID"), ("b_value", "MedRationale.bValue")):
                    if found[key] is not None:
                        node.SetAttribute(attribute, str(found[key]))
                if name == "t2w":
                    node.SetAttribute(PATIENT, json.dumps(message.get("patient", {})))
                forget_file(node)
                yield
            folder = examination_item(shown, message.get("patient", {}), Path(self._source).name)
            for node in nodes.values():
                into_folder(node, folder)
        return nodes


def examination_item(shown: Any, patient: Mapping[str, Any], name: str) -> int:
    """A study under its patient, as the DICOM browser would have made them; without their ids a folder."""
    uid = patient.get("study_uid")
    if not uid or not patient.get("id"):
        return int(shown.CreateFolderItem(shown.GetSceneItemID(), name))
    subject = shown.GetItemByUID("DICOM", patient["id"])
    if not subject:
        subject = shown.CreateSubjectItem(shown.GetSceneItemID(), patient["id"])
        shown.SetItemUID(subject, "DICOM", patient["id"])
    study = shown.GetItemByUID("DICOM", uid)
    if not study:
        study = shown.CreateStudyItem(subject, name)
        shown.SetItemUID(study, "DICOM", uid)
    return int(study)


def patient_of(t2w: Any) -> dict[str, Any]:
    """What is known of the patient and the study: of a folder that was read, else of DICOM in the scene."""
    if t2w.GetAttribute(PATIENT):
        return dict(json.loads(t2w.GetAttribute(PATIENT)))
    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    item = shown.GetItemByDataNode(t2w)
    levels = slicer.vtkMRMLSubjectHierarchyConstants
    found = {}
    for level, key in ((levels.GetDICOMLevelPatient(), "id"), (levels.GetDICOMLevelStudy(), "study_uid")):
        above = shown.GetItemAncestorAtLevel(item, level)
        uid = shown.GetItemUID(above, "DICOM") if above else ""
        if uid:
            found[key] = uid
    return found or {"id": t2w.GetName()}

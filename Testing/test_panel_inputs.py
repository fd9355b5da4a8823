"""The panel chooses its volumes, and refuses what is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from panel_fixtures import MODULE, Play

pytestmark = pytest.mark.usefixtures("module_folder")


def test_apply_waits_for_a_t2w_and_says_so(scene: Any, play: Play, open_panel: Callable[[Path], Any]) -> None:
    panel = open_panel(MODULE)
    assert not panel.ui.applyButton.enabled
    assert "T2W" in panel.ui.applyButton.toolTip


def test_the_volumes_are_chosen_by_their_names_and_shown_for_confirmation(panel: Any, volumes: dict[str, Any]) -> None:
    chosen = {name: getattr(panel.ui, f"{name}Selector").currentNode() for name in volumes}
    assert chosen == volumes
    assert panel.ui.choiceLabel.text == "Chosen: T2W by its name, ADC by its name, DWI by its name. Please check."
    assert panel.ui.applyButton.enabled


def test_a_sagittal_t2w_is_not_suggested(scene: Any) -> None:
    import slicer
    from MedRationaleSlicer import inputs

    sagittal = np.array([[0, 0, -3, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)
    slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), sagittal, "t2_tse")
    slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name="t2_tse_cor")
    assert inputs.suggest()["t2w"] is None
    axial = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name="t2_tse_tra")
    assert inputs.suggest()["t2w"] is axial


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("T2W", "t2w"), ("5: t2_tse_tra", "t2w"), ("10000_1000000_t2w", "t2w"), ("t2star", None), ("dyn_t1_vibe", None),
        ("10000_1000000_hbv", "dwi"), ("ep2d_diff_b1400", "dwi"), ("DWI b=800", "dwi"), ("ep2d_diff_ADC", "adc"),
        ("Apparent Diffusion Coefficient", "adc"), ("b1000", "dwi"), ("knob12345", None),
    ],
)  # fmt: skip
def test_names_tell_the_sequence(scene: Any, name: str, sequence: str | None) -> None:
    import slicer
    from MedRationaleSlicer import inputs

    node = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
    if sequence != "t2w":
        slicer.util.addVolumeFromArray(np.ones((3, 5, 6), np.int16), name="t2")
    found = inputs.suggest()
    assert found["t2w"] is not None
    assert [s for s in inputs.SEQUENCES if found[s] is node] == ([sequence] if sequence else [])


def test_dicom_tags_come_before_names(scene: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import slicer
    from dicom_samples import write_examination
    from MedRationaleSlicer import inputs

    class Database:
        def fileForInstance(self, uid: str) -> str:
            return files.get(uid, "")

    write_examination(tmp_path, b_values=(800,))
    files = {
        "t2w.1": str(tmp_path / "t2" / "000.dcm"),
        "adc.1": str(tmp_path / "adc" / "000.dcm"),
        "dwi.1": str(tmp_path / "dwi" / "b800-000.dcm"),
    }
    named = slicer.util.addVolumeFromArray(np.ones((9, 5, 6), np.int16), name="t2 by its name only")
    tagged = {}
    for kind, name in (("t2w", "series 4"), ("adc", "t2_misnamed"), ("dwi", "series 6 b50")):
        tagged[kind] = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
        tagged[kind].SetAttribute("DICOM.instanceUIDs", f"{kind}.1 {kind}.2")
    monkeypatch.setattr(slicer, "dicomDatabase", Database(), raising=False)
    found = inputs.suggest()
    assert {kind: found[kind] for kind in tagged} == tagged
    assert found["t2w"] is not named
    assert "DICOM tags" in found.text
    assert inputs.b_value(tagged["dwi"]) == 800


def test_of_two_examinations_the_complete_one_is_chosen(scene: Any) -> None:
    import slicer
    from MedRationaleSlicer import inputs

    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    nodes = {}
    for study, names in (("complete", ("t2", "adc", "dwi")), ("later", ("t2", "adc"))):
        item = shown.CreateStudyItem(shown.GetSceneItemID(), study)
        for name in names:
            node = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
            shown.SetItemParent(shown.GetItemByDataNode(node), item)
            nodes[study, name] = node
    found = inputs.suggest()
    assert [found[s] for s in inputs.SEQUENCES] == [nodes["complete", name] for name in ("t2", "adc", "dwi")]


def test_two_patients_known_by_name_only_are_not_mixed(
    scene: Any, play: Play, open_panel: Callable[[Path], Any]
) -> None:
    import slicer

    for name in ("a_t2w", "a_dwi", "b_t2w", "b_adc", "b_dwi"):
        slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)
    panel = open_panel(MODULE)
    assert "a_t2w, b_t2w may each be the T2W" in panel.ui.choiceLabel.text
    assert panel.ui.t2wSelector.currentNode() is None and not panel.ui.applyButton.enabled


@pytest.mark.parametrize("what", ["a label map", "no voxels", "text"])
def test_what_is_no_image_is_refused_with_a_sentence(what: str, scene: Any, play: Play, open_panel: Any) -> None:
    import slicer

    logic = open_panel(MODULE).logic
    node: Any = "t2w"
    if what == "a label map":
        kind = "vtkMRMLLabelMapVolumeNode"
        node = slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name="labels", nodeClassName=kind)
    elif what == "no voxels":
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")
    with pytest.raises(RuntimeError, match="T2W: expected"):
        logic.process(node)


def test_a_heatmap_is_no_image_of_the_examination(panel: Any, run: Callable[[], Any], volumes: dict[str, Any]) -> None:
    run()
    results = panel.results.current
    heatmap = results.heatmap(next(s.evidence for s in results.findings[0].rationale if s.evidence))
    with pytest.raises(RuntimeError, match=r"ADC: expected an image of the examination, got the heatmap Evidence"):
        panel.logic.process(volumes["t2w"], adc=heatmap)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"dce": "maybe"}, "DCE: expected not available, negative, positive, got 'maybe'."),
     ({"device": "tpu"}, "device: expected auto, cuda, mps, cpu, got 'tpu'.")],
)  # fmt: skip
def test_a_script_is_told_what_it_may_choose(volumes: dict[str, Any], panel: Any, wrong: dict, sentence: str) -> None:
    with pytest.raises(RuntimeError) as told:
        panel.logic.process(**volumes, **wrong)
    assert str(told.value) == sentence


def test_volumes_that_are_loaded_later_are_chosen_until_somebody_chooses(
    scene: Any, open_panel: Callable[[Path], Any], wait_until: Callable[..., None], play: Play
) -> None:
    import slicer

    panel = open_panel(MODULE)

    def load(name: str) -> Any:
        return slicer.util.addVolumeFromArray(np.ones((4, 5, 6), np.int16), name=name)

    t2w = load("case_t2w")
    wait_until(lambda: panel.ui.t2wSelector.currentNode() is t2w)
    adc = load("case_adc")
    wait_until(lambda: panel.ui.adcSelector.currentNode() is adc)
    assert panel.ui.choiceLabel.text.startswith("Chosen: T2W by its name, ADC by its name. Not found: DWI")
    panel.ui.adcSelector.setCurrentNode(None)
    assert panel.ui.choiceLabel.text == "", "it told of another choice"
    panel._suggestAgain()
    assert panel.ui.adcSelector.currentNode() is None


def test_choices_reach_the_worker(panel: Any, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from MedRationaleLib import worker

    jobs = []
    write = worker.Job.write
    monkeypatch.setattr(worker.Job, "write", lambda job, path: (jobs.append(job), write(job, path)))
    panel.ui.psaSpinBox.setValue(6.5)
    panel.ui.bValueSpinBox.setValue(1400)
    panel.ui.dceComboBox.setCurrentText("positive")
    panel.ui.deviceComboBox.setCurrentText("cpu")
    run()
    (job,) = jobs
    assert (job.psa_ng_ml, job.dce, job.device, job.model) == (6.5, "positive", "cpu", "compact")
    assert job.inputs["t2w"].name == "case_t2w" and job.inputs["dwi"].b_value == 1400
    assert "The last run on this device took" in panel.ui.estimateLabel.text

"""Everything about one examination as files: what `medrationale predict` writes, and the scene."""

from __future__ import annotations

import tempfile
from pathlib import Path

import slicer
from slicer.i18n import tr as _

from MedRationaleSlicer.results import Results

SCENE_FILE = "scene.mrb"


def export(results: Results, folder: str | Path) -> str:
    """Write segmentation, heatmaps, report.html, assessment.json and the scene; returns the report's path.

    Files of an earlier export are replaced, other files never. Raises InputError or RuntimeError with one sentence.
    """
    from MedRationaleLib.output import write_results

    paths = write_results(results.assessment(), folder)
    of_user = slicer.mrmlScene.GetURL(), slicer.mrmlScene.GetRootDirectory()
    with tempfile.TemporaryDirectory(prefix=".medrationale-", dir=folder) as stage:
        scene = Path(stage) / SCENE_FILE
        try:
            if not slicer.util.saveScene(str(scene)):
                raise RuntimeError(
                    _("The scene could not be written in {folder}; the other files are there.").format(folder=folder)
                )
        finally:  # saving makes the file's folder the scene's own, where Slicer would save the next time
            slicer.mrmlScene.SetURL(of_user[0])
            slicer.mrmlScene.SetRootDirectory(of_user[1])
        scene.replace(Path(folder) / SCENE_FILE)
    return str(paths.report)

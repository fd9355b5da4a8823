"""A synthetic examination among Slicer's sample data: it is drawn here, nothing is downloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from MedRationaleSlicer import installation
from MedRationaleSlicer.run import ReadTask

NAME = "MedRationale phantom (synthetic)"


def register() -> None:
    """Offer the phantom in the Sample Data module."""
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="MedRationale",
        sampleName=NAME,
        uris=None,
        fileNames=None,
        nodeNames=None,
        thumbnailFileName=str(Path(__file__).resolve().parents[1] / "Resources" / "Icons" / "MedRationale.png"),
        customDownloader=lambda source: list(load_phantom().values()),
    )


def load_phantom() -> dict[str, Any]:
    """Draw the phantom and load it: {"t2w": node, "adc": node, "dwi": node}."""
    installation.ensure_installed(torch=False)
    from MedRationaleLib.phantom import write_phantom

    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder) / "phantom", seed=0)
        nodes: dict[str, Any] = ReadTask(Path(folder) / "phantom").run()
    return nodes

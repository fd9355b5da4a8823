"""Where the data files are: in the source tree beside the package, or inside the installed wheel."""

from __future__ import annotations

from pathlib import Path

from MedRationaleLib.errors import InputError

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE.parent / "Resources", _PACKAGE / "_resources")


def resource_path(name: str) -> Path:
    """Path of a file or folder under Resources, for instance ``resource_path("Concepts/prostate.yaml")``."""
    for root in _ROOTS:
        if (root / name).exists():
            return root / name
    raise InputError(
        f"Expected the resource '{name}' in {' or '.join(str(root) for root in _ROOTS)}, but it is in neither; "
        "install MedRationale again, or run it from a complete copy of the repository."
    )

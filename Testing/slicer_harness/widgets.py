"""Makes `import ctk`, slicer.qMRML... and qt.QUiLoader work, with look-alikes."""

from __future__ import annotations

import sys
import types

import slicer

from . import ctk_widgets, qmrml_widgets
from .qt_standin import make_properties_attributes
from .ui_loader import UiLoader

LOOK_ALIKES = {
    name: cls
    for module in (ctk_widgets, qmrml_widgets)
    for name, cls in vars(module).items()
    if name.startswith(("ctk", "qMRML"))
}


def install() -> None:
    """Needs `qt` installed."""
    ctk = types.ModuleType("ctk", "Look-alikes of the CTK widgets.")
    for name, cls in LOOK_ALIKES.items():
        make_properties_attributes(cls)
        setattr(ctk if name.startswith("ctk") else slicer, name, cls)
    UiLoader.look_alikes = LOOK_ALIKES
    sys.modules["ctk"] = ctk
    sys.modules["qt"].QUiLoader = UiLoader

"""The one place that copes with a torchvision whose build does not match torch's.

PyPI's torchvision for Linux is a CUDA build. Beside a CPU build of torch its native library does not load, so that the
operators it would register are missing and ``import torchvision`` raises "operator torchvision::nms does not exist";
with it fail segment_anything, open_clip, timm and lightning. Nobody here calls those operators, so two remedies do:

* `ensure_torchvision` declares the two operators that torchvision's Python half looks up. It does so only after the
  native import has raised exactly that error: with a matching pair nothing is declared, and any other error is raised
  as it came. Call it before the first import of open_clip, timm or lightning. After it, ``torchvision.ops.nms``
  itself stays unavailable where it was before, and says so when called.
* `sam_modeling` gives segment_anything's network classes without the rest of that package, which needs torchvision
  only for image files and mask generation. It also saves the two seconds that importing torchvision takes.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

_MISMATCH = "operator torchvision::nms does not exist"
_OPERATORS = ("nms", "qnms")
_SAM_ALIAS = f"{__package__}._segment_anything_modeling"
_logger = logging.getLogger(__name__)
_libraries: list[torch.library.Library] = []  # torch forgets the operators when their Library is collected


def ensure_torchvision() -> Literal["native", "declared"]:
    """Import torchvision and return how that went.

    "native": it imported by itself, nothing was changed. "declared": its native library does not fit this torch, the
    operators it looks up were declared without an implementation. Every other error, such as torchvision not being
    installed, is raised as it came.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if str(error) != _MISMATCH:
            raise
    else:
        return "declared" if _libraries else "native"
    # The failed import leaves submodules behind that a second attempt would not bind to the new package.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    import torchvision  # noqa: F401

    _logger.debug(
        "torchvision's native library does not fit torch %s; its operators are unavailable", torch.__version__
    )
    return "declared"


def sam_modeling() -> ModuleType:
    """Return ``segment_anything.modeling`` (ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer, Sam).

    Where segment_anything was imported already it is that module; else only that subpackage is loaded, under a name of
    our own, so that a later ``import segment_anything`` by other code in the process is not affected.
    """
    for name in (_SAM_ALIAS, "segment_anything.modeling"):
        if name in sys.modules:
            return sys.modules[name]
    package = importlib.util.find_spec("segment_anything")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "segment_anything is not installed: run `pip install segment-anything`", name="segment_anything"
        )
    folder = Path(package.submodule_search_locations[0], "modeling")
    spec = importlib.util.spec_from_file_location(
        _SAM_ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"segment_anything has no modeling package at {folder}", name="segment_anything")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_SAM_ALIAS] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_SAM_ALIAS]
        raise
    return module

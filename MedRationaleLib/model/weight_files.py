"""Tensors out of published weight files: .safetensors, or .pth and .bin, of which nothing pickled is run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from MedRationaleLib.errors import InputError

WRAPPERS = ("model", "state_dict")
"""Under these keys training scripts keep the weights beside optimiser and epoch."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What an import made of one file of weights."""

    name: str
    """Of the file."""
    sha256: str
    identity: str | None
    """Which published file it is, by its SHA-256; None where it is none that is known."""
    tensors: int
    """How many of it were taken."""
    parameters: int
    """Numbers in these."""
    changed: tuple[str, ...] = ()
    """What was interpolated, in words."""
    missing: tuple[str, ...] = ()
    """Tensors of the model that the file lacks; they start at random."""
    left_out: tuple[str, ...] = ()
    """Tensors of the file that belong to its model and have no counterpart in this one."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the file that its model does not have, either; left out as well."""


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, in the stored precision and mapped from the file where its format allows.

    `what` names the file in messages: "MedSAM's or SAM's ViT-B weights".
    """
    if not path.is_file():
        raise InputError(f"Expected {what} in {path}, got {'a folder' if path.exists() else 'no file'}; name the file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, what, error) from error
    try:
        mapped = zipfile.is_zipfile(path)  # files by torch before 1.6 are none
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"Expected {what} in {path}, got a file that also holds Python objects ({found[1]}), which are not "
                "loaded because they could run anything; save the model's state_dict alone, and import that."
            ) from error
        raise _damaged(path, what, pickle.UnpicklingError("not a file that torch.save writes of tensors")) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise _damaged(path, what, error) from error
    return _unwrapped(content, path, what)


def _unwrapped(content: Any, path: Path, what: str) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"Expected {what} in {path}, got a file without named tensors; name another file.")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    # DataParallel and DistributedDataParallel put this before every name.
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): v for name, v in tensors.items()}
    return tensors


def _damaged(path: Path, what: str, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "").partition(". ")[0]
    told = f" ({reason[:160]})" if isinstance(error, (RuntimeError, OSError, pickle.UnpicklingError)) and reason else ""
    return InputError(
        f"Expected {what} in {path}, got a file that is damaged, truncated or of another kind{told}; fetch it anew."
    )

"""What is installed, on which devices a model can run, which models and resources are there, and what is wrong.

`report` looks and never raises for what it finds; `render` makes it readable in a terminal. What the report is about is
imported where it is looked at, so that a missing package is reported instead of stopping the report.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from MedRationaleLib import __version__
from MedRationaleLib.errors import InputError
from MedRationaleLib.resources import resource_path

PURPOSES: dict[str, tuple[Literal["", "train"], str]] = {
    "filelock": ("", "one batch at a time in a folder"),
    "jinja2": ("", "report.html"),
    "jsonschema": ("", "checking concept banks, decision trees and assessment.json"),
    "numpy": ("", "arrays"),
    "packaging": ("", "this report"),
    "pillow": ("", "the pictures in report.html"),
    "pydicom": ("", "reading DICOM"),
    "PyYAML": ("", "concept banks and decision trees"),
    "rich": ("", "the command line's tables and progress"),
    "safetensors": ("", "reading models"),
    "scikit-image": ("", "contours and morphology"),
    "scipy": ("", "distances and lesion labels"),
    "segment-anything": ("", "image encoder and mask decoder"),
    "SimpleITK": ("", "reading, resampling and writing volumes"),
    "torch": ("", "running the model"),
    "einops": ("train", "MONAI's Swin UNETR, to compare with"),
    "jsonargparse": ("train", "medrationale-train's configuration"),
    "lightning": ("train", "device and precision while training"),
    "monai": ("train", "segmentation losses"),
    "open_clip_torch": ("train", "computing concept embeddings anew; predict uses those stored in the model"),
    "picai_eval": ("train", "lesion AP and case AUROC"),
    "scikit-learn": ("train", "the likelihood of lesion candidates"),
    "tensorboard": ("train", "training curves"),
    "torchvision": ("train", "importing open_clip and lightning"),
    "transformers": ("train", "BiomedCLIP's text tower"),
}
"""Distribution -> the extra of pyproject.toml that it belongs to ("" = always needed) and what it is used for."""


@dataclass(frozen=True, kw_only=True)
class PackageStatus:
    """One distribution that MedRationale uses."""

    name: str
    extra: Literal["", "train"]
    """"" where predict needs it."""
    purpose: str
    expected: str
    """Version range of pyproject.toml; "" where MedRationale itself is not installed and so the range is not known."""
    version: str | None
    """None where it is not installed."""
    fits: bool
    """Installed and within the range."""


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """One device that torch can use."""

    name: str
    """As torch calls it: "cuda:0", "mps", "cpu"."""
    detail: str
    memory_gib: float | None
    """None where torch does not tell."""
    bf16: bool
    """bfloat16 arithmetic in hardware; emulated it is several times slower than float32."""


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """One folder under Resources/Models."""

    name: str
    folder: Path
    parameters: int
    size_mb: float
    problem: str | None
    """One sentence; None where config.json and model.safetensors can be read."""


@dataclass(frozen=True, kw_only=True)
class ResourceStatus:
    """One concept bank or decision tree."""

    name: str
    summary: str
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """All that the doctor saw."""

    version: str
    python: str
    platform: str
    packages: tuple[PackageStatus, ...]
    torchvision: str
    """How torchvision imports beside this torch, in words."""
    devices: tuple[DeviceStatus, ...]
    models: tuple[ModelStatus, ...]
    resources: tuple[ResourceStatus, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences: what keeps predict from running. Optional parts that are missing are not among them."""
        return tuple(self._problems())

    @property
    def ready(self) -> bool:
        """Whether predict can run."""
        return not self.problems

    def _problems(self) -> Iterator[str]:
        for package in self.packages:
            if not package.extra and not package.fits:
                got = f"{package.version} is installed" if package.version else "it is not installed"
                yield f"Expected {package.name}{package.expected}, but {got}; run `make install` or use pip."
        if not self.devices:
            yield "torch cannot be imported, so that no model can run; install it as README.md says."
        yield from (model.problem for model in self.models if model.problem)
        if not self.models:
            yield "Expected a model folder under Resources/Models, but there is none; install MedRationale again."
        yield from (resource.problem for resource in self.resources if resource.problem)


def report() -> DoctorReport:
    """Look at this Python, its packages and devices, and at the resources. Imports torch where it is installed."""
    packages = _packages()
    installed = {package.name for package in packages if package.version}
    return DoctorReport(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        packages=packages,
        torchvision=_torchvision() if {"torch", "torchvision"} <= installed else "not installed",
        devices=_devices() if "torch" in installed else (),
        models=tuple(inspect_model(folder) for folder in _folders("Models")),
        resources=tuple(_resources()),
    )


def inspect_model(folder: Path) -> ModelStatus:
    """Read a model folder's config.json and the header of its model.safetensors, without torch."""
    parameters, size_mb, problem = 0, 0.0, None
    weights = folder / "model.safetensors"
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        return ModelStatus(
            name=folder.name, folder=folder, parameters=0, size_mb=0.0, problem=f"Models cannot be read: {error}."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("expected an object at the top level")
        size_mb = weights.stat().st_size / 1e6
        with safe_open(weights, framework="np") as tensors:
            parameters = sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else weights.name
        problem = f"Model '{folder.name}': expected {name} in {folder}, but it is missing; copy the folder anew."
    except (OSError, ValueError, SafetensorError) as error:
        problem = f"Model '{folder.name}' cannot be read ({error}); copy the folder {folder} anew."
    return ModelStatus(name=folder.name, folder=folder, parameters=parameters, size_mb=size_mb, problem=problem)


def render(report: DoctorReport) -> RenderableType:
    """Make the report readable; print the result with rich."""
    packages = _table("Packages", "Package", "Installed", "Expected", "Used for")
    for package in report.packages:
        colour = "green" if package.fits else "yellow" if package.extra else "red"
        purpose = f"{package.purpose} ({package.extra})" if package.extra else package.purpose
        packages.add_row(package.name, Text(package.version or "missing", colour), package.expected, purpose)
    devices = _table("Devices", "Device", "What", "Memory", "bfloat16")
    for device in report.devices:
        memory = "" if device.memory_gib is None else f"{device.memory_gib:.0f} GiB"
        devices.add_row(device.name, device.detail, memory, "in hardware" if device.bf16 else "no: float32 is faster")
    models = _table("Models and resources", "Name", "What", "State")
    for model in report.models:
        what = f"{model.parameters / 1e6:.1f} M parameters, {model.size_mb:.1f} MB"
        models.add_row(model.name, what, _state(model.problem))
    for resource in report.resources:
        models.add_row(resource.name, resource.summary, _state(resource.problem))
    verdict = [Text(problem, "red") for problem in report.problems] or [Text("Ready: predict can run.", "green")]
    missing = [package.name for package in report.packages if package.extra and not package.fits]
    if missing:
        verdict.append(Text(f"Training needs what is missing or too old: {', '.join(missing)}.", "yellow"))
    return Group(
        Text(f"MedRationale {report.version}, Python {report.python}, {report.platform}", "bold"),
        *(packages, Text(f"torchvision: {report.torchvision}\n", "dim"), devices, models),
        *verdict,
    )


def _packages() -> tuple[PackageStatus, ...]:
    try:
        lines = metadata.requires("medrationale") or []
    except metadata.PackageNotFoundError:
        lines = []
    ranges = {canonicalize_name(need.name): need.specifier for need in map(Requirement, lines)}
    found = []
    for name, (extra, purpose) in PURPOSES.items():
        allowed = ranges.get(canonicalize_name(name))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and (allowed is None or allowed.contains(version, prereleases=True))
        found.append(
            PackageStatus(
                name=name, extra=extra, purpose=purpose, expected=str(allowed or ""), version=version, fits=fits
            )
        )
    return tuple(found)


def _torchvision() -> str:
    try:
        from MedRationaleLib.model.torchvision_guard import ensure_torchvision

        state = ensure_torchvision()
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not import ({error}); only training needs it"
    if state == "native":
        return "fits this torch"
    return "built for another torch; imports with its operators declared but unavailable, which nothing here calls"


def _devices() -> tuple[DeviceStatus, ...]:
    try:
        import torch
    except (ImportError, OSError):
        return ()
    found = []
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gib = gpu.total_memory / 2**30
            found.append(DeviceStatus(name=f"cuda:{index}", detail=gpu.name, memory_gib=gib, bf16=bf16))
    if torch.backends.mps.is_available():
        found.append(DeviceStatus(name="mps", detail="Apple GPU", memory_gib=None, bf16=False))
    detail = f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (*found, DeviceStatus(name="cpu", detail=detail, memory_gib=None, bf16=bf16))


def _folders(name: str) -> list[Path]:
    try:
        return sorted(path for path in resource_path(name).iterdir() if path.is_dir())
    except InputError:
        return []


def _resources() -> Iterator[ResourceStatus]:
    yield _resource("Concepts/prostate.yaml", _concepts)
    for tree in ("pirads_v2_1", "paper_appendix_c"):
        yield _resource(f"DecisionTrees/{tree}.yaml", partial(_tree, tree))


def _concepts() -> str:
    from MedRationaleLib.concepts import ConceptBank

    return f"{len(ConceptBank.load())} concepts"


def _tree(name: str) -> str:
    from MedRationaleLib.decision_tree import DecisionTree

    return f"{len(DecisionTree.load(name).nodes)} nodes"


def _resource(name: str, summarise: Callable[[], str]) -> ResourceStatus:
    try:
        return ResourceStatus(name=name, summary=summarise(), problem=None)
    except InputError as error:
        return ResourceStatus(name=name, summary="", problem=str(error))
    except ImportError as error:
        return ResourceStatus(name=name, summary="", problem=f"{name} cannot be checked: {error}.")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(problem: str | None) -> Text:
    return Text("cannot be used, see below", "red") if problem else Text("ok", "green")

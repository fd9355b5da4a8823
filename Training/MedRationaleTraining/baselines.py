"""Networks to compare with (paper, Table 1), trained on the same examples by the same loop; they give no reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.networks.nets import BasicUNet, SwinUNETR
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import atomic_path, check_writable, write_text
from MedRationaleLib.model.checkpoint import CONFIG, WEIGHTS
from MedRationaleLib.model.config import CLASSES
from MedRationaleLib.model.precision import autocast, check_device
from MedRationaleLib.postprocessing import PostprocessingConfig, Sequences
from MedRationaleTraining.calibration import calibrate_masks
from MedRationaleTraining.data.stacks import MASK_PIXELS, make_stack, whole_exam
from MedRationaleTraining.data.synthetic import StoredExam, stored_exams
from MedRationaleTraining.evaluation import (
    assess_masks,
    diffusion,
    header,
    mean_of_mirrored,
    raw_dice,
    summarise_masks,
    true_masks,
)
from MedRationaleTraining.evaluation_tables import markdown
from MedRationaleTraining.objective import MaskObjective
from MedRationaleTraining.trainer import STATE, Trainer, read_state

KIND = "baseline"


class SegmentationBaseline(nn.Module):
    """BasicUNet (Falk et al., 2019) or Swin UNETR (Hatamizadeh et al., 2022) in 2-D, slice by slice."""

    def __init__(self, name: Literal["unet", "swin_unetr"]) -> None:
        super().__init__()
        self.name = name
        if name == "unet":
            self.network: nn.Module = BasicUNet(spatial_dims=2, in_channels=3, out_channels=len(CLASSES))
        else:
            self.network = SwinUNETR(spatial_dims=2, in_channels=3, out_channels=len(CLASSES), feature_size=24)
        self.to(memory_format=torch.channels_last)  # as ours

    def forward(self, images: Tensor) -> Tensor:
        """(B, S, 3, H, W) -> (B, S, classes, 128, 128) logits, of the size that the masks of the examples have."""
        logits = self.network(images.flatten(0, 1))
        logits = nn.functional.interpolate(logits, (MASK_PIXELS,) * 2, mode="area")
        return logits.unflatten(0, images.shape[:2])


class BaselineTrainer(Trainer):
    """Runs `fit` for a baseline."""

    def _build(self) -> MaskObjective:
        assert self.config.baseline is not None
        return MaskObjective(SegmentationBaseline(self.config.baseline), self.config)

    def _averaged(self) -> nn.Module:
        return self.ema.module.eval()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        model, rows = self._averaged(), []
        for path in stored_exams(str(self.config.val), self.config.validation_cases):
            stack = whole_exam(StoredExam.open(path))
            with self.fabric.autocast():
                logits = model(stack.images[None].to(self.fabric.device))[0]
            rows.append(raw_dice(logits, stack))
        model.train()
        return {f"dice_{name}": float(np.nanmean([row[name] for row in rows])) for name in CLASSES}


def export_baseline(run: Path, out: Path, *, name: Literal["unet", "swin_unetr"], calibrate_on: str | None) -> Path:
    """Write config.json and model.safetensors of the run's averaged weights, thresholds chosen as for the model."""
    check_writable(out)
    state = read_state(run / STATE)
    model = SegmentationBaseline(name)
    model.load_state_dict({k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")})
    model.half().float().eval()
    postprocessing: dict[str, float] = {}
    if calibrate_on is not None:
        postprocessing = calibrate_masks(_masks(model, calibrate_on, None, "cpu"), calibrate_on).postprocessing
    weights = save({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()})
    about = {
        KIND: name,
        "steps": int(state["step"]),
        "postprocessing": postprocessing,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / WEIGHTS) as path:
        path.write_bytes(weights)
    write_text(out / CONFIG, json.dumps(about, indent=1) + "\n")
    return out


def is_baseline(folder: str | Path) -> bool:
    """Whether a model folder holds a baseline."""
    try:
        return KIND in json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def evaluate_baseline(
    folder: str | Path, data: str | Path, out: Path, *, cases: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Masks and detection of a baseline, as `evaluate` measures them; evaluation.json and evaluation.md in `out`."""
    stored_exams(data, cases)
    check_device(device)
    check_writable(out)
    folder = Path(folder)
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        model = SegmentationBaseline(about[KIND])
        model.load_state_dict(load((folder / WEIGHTS).read_bytes()))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"Expected the weights of a {about[KIND]} in {folder}, got others; train it anew.") from error
    model = model.float().to(device).eval()
    config = PostprocessingConfig(**about["postprocessing"])
    results = [assess_masks(*found, config)[0] for found in _masks(model, data, cases, device)]
    report = header(about[KIND], about["weights_sha256"], Path(data), len(results), config)
    report["metrics"] = summarise_masks(results, config)
    report = json.loads(json.dumps(report, allow_nan=False))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "evaluation.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "evaluation.md", markdown(report))
    return report


@torch.no_grad()
def _masks(
    model: SegmentationBaseline, data: str | Path, cases: int | None, device: str
) -> Iterator[tuple[np.ndarray, np.ndarray, Sequences]]:
    """(4, S, 256, 256) probabilities, averaged with those of the mirror image, truth, and ADC and DWI."""
    for path in track(stored_exams(data, cases), "Assessing"):
        exam = StoredExam.open(path)
        images = whole_exam(exam).images
        with autocast(device):
            # A slice and its mirror image at a time: all at once take a CPU twice as long.
            pairs = torch.stack([images, images.flip(-1)]).to(device).split(1, dim=1)
            logits = torch.cat([model(pair) for pair in pairs], dim=1).float()
        probabilities = mean_of_mirrored(logits.sigmoid())
        full = nn.functional.interpolate(probabilities, images.shape[-2:], mode="bilinear", align_corners=False)
        stored, valid, labels, _ = make_stack(exam, 0, len(exam.labels))
        masks = full.permute(1, 0, 2, 3).cpu().numpy() * valid[0]
        yield masks, true_masks(labels, valid[0]), diffusion(stored, valid)

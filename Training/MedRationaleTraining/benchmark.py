"""How fast SAM's encoder and a whole study are, against segment_anything's own and MONAI's networks, in one run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import check_writable, write_text
from MedRationaleLib.inference import Predictor
from MedRationaleLib.model.checkpoint import save_checkpoint
from MedRationaleLib.model.config import ModelConfig, medsam_biomedclip
from MedRationaleLib.model.precision import autocast, bf16_in_hardware, check_device, faster
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model.torchvision_guard import sam_modeling
from MedRationaleLib.phantom import write_phantom
from MedRationaleLib.preprocessing import prepare
from MedRationaleLib.study import Study
from MedRationaleTraining.baselines import SegmentationBaseline
from MedRationaleTraining.config import BenchmarkConfig, FitConfig
from MedRationaleTraining.provenance import commit
from MedRationaleTraining.training_cost import alone, peak_gb, training_cost

STOCK = "segment_anything"
ENCODERS: dict[str, tuple[str, bool]] = {
    "float32": ("float32", False),
    "bf16": ("bfloat16", False),
    "bf16_compiled": ("bfloat16", True),
    "int8": ("int8", False),
}
"""Name -> precision and whether it is compiled."""
MIRRORED = 2
"""Every slice is looked at with its mirror image."""
PHANTOM = 2
"""Seed of the study: a gland of 52 ml, where the median of PI-CAI's 1,500 is 51 ml."""


def measure(config: BenchmarkConfig, command: str = "", fit: FitConfig | None = None) -> dict[str, Any]:
    """Measure, write `out`/cpu.json (gpu.json elsewhere) with its plot, and return what is in it.

    What is measured is kept at once (cpu.part.json), and the same call after a stop goes on from there.

    Args:
        config: what is measured.
        command: how this was called, for the record.
        fit: what `config.training` names; None measures no training.
    """
    if min(config.rounds, config.steps, config.depth, *config.batches, config.pixels, 1) < 1 or config.pixels % 16:
        raise InputError(
            "Expected rounds, steps, layers and batches of at least 1 and pixels that are a multiple of 16, got "
            f"{config.rounds}, {config.steps}, {config.depth}, {config.batches} and {config.pixels}; correct the "
            "options."
        )
    check_device(config.device)
    if config.case is not None:
        Study.from_case(Path(config.case))  # one that cannot be read is refused before anything is measured
    out = Path(config.out)
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    name = "cpu" if config.device == "cpu" else "gpu"
    part = out / f"{name}.part.json"
    settings = {k: v for k, v in asdict(config).items() if k != "out"}
    about = {"format": 1, "command": command, "commit": commit(), "settings": settings, **_machine(config)}
    record = _go_on(part, about)

    def keep(measured: str, make: Callable[[], Any]) -> None:
        if measured not in record:
            record[measured] = make()
            write_text(part, json.dumps(record, indent=1, allow_nan=False) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        case = Path(config.case) if config.case else Path(folder) / "phantom"
        if config.case is None:
            write_phantom(case, seed=PHANTOM)
        keep("encoder", lambda: _encoder(large_model(config), config))
        keep("compact", lambda: _compact(case, Path(folder), config))
        if fit is not None:
            keep("training", lambda: training_cost(fit, config))
        if config.study:
            large = Path(folder) / "large"
            save_checkpoint(large_model(config), large, card="", vocabulary=[], training={"steps": 0})
            keep("study", lambda: _study(large, Study.from_case(case), config))
            if config.memory:
                keep("study_peak_gb", lambda: alone(_study_peak, large, case, config))
    write_text(out / f"{name}.svg", plot(record))
    part.replace(out / f"{name}.json")
    return record


def _go_on(part: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call that was stopped has measured here, with the same code and settings; else the beginning."""
    if part.exists():
        earlier: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
        if {name: earlier.get(name) for name in begun if name != "command"} == {
            name: value for name, value in begun.items() if name != "command"
        }:
            return earlier
    return begun


def large_model(config: BenchmarkConfig) -> RationaleModel:
    """The paper's model with random weights, relative positions included: times do not depend on weights."""
    sizes: ModelConfig = replace(
        medsam_biomedclip(),
        pixels=config.pixels,
        depth=config.depth,
        global_attention=tuple(i for i in (2, 5, 8, 11) if i < config.depth),
    )
    torch.manual_seed(0)
    model = RationaleModel(sizes, list(ConceptBank.load())).eval()
    for name, parameter in model.f_img.named_parameters():
        if "rel_pos" in name:
            nn.init.trunc_normal_(parameter, std=0.02)
    model.concept_embeddings.copy_(nn.functional.normalize(torch.randn_like(model.concept_embeddings), dim=1))
    return model.to(config.device)


def stock_encoder(model: RationaleModel) -> nn.Module:
    """segment_anything's ImageEncoderViT with the same weights."""
    c = model.config
    encoder = sam_modeling().ImageEncoderViT(
        img_size=c.pixels, patch_size=c.patch, embed_dim=c.embed_dim, depth=c.depth, num_heads=c.heads, mlp_ratio=4,
        out_chans=c.neck_dim, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True,
        window_size=c.window, global_attn_indexes=c.global_attention,
    )  # fmt: skip
    encoder.load_state_dict(model.f_img.state_dict())
    return encoder.eval().to(next(model.parameters()).device)


# ------------------------------------------------------------------ the encoder


def _encoder(model: RationaleModel, config: BenchmarkConfig) -> dict[str, Any]:
    """Seconds, ratio, error and memory of one slice through each encoder."""
    calls = {name: _encode(model, name, config) for name in _encoders(config)}
    results = {name: call() for name, call in calls.items()}  # compiled and warmed up here
    seconds = _in_turn(calls, config, "Encoder")
    exact = results[STOCK].float()
    rows: dict[str, Any] = {"pixels": config.pixels, "layers": config.depth}
    for name, of_rounds in seconds.items():
        rows[name] = {"seconds": _spread(of_rounds)}
        if config.memory:
            rows[name]["peak_rss_gb"] = alone(_peak, name, config)
        if name != STOCK:
            rows[name] |= _ratios(seconds[STOCK], of_rounds) | {
                "relative_error": float((results[name].float() - exact).abs().max() / exact.abs().max()),
            }
    return rows


def _encoders(config: BenchmarkConfig) -> list[str]:
    """Those that are worth a time here: bfloat16 that is only emulated takes minutes a slice."""
    emulated = not bf16_in_hardware(config.device)
    names = [STOCK, *(n for n, (precision, _) in ENCODERS.items() if not (emulated and precision == "bfloat16"))]
    if not config.compiled and not emulated:
        names.remove("bf16_compiled")
    if config.device != "cpu":
        names.remove("int8")
    return names


def _encode(model: RationaleModel, name: str, config: BenchmarkConfig) -> Callable[[], Tensor]:
    """A call that takes one slice through the encoder of that name."""
    image = torch.randn(1, 1, 3, config.pixels, config.pixels, generator=torch.Generator().manual_seed(1))
    image = image.to(config.device)
    if name == STOCK:
        encoder, given, context = stock_encoder(model), image[0], autocast(config.device, "float32")
    else:
        precision, compiled = ENCODERS[name]
        encoder, given = faster(model, config.device, precision, compiled=compiled).f_img, image
        context = autocast(config.device, precision)

    def call() -> Tensor:
        with torch.inference_mode(), context:
            found: Tensor = encoder(given)
        if config.device == "cuda":
            torch.cuda.synchronize()
        return found

    return call


def _peak(name: str, config: BenchmarkConfig) -> float:
    """Largest memory in GB of this process, which takes one slice through the encoder of that name."""
    _encode(large_model(config), name, config)()
    return peak_gb(config.device)


# ------------------------------------------------------------------ a study


def _study(model: Path, study: Study, config: BenchmarkConfig) -> dict[str, Any]:
    """A whole examination: crop to masks and similarities, with and without the slices that have no gland.

    segment_anything's time is that of its encoder alone: of one slice, which has its turn in every round, by the number
    of slices and mirror images.
    """
    predictor = Predictor.load(model, device=config.device)
    given = prepare(study, predictor.spec)
    slices = len(given.images)
    near = predictor.near_gland(given)
    small = torch.nn.functional.interpolate(torch.from_numpy(given.images), (256, 256), mode="bilinear")
    pair = torch.stack([small, small.flip(-1)]).to(config.device)
    calls: dict[str, Callable[[], object]] = {
        STOCK: _encode(large_model(config), STOCK, config),
        "ungated": lambda: predictor.network(given),
        "gated": lambda: predictor.network(given, predictor.near_gland(given)),
    }
    if "bf16_compiled" in _encoders(config):
        compiled = Predictor.load(model, device=config.device, compiled=True)
        compiled.network(given, np.arange(slices) == 0)  # compiled here
        calls["gated_compiled"] = lambda: compiled.network(given, compiled.near_gland(given))
    for name in ("unet", "swin_unetr"):
        network = SegmentationBaseline(name).eval().to(config.device)  # type: ignore[arg-type]
        _segment(network, pair[:, :1], config.device)  # warmed up
        calls[name] = partial(_segment, network, pair, config.device)
    calls[STOCK]()  # warmed up
    seconds = _in_turn(calls, config, "Study")
    stock = np.array(seconds.pop(STOCK)) * slices * MIRRORED
    return {
        "slices": slices,
        "slices_near_gland": slices if near is None else int(near.sum()),
        f"{STOCK}_encoder_s": _spread(stock.tolist()),
        **{name: {"seconds": _spread(s)} | _ratios(stock, s) for name, s in seconds.items()},
    }


def _study_peak(model: Path, case: Path, config: BenchmarkConfig) -> float:
    """Largest memory in GB of this process, which takes a whole examination, all slices, through the large model."""
    predictor = Predictor.load(model, device=config.device, all_slices=True)
    predictor.network(prepare(Study.from_case(case), predictor.spec))
    return peak_gb(config.device)


@torch.inference_mode()
def _segment(network: nn.Module, stacks: Tensor, device: str) -> Tensor:
    with autocast(device):
        found: Tensor = network(stacks)
    if device == "cuda":
        torch.cuda.synchronize()
    return found


def _compact(case: Path, folder: Path, config: BenchmarkConfig) -> dict[str, Any]:
    """`medrationale predict` with the shipped model, from its start to its end, and the model's part of that."""
    seconds, model_s = [], []
    for index in range(config.rounds):
        out = folder / f"predicted{index}"
        command = [sys.executable, "-m", "MedRationaleLib.cli", "predict", "--case", str(case), "--out", str(out)]
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, "--quiet", "--device", config.device], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InputError(f"Expected an examination that can be assessed in {case}, got: {done.stderr.strip()}")
        seconds.append(time.perf_counter() - begun)
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        model_s.append(float(manifest["timings_s"]["model"]))
    whole, model = _spread(seconds), _spread(model_s)
    return {
        "predict_s": whole["median"],
        "model_s": model["median"],
        "predict_s_range": [whole["min"], whole["max"]],
        "model_s_range": [model["min"], model["max"]],
    }


# ------------------------------------------------------------------ figures


def _in_turn(calls: Mapping[str, Callable[[], object]], config: BenchmarkConfig, title: str) -> dict[str, list[float]]:
    """Name -> seconds of each round; in a round everything has its turn, so that a busy moment meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=config.rounds * len(calls))
        for _ in range(config.rounds):
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begun)
                progress.advance(task)
    return seconds


def _ratios(stock: Sequence[float] | np.ndarray, seconds: Sequence[float]) -> dict[str, Any]:
    """Times as fast as segment_anything's, round by round, and the median of that."""
    ratios = np.divide(stock, seconds)
    return {"ratio": float(np.median(ratios)), "ratios": [round(float(r), 3) for r in ratios]}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    values = {"median": np.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(float(value), 4) for name, value in values.items()}


def _machine(config: BenchmarkConfig) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if config.device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_in_hardware": bf16_in_hardware(config.device),
    }
    versions = {name: metadata.version(name) for name in ("torch", "segment-anything", "monai", "medrationale")}
    return {"machine": found, "versions": versions, "rounds": config.rounds}


def rows(record: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(name, times as fast as segment_anything, the rest in words) of everything that has a ratio."""
    found = []
    for part, title in (("encoder", "encoder"), ("study", "study")):
        for name, row in record.get(part, {}).items():
            if isinstance(row, dict) and "ratio" in row:
                seconds = row["seconds"]
                told = f"{seconds['median']:.3g} s ({seconds['min']:.3g} to {seconds['max']:.3g})"
                if "relative_error" in row:
                    told += f", error {row['relative_error']:.1e}"
                if row.get("peak_rss_gb"):
                    told += f", peak {row['peak_rss_gb']:.1f} GB"
                found.append((f"{title}, {name.replace('_', ' ')}", float(row["ratio"]), told))
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown, as in the README: every ratio, the shipped model, and the training step where it was measured."""
    machine, compact = record["machine"], record["compact"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {record['versions']['torch']}; medians of "
        f"{record['rounds']} rounds taken in turn (least to most).",
        "",
        "| | times as fast as segment_anything's | |",
        "|---|---|---|",
        *(f"| {name} | {ratio:.2f} | {told} |" for name, ratio, told in rows(record)),
        "",
        f"`predict` with the shipped model: {compact['predict_s']:.1f} s, of which the model takes "
        f"{compact['model_s']:.1f} s.",
    ]
    if record.get("study_peak_gb"):
        lines[-1] += f" Peak memory of a whole study of {record['study']['slices']} slices through ViT-B: "
        lines[-1] += f"{record['study_peak_gb']:.1f} GB."
    if not machine["bf16_in_hardware"]:
        lines[-1] += " bf16 is left out: this machine would only emulate it."
    if "training" in record:
        lines += ["", "| trained | slices at once | seconds a step | peak memory |", "|---|---|---|---|"]
        for row in record["training"]:
            step = row["step"]
            told = (
                "out of memory, or killed | " if step is None else f"{step['seconds']:.1f} | {step['peak_gb']:.1f} GB"
            )
            lines.append(f"| {row['tuning']} | {row['slices']} | {told} |")
    return "\n".join(lines) + "\n"


def plot(record: Mapping[str, Any]) -> str:
    """SVG: a bar for each ratio."""
    bars, line, left, width = rows(record), 26, 190, 380
    largest = max([ratio for _, ratio, _ in bars], default=1.0)
    machine = record["machine"]
    title = f"Times as fast as segment_anything's encoder: {machine['device']}, {machine['threads']} threads"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{line * (len(bars) + 2)}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="8" y="18" font-weight="bold" font-size="13">{escape(title)}</text>',
    ]
    for index, (name, ratio, told) in enumerate(bars, start=1):
        y, length = line * index + 6, width * ratio / largest
        parts.append(
            f'<text x="8" y="{y + 14}">{escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{line - 8}" fill="#2c5aa0"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 14}">{ratio:.2f} '
            f'<tspan fill="#666">{escape(told)}</tspan></text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"

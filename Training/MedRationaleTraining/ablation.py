"""The paper's Table 5: what each constraint does, over several seeds, from one warm-up."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from scipy.stats import t as student

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import check_writable, write_text
from MedRationaleLib.model.checkpoint import load_checkpoint
from MedRationaleLib.model.precision import autocast
from MedRationaleTraining.config import ConstraintConfig, FitConfig, check
from MedRationaleTraining.constraints import RationaleConstraints, violation
from MedRationaleTraining.data.stacks import Stack, StackDataset
from MedRationaleTraining.data.synthetic import describe_set, stored_exams
from MedRationaleTraining.evaluation import evaluate
from MedRationaleTraining.export import export_run
from MedRationaleTraining.provenance import commit
from MedRationaleTraining.trainer import OF_A_MACHINE, Trainer

_logger = logging.getLogger(__name__)
METRICS = "metrics.json"
ARM = "arm.json"
"""In the folder of a run: what it is made `of`, and its figures once they are measured, `on` what."""
ARMS = {
    "none": "without constraints",
    "disentangle": "disentanglement only",
    "both": "disentanglement and localisation, each map contained (ours)",
    "penalty": "ours as fixed penalties",
    "paper": "ours without containment (the paper's two)",
}
FIGURES = {
    "rma": "visual evidence (RMA)",
    "lesion_dice": "lesion Dice",
    "lesion_dice_at_1_fp": "lesion Dice at one false candidate an examination",
    "lesion_ap": "lesion average precision",
    "gland_dice": "gland Dice",
    "inconsistency": "slices on which mask and rationale contradict each other",
    "max_violation": "largest violation in training, in epsilon",
    "max_violation_test": "the same on test examinations",
}
MOST = ("max_violation", "max_violation_test")
"""Figures that are 0 or more and nothing like normal: in the table, the largest of all seeds stands beside the mean."""
SETTINGS = ("steps", "batch", "sampling", "constraints", "tuning", "optimizer")
"""Of a run, in metrics.json."""
STACKS, OTHER_SEED = 400, 1_000_000
"""Examples that the violations in training are of: drawn as the training's, but not the same ones."""


def arms(folder: Path, base: ConstraintConfig) -> dict[str, ConstraintConfig]:
    """Arm -> constraints: the base's with what FOLDER/<arm>.yaml names."""
    known = {f.name for f in fields(ConstraintConfig)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ConstraintConfig, "c")
    found = {}
    for arm in ARMS:
        path = folder / f"{arm}.yaml"
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise InputError(
                f"Expected the settings of an arm in {path}, got {type(error).__name__}; name their folder by --arms."
            ) from error
        if not isinstance(given, dict) or not given.keys() <= known:
            raise InputError(f"Expected settings of `constraints` in {path}, got others; `fit --help` lists them.")
        try:
            typed = parser.parse_object({"c": asdict(base) | given}).c
        except ArgumentError as error:
            raise InputError(f"Expected settings of `constraints` in {path}, got: {error.message}") from error
        found[arm] = ConstraintConfig(**typed.as_dict())
    return found


def ablate(
    config: FitConfig,
    folder: Path,
    test: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    only: Sequence[str] = tuple(ARMS),
    cases: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and measure every arm with every seed; what is trained already is at most measured anew.

    Args:
        config: of one run, with the warmed-up model in `initial`; `out` holds a folder for each run.
        folder: settings of the arms, see `arms`.
        test: synthetic set that the figures come from.
        seeds: of examples and phrasings.
        only: which arms; every one's violations are those of "both".
        cases: only the first so many examinations of the test set.
        command: how this was called, for the record.

    Returns what is written to metrics.json in `out`.
    """
    if not only or not set(only) <= ARMS.keys():
        raise InputError(f"Expected some of the arms {', '.join(ARMS)}, got {', '.join(only) or 'none'}.")
    chosen = arms(folder, config.constraints)
    for arm in chosen.values():
        check(replace(config, constraints=arm))
    if config.val is None:
        raise InputError("Expected a validation set for the thresholds of each arm, got none; give --val.")
    if not seeds:
        raise InputError("Expected at least one seed, got none; correct --seeds.")
    cases = len(stored_exams(test, cases))
    stored_exams(config.val, config.validation_cases)
    if config.initial is None:
        _logger.warning("no --initial: every arm begins from random weights, not from a warmed-up model")
    initial = load_checkpoint(config.initial).sha256 if config.initial else None
    out = Path(config.out)
    check_writable(out)
    runs = [
        (arm, replace(config, constraints=chosen[arm], seed=seed, out=str(out / arm / f"seed{seed}")))
        for arm in ARMS
        if arm in only
        for seed in seeds
    ]
    for _, run in runs:
        _begun(run)
    commits = set()
    values: dict[str, dict[str, list[float | None]]] = {arm: {f: [] for f in FIGURES} for arm, _ in runs}
    for arm, run in runs:
        _logger.info("arm %s, seed %d", arm, run.seed)
        measured = _measure(run, chosen["both"], test, cases)
        commits.add(measured["commit"] or "unknown")
        for figure, value in measured["figures"].items():
            values[arm][figure].append(value)
    record = {
        "format": 2,
        "command": command,
        "commit": ", ".join(sorted(commits)),
        "initial_sha256": initial,
        "seeds": list(seeds),
        "split": {k: describe_set(test)[k] for k in ("name", "split", "seed")} | {"examinations": cases},
        "settings": {k: v for k, v in asdict(config).items() if k in SETTINGS},
        "figures": FIGURES,
        "ablation": {arm: {f: _over_seeds(v) for f, v in rows.items()} for arm, rows in values.items()},
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_text(out / METRICS, text)
    written: dict[str, Any] = json.loads(text)
    return written


def _begun(config: FitConfig) -> dict[str, Any]:
    """What is known of a run, from its folder or from its settings; refuses one that was begun with others."""
    run = Path(config.out)
    path, of = run / ARM, _what(config)
    if not path.exists():
        return {"of": of}
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if known["of"] != of:
        changed = sorted(k for k in of if known["of"].get(k) != of[k])
        raise InputError(
            f"Expected in {run} a run of the given settings, got one with other {', '.join(changed)}; "
            "choose another `out`, or remove that folder."
        )
    return known


def _measure(config: FitConfig, ours: ConstraintConfig, test: str | Path, cases: int) -> dict[str, Any]:
    """Train and measure one run; what is trained is not trained again, nor measured again on the same examinations."""
    run = Path(config.out)
    path, model = run / ARM, run / "model"
    known = _begun(config)
    on = {"test": describe_set(test), "cases": cases, "violations": asdict(ours), "figures": FIGURES}
    on = json.loads(json.dumps(on))
    if known.get("on") == on:
        return known
    if "on" not in known:
        run.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(known, indent=1) + "\n")
        Trainer(replace(config, val=None)).fit()  # no curves: what it comes to is measured at once
        export_run(run, model, calibrate_on=config.val, cases=config.validation_cases)
    report = evaluate(model, test, run / "test", cases=cases, gradcam=False, distance=ours.distance)
    known["on"] = on
    known["commit"] = commit()
    known["figures"] = {
        "rma": report["evidence"]["rma_lesion"]["value"],
        "lesion_dice": report["metrics"]["dice_lesion"]["value"],
        "lesion_dice_at_1_fp": report["metrics"]["dice_lesion_at_1_fp"]["value"],
        "lesion_ap": report["metrics"]["lesion_ap"]["value"],
        "gland_dice": report["metrics"]["dice_gland"]["value"],
        "inconsistency": report["inconsistency"]["slices"]["value"],
    }
    _logger.info("measuring the constraints on %d other stacks of the training examinations", STACKS)
    dataset = StackDataset(config.train, config.sampling, length=STACKS, seed=OTHER_SEED)
    known["violations"] = {
        "max_violation": violations(model, (dataset[index] for index in range(STACKS)), ours),
        "max_violation_test": {n: violation(n, row["value"], ours) for n, row in report["constraints"].items()},
    }
    known["figures"] |= {figure: max(found.values(), default=None) for figure, found in known["violations"].items()}
    write_text(path, json.dumps(known, indent=1, allow_nan=False) + "\n")
    return known


def _what(config: FitConfig) -> dict[str, Any]:
    """All that the weights and thresholds of a run depend on but the code, as JSON has it."""
    settings = {k: v for k, v in asdict(config).items() if k not in (*OF_A_MACHINE, "train", "initial")}
    what = settings | {
        "train": [describe_set(folder) for folder in config.train],
        "val": describe_set(str(config.val)),
        "validation_cases": config.validation_cases,
        "initial": load_checkpoint(config.initial).sha256 if config.initial else None,
    }
    constraints = config.constraints
    if not (constraints.disentangle or constraints.localise):  # nothing else of them has a say
        what["constraints"] = {"disentangle": False, "localise": False, "heat": constraints.heat}
    known: dict[str, Any] = json.loads(json.dumps(what))
    return known


@torch.no_grad()
def violations(model: str | Path, stacks: Iterable[Stack], constraints: ConstraintConfig) -> dict[str, float]:
    """Constraint -> max(mean g, 0) over the stacks in which it occurs, in units of its epsilon; 0 where it is held.

    Measured alike for every arm, also for constraints that an arm was not trained with.
    """
    network = load_checkpoint(model).model
    compute = RationaleConstraints(constraints, DecisionTree.load(), network.concepts)
    values: dict[str, list[float]] = defaultdict(list)
    for index, stack in enumerate(track(stacks, "Constraints", total=None)):
        with autocast("cpu"):
            output = network(stack.images[None])
        found = compute(network, output, [stack], network.concept_embeddings, np.random.default_rng(index))
        for name, g in found.items():
            values[name].append(float(g))
    return {name: max(float(np.mean(g)), 0.0) for name, g in values.items()}


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds (Student's t); None where a figure is not defined."""
    defined = [v for v in values if v is not None]
    if not defined:
        return {"mean": None, "ci95": None, "per_seed": list(values)}
    mean, ci95 = float(np.mean(defined)), None
    if len(defined) > 1:
        half = float(student.ppf(0.975, len(defined) - 1) * np.std(defined, ddof=1) / len(defined) ** 0.5)
        ci95 = [mean - half, mean + half]
    return {"mean": mean, "ci95": ci95, "per_seed": list(values)}


def _cell(figure: str, row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "–"
    if figure in MOST:
        return f"{row['mean']:.3f} (up to {max(v for v in row['per_seed'] if v is not None):.3f})"
    half = f" ± {(row['ci95'][1] - row['ci95'][0]) / 2:.3f}" if row["ci95"] else ""
    return f"{row['mean']:.3f}{half}"


def table(record: Mapping[str, Any]) -> str:
    """Markdown, as in the README."""
    figures = record["figures"]
    lines = ["| | " + " | ".join(figures.values()) + " |", "|---" * (len(figures) + 1) + "|"]
    for arm, rows in record["ablation"].items():
        lines.append(f"| {ARMS[arm]} | " + " | ".join(_cell(f, rows[f]) for f in figures) + " |")
    return "\n".join(lines) + "\n"


def terminal_table(record: Mapping[str, Any]) -> Table:
    """The same, lying on its side so that it is read in 80 columns."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("", *record["ablation"]):
        shown.add_column(head, overflow="fold", min_width=len(head))
    for figure, meaning in record["figures"].items():
        shown.add_row(meaning, *(_cell(figure, rows[figure]) for rows in record["ablation"].values()))
    return shown

"""The training loop: Eq. 2 on synthetic stacks, resumable at any step."""

from __future__ import annotations

import csv
import json
import logging
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import write_text
from MedRationaleLib.model.checkpoint import load_checkpoint
from MedRationaleLib.model.precision import bf16_in_hardware
from MedRationaleLib.model.rationale_model import ModelOutput, RationaleModel
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleLib.model.torchvision_guard import ensure_torchvision
from MedRationaleTraining.config import FitConfig, check
from MedRationaleTraining.constraints import RationaleConstraints
from MedRationaleTraining.data.stacks import Stack, StackDataset, slice_answers
from MedRationaleTraining.data.synthetic import describe_set, stored_exams
from MedRationaleTraining.lagrangian import Multipliers, as_record, summary
from MedRationaleTraining.losses import NodeTargets, SegmentationLoss, info_nce
from MedRationaleTraining.phrases import all_phrases, draw_phrases, draw_rationale

ensure_torchvision()
from lightning.fabric import Fabric, seed_everything  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402

_logger = logging.getLogger(__name__)
STATE, RUN = "state.ckpt", "run.json"
KKT = "kkt.json"
HEAT_FASTER = 10.0
"""How much larger the learning rate of the heatmaps' a and b is, two numbers that have to travel far."""
SPEED_AFTER = 50
"""Steps after which the loader's speed is told."""


OF_A_MACHINE = ("out", "workers", "save_every", "validate_every", "validation_cases", "val", "accelerator")
"""Settings that say nothing about the weights."""


class Objective:
    """All terms of Eq. 2 for one batch, and the constraints of Eq. 3."""

    def __init__(self, config: FitConfig, bank: ConceptBank, tree: DecisionTree) -> None:
        self._config = config.loss
        self._seed = config.seed
        self._phrases = all_phrases(bank)
        self._segmentation = SegmentationLoss(config.loss)
        self.nodes = NodeTargets(tree, list(bank))
        self.constraints = RationaleConstraints(config.constraints, tree, list(bank))
        self._start = config.constraints.start

    def __call__(
        self, model: RationaleModel, output: ModelOutput, stacks: list[Stack], step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Name -> weighted scalar, whose sum is the objective, and name -> g of each constraint that occurs."""
        rng = np.random.default_rng((self._seed, step, 7))
        device = output.embedding.device
        masks = torch.stack([s.masks for s in stacks]).to(device)
        size = output.mask_logits.shape[-2:]
        if masks.shape[-2:] != size:
            masks = torch.nn.functional.interpolate(masks.flatten(0, 1), size, mode="area").unflatten(
                0, masks.shape[:2]
            )
        known = torch.stack([s.known for s in stacks]).repeat_interleave(masks.shape[1], 0).to(device)
        dice, focal = self._segmentation(output.mask_logits.flatten(0, 1), masks.flatten(0, 1), known)

        scale = model.logit_scale.exp().clamp(max=100)
        encoder = cast(TextEncoder, model.f_txt)
        answers = [a for s in stacks for a in s.answers]
        train_text = step % self._config.text_every == 0
        if train_text:
            sentences = [draw_rationale(a, self._phrases, rng) for a in answers]
            texts = draw_phrases(self._phrases, rng)
            tokens = encoder.tokenize(texts + sentences).to(device)
            encoded = encoder(tokens)
            concepts, rationales = encoded[: len(texts)], encoded[len(texts) :]
            model.concept_embeddings.copy_(concepts.detach())
        else:
            concepts = model.concept_embeddings
        pooled = _pool(output, stacks)
        terms = {"dice": dice, "focal": focal}
        terms["nodes"] = self._config.node_weight * self.nodes.loss(pooled @ concepts.T, answers, scale)

        slices = output.slice_means().flatten(0, 1)
        true_of_slices = [a for s in stacks for a in slice_answers(s)]
        terms["slices"] = self._config.slice_weight * self.nodes.loss(slices @ concepts.T, true_of_slices, scale)
        if train_text and len(answers) > 1:
            same = torch.tensor([[a == b for b in answers] for a in answers], device=device)
            similarity = pooled @ rationales.T
            both = info_nce(similarity, same, scale) + info_nce(similarity.T, same.T, scale)
            terms["rationales"] = self._config.rationale_weight * both / 2
        if step < self._start or not self.constraints.names:
            return terms, {}
        return terms, self.constraints(model, output, stacks, concepts, rng)


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Dotted name -> [before, now] of every setting that differs."""
    changes: dict[str, list[Any]] = {}
    for name, value in now.items():
        if not prefix and name in OF_A_MACHINE:
            continue
        old = before.get(name)
        if name == "train":  # sets go by their names, wherever they lie
            old, value = ([Path(folder).name for folder in folders or []] for folders in (old, value))
        if isinstance(value, dict):
            changes |= _changes(old if isinstance(old, dict) else {}, value, f"{prefix}{name}.")
        elif old != value:
            changes[prefix + name] = [old, value]
    return changes


def _pool(output: ModelOutput, stacks: list[Stack]) -> Tensor:
    """Mean embeddings of all stacks' regions, (R, shared_dim), in the stacks' order."""
    device, size = output.embedding.device, output.embedding.shape[-2:]
    most = max(s.regions.shape[0] for s in stacks)
    weights = torch.stack([torch.nn.functional.pad(s.regions, (0, 0) * 3 + (0, most - len(s.regions))) for s in stacks])
    weights = weights.to(device)
    if weights.shape[-2:] != size:
        weights = torch.nn.functional.interpolate(weights.flatten(0, 1), size, mode="area").unflatten(
            0, weights.shape[:2]
        )
    pooled = output.pool(weights)
    return torch.cat([p[: len(s.regions)] for p, s in zip(pooled, stacks, strict=True)])


def build_model(config: FitConfig, bank: ConceptBank) -> tuple[RationaleModel, list[int], dict[str, Any] | None]:
    """The model with its text tower and vocabulary; from a model folder also what is known of its weights."""
    phrases = [text for texts in all_phrases(bank).values() for text in texts]
    vocabulary = TextEncoder.vocabulary_of(phrases)
    if config.initial:
        checkpoint = load_checkpoint(config.initial, with_text=True)
        if checkpoint.model.config != config.model or checkpoint.model.concepts != tuple(bank):
            raise InputError(
                f"Expected a model of the configured sizes and of this concept bank in {config.initial}, got another "
                f"({checkpoint.model.config.name}); take its config.json's sizes or another folder."
            )
        known = {k: checkpoint.training[k] for k in ("steps", "sets", "initial") if k in checkpoint.training}
        return checkpoint.model.train(), checkpoint.vocabulary, {"sha256": checkpoint.sha256, **known}
    model = RationaleModel(config.model, list(bank))
    model.attach_text(vocabulary)
    return model, vocabulary, None


@torch.no_grad()
def store_concept_embeddings(model: RationaleModel, bank: ConceptBank) -> None:
    """concept_embeddings = unit-length mean of f_txt over the phrasings of each concept."""
    encoder = cast(TextEncoder, model.f_txt)
    rows = []
    for texts in all_phrases(bank).values():
        mean = encoder(encoder.tokenize(texts).to(model.concept_embeddings.device)).mean(0)
        rows.append(torch.nn.functional.normalize(mean, dim=0))
    model.concept_embeddings.copy_(torch.stack(rows))


class Trainer:
    """Runs `fit`; `state.ckpt` in `out` holds all that is needed to go on."""

    def __init__(self, config: FitConfig) -> None:
        check(config)
        self.config = config
        self.out = Path(config.out)
        self.dataset = StackDataset(config.train, config.sampling, length=config.steps * config.batch, seed=config.seed)
        if config.val:
            stored_exams(config.val)
        self.bank = ConceptBank.load()
        self.tree = DecisionTree.load()
        self.fabric = _fabric(config)
        seed_everything(config.seed, verbose=False)
        model, self.vocabulary, self.initial = build_model(config, self.bank)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
        ]
        o = config.optimizer
        heat = [p for name, p in model.named_parameters() if name.startswith("heat_")]
        for group in groups:
            group["params"] = [p for p in group["params"] if all(p is not h for h in heat)]
        groups.append({"params": heat, "weight_decay": 0.0, "faster": HEAT_FASTER})
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.ema = AveragedModel(self.model.module, multi_avg_fn=get_ema_multi_avg_fn(o.ema), use_buffers=False)
        self.objective = Objective(config, self.bank, self.tree)
        self.multipliers = Multipliers(self.objective.constraints.names, config.constraints).to(self.fabric.device)
        self.step = 0

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.module.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "multipliers": self.multipliers.state_dict(),
                "step": self.step}  # fmt: skip

    def save(self) -> None:
        """Write the state under a temporary name, then rename, so that a kill leaves the earlier one."""
        part = self.out / (STATE + ".part")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            torch.save(self._state(), part)
            part.replace(self.out / STATE)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            raise InputError(
                f"Expected room for the training state in {self.out}, got '{_first_line(error)}' at step {self.step}; "
                "free some space or choose another `out`, and run the same command again."
            ) from error

    def resume(self) -> bool:
        """Load the state of an earlier run, if there is one."""
        path = self.out / STATE
        if not path.exists():
            return False
        try:
            state = read_state(path, self.fabric.device)
            self.model.module.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.multipliers.load_state_dict(state["multipliers"])
            self.step = int(state["step"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"Expected a checkpoint of the configured model in {path}, got another; choose a new `out` folder."
            ) from error
        for name in ("train.csv", "val.csv", "kkt.csv"):
            self._forget_later_rows(self.out / name)
        return True

    def _forget_later_rows(self, path: Path) -> None:
        """Remove what an interrupted run logged after its last checkpoint, for it will be logged again."""
        if path.exists():
            head, *rows = path.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= self.step]
            write_text(path, "\n".join([head, *kept]) + "\n")

    def _describe(self) -> None:
        """Write run.json, which `export` reads; say what differs from the run that is gone on with."""
        path = self.out / RUN
        now: dict[str, Any] = {
            "config": json.loads(json.dumps(asdict(self.config))),
            "vocabulary": self.vocabulary,
            "concepts": list(self.bank),
            "sets": [describe_set(folder) for folder in self.config.train],
            "initial": self.initial,
        }
        if path.exists() and self.step:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            changed = _changes(earlier.get("config", {}), now["config"])
            now["history"] = earlier.get("history", [])
            if changed:
                _logger.warning("going on with other settings than before: %s", ", ".join(changed))
                now["history"].append({"step": self.step, "changed": changed})
        write_text(path, json.dumps(now, indent=1) + "\n")

    # ------------------------------------------------------------ loop

    def fit(self) -> RationaleModel:
        """Train to the last step and return the averaged model, with its concept embeddings in place."""
        config = self.config
        if self.resume():
            _logger.info("resumed at step %d", self.step)
        self.out.mkdir(parents=True, exist_ok=True)
        self._describe()
        with Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        ) as progress:
            task = progress.add_task("", total=config.steps, completed=self.step)
            running: dict[str, float] = {}
            start = before = time.monotonic()
            first, waited = self.step, 0.0
            for stacks in self._batches():
                waited += time.monotonic() - before
                terms = self._train_step(stacks)
                for name, value in terms.items():
                    running[name] = 0.98 * running.get(name, value) + 0.02 * value
                self.step += 1
                text = " ".join(f"{k} {v:.3f}" for k, v in running.items())
                progress.update(task, completed=self.step, description=text)
                if self.step - first == min(SPEED_AFTER, config.steps - first):
                    self._tell_speed(time.monotonic() - start, waited, self.step - first)
                if self.step % 50 == 0:
                    self._log("train.csv", {"step": self.step, "seconds": time.monotonic() - start, **running})
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
                if config.val and (self.step % config.validate_every == 0 or self.step == config.steps):
                    self._validate()
                before = time.monotonic()
        model = cast(RationaleModel, self.ema.module)
        store_concept_embeddings(model, self.bank)
        return model.eval()

    def _tell_speed(self, seconds: float, waited: float, steps: int) -> None:
        """What the loader makes alone, against what the training takes."""
        begin, tries = time.monotonic(), 4
        for index in range(tries):
            self.dataset[index]
        made = tries / (time.monotonic() - begin) * max(1, self.config.workers)
        taken = steps * self.config.batch / max(seconds, 1e-6)
        _logger.info(
            "loader: %.2f stacks/s in %d worker(s) beside the training; the training takes %.2f stacks/s (ratio %.1f) "
            "and waited for examples %.0f %% of the time",
            made, self.config.workers, taken, made / taken, 100 * waited / max(seconds, 1e-6),
        )  # fmt: skip

    def _batches(self) -> Iterator[list[Stack]]:
        config = self.config
        loader = DataLoader(
            self.dataset,
            batch_size=config.batch,
            sampler=range(self.step * config.batch, config.steps * config.batch),
            collate_fn=list,
            num_workers=config.workers,
            worker_init_fn=_prepare_worker,
            prefetch_factor=4 if config.workers else None,
        )
        try:
            yield from loader
        except InputError as error:  # from a worker, with its traceback in the message
            raise InputError(str(error).strip().splitlines()[-1].partition("InputError: ")[2] or str(error)) from error

    def _train_step(self, stacks: list[Stack]) -> dict[str, float]:
        o = self.config.optimizer
        warm = min(1.0, (self.step + 1) / max(1, o.warmup_steps))
        lr = o.lr * warm * o.final_lr ** (self.step / max(1, self.config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("faster", 1.0)
        self.model.train()
        images = torch.stack([s.images for s in stacks]).to(self.fabric.device)
        output = self.model(images)
        with self.fabric.autocast():
            terms, constraints = self.objective(self.model.module, output, stacks, self.step)
        if constraints:
            terms["constraints"] = self.multipliers.loss(constraints)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            values = {k: round(float(v.detach()), 4) for k, v in terms.items()}
            raise InputError(
                f"Expected a finite loss, got {values} at step {self.step}; lower optimizer.lr or look at the data."
            )
        report = constraints and (self.step + 1) % self.config.constraints.report_every == 0
        stationarity = self._stationarity(terms) if report else None
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=o.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.multipliers.ascend(constraints)
        self.ema.update_parameters(self.model.module)
        if stationarity is not None:
            self._report(stationarity)
        return {k: float(v.detach()) for k, v in terms.items()}

    def _stationarity(self, terms: dict[str, Tensor]) -> float:
        """|grad f + grad psi| / (|grad f| + |grad psi|) of one batch: 0 where they balance, 1 where they agree."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        ours = terms["constraints"]
        rest = torch.stack([v for k, v in terms.items() if k != "constraints"]).sum()

        def gradient(value: Tensor) -> Tensor:
            parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                              for g, p in zip(parts, parameters, strict=True)]).float()  # fmt: skip

        f, psi = gradient(rest), gradient(ours)
        return float((f + psi).norm() / (f.norm() + psi.norm()).clamp(min=1e-12))

    def _report(self, stationarity: float) -> None:
        rows = self.multipliers.report(reset=True)
        state = summary(rows) | {"stationarity": stationarity}
        self._log("kkt.csv", {"step": self.step + 1, **state})
        write_text(
            self.out / KKT,
            json.dumps({"step": self.step + 1, **state, "constraints": [as_record(r) for r in rows]}, indent=1) + "\n",
        )
        if conflicts := [r.name for r in rows if r.capped]:
            _logger.warning(
                "step %d: the multipliers of %s rest at their cap: these constraints conflict with others; "
                "lower constraints.disentangle_share or raise constraints.localise_share",
                self.step + 1, ", ".join(conflicts),
            )  # fmt: skip

    def _validate(self) -> None:
        from MedRationaleTraining.evaluation import quick_validation

        model = cast(RationaleModel, self.ema.module)
        store_concept_embeddings(model, self.bank)
        row = quick_validation(model.eval(), str(self.config.val), self.config.validation_cases, self.tree, self.fabric)
        model.train()
        _logger.info("step %d: %s", self.step, {k: round(v, 3) for k, v in row.items()})
        self._log("val.csv", {"step": self.step, **row})

    def _log(self, name: str, row: dict[str, float]) -> None:
        path = self.out / name
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow(round(v, 5) if isinstance(v, float) else v for v in row.values())


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of a run; a file that is none is refused."""
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"Expected a training state in {path}, got a file that cannot be read "
            f"({_first_line(error)}); remove it to begin anew, or choose another `out` folder."
        ) from error
    if not isinstance(state, dict) or not {"model", "ema", "optimizer", "multipliers", "step"} <= state.keys():
        raise InputError(f"Expected a training state in {path}, got another file; choose another `out` folder.")
    return state


def _fabric(config: FitConfig) -> Fabric:
    """One device; float32 where it only emulates bfloat16, which is several times slower."""
    try:
        fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
        if config.precision == "bf16-mixed" and not bf16_in_hardware(fabric.device):
            _logger.warning("%s has no bfloat16 in hardware: training in float32", fabric.device)
            fabric = Fabric(accelerator=config.accelerator, devices=1, precision="32-true")
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(
            f"Expected an accelerator that is there, got '{config.accelerator}' ({_first_line(error)}); "
            "choose accelerator: auto."
        ) from error
    return fabric


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that trains

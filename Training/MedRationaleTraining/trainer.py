"""The training loop, resumable at any step, in one process or several."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import check_writable, write_text
from MedRationaleLib.model.checkpoint import load_checkpoint
from MedRationaleLib.model.precision import bf16_in_hardware
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleLib.model.torchvision_guard import ensure_torchvision
from MedRationaleTraining.config import FitConfig, check
from MedRationaleTraining.constraints import LESION_SHARE
from MedRationaleTraining.curves import Curves
from MedRationaleTraining.data.stacks import Stack, StackDataset
from MedRationaleTraining.data.synthetic import describe_set, stored_exams
from MedRationaleTraining.fine_tuning import optimizer_of, prepare
from MedRationaleTraining.lagrangian import Multipliers, as_record, summary
from MedRationaleTraining.objective import MaskObjective, Objective, Part
from MedRationaleTraining.phrases import all_phrases

ensure_torchvision()
from lightning.fabric import Fabric, seed_everything  # noqa: E402
from lightning.fabric.strategies import DDPStrategy  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402

logging.getLogger("lightning").handlers.clear()  # it would say all twice
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # it, or the next where that was imported, too, tells
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the precision without being asked
_logger = logging.getLogger(__name__)
STATE, RUN = "state.ckpt", "run.json"
KKT = "kkt.json"
SPEED_AFTER = 50
"""Steps after which the loader's speed is told."""
LOG_EVERY = 50
TERMS = ("dice", "focal", "nodes", "slices", "rationales", "constraints")

OF_A_MACHINE = ("out", "workers", "save_every", "validate_every", "validation_cases", "val", "accelerator", "devices")
"""Settings that say nothing about the weights."""


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


def build_model(config: FitConfig, bank: ConceptBank) -> tuple[RationaleModel, list[int], dict[str, Any] | None]:
    """The model with its text tower and vocabulary; from a model folder also what is known of its weights."""
    phrases = [text for texts in all_phrases(bank).values() for text in texts]
    vocabulary = TextEncoder.vocabulary_of(phrases)
    if config.initial:
        checkpoint = load_checkpoint(config.initial, with_text=True)
        # The tokenizer is the folder's own, wherever the configuration would look for one. The form of the heat may
        # be another one, for no weight depends on it: Eq. 2 alone trains no heat. What a model without `reason_dim`
        # lacks begins as if it were not there.
        own = checkpoint.model.config
        may_differ = {"text": replace(config.model.text, folder=own.text.folder), "heatmap": own.heatmap}
        if not own.reason_dim:
            may_differ["reason_dim"] = 0
        if own != replace(config.model, **may_differ) or checkpoint.model.concepts != tuple(bank):
            raise InputError(
                f"Expected a model of the configured sizes and of this concept bank in {config.initial}, got another "
                f"({checkpoint.model.config.name}); take its config.json's sizes or another folder."
            )
        known = {
            k: checkpoint.training[k] for k in ("steps", "sets", "initial", "imported") if k in checkpoint.training
        }
        model, vocabulary = RationaleModel(replace(config.model, text=own.text), list(bank)), checkpoint.vocabulary
        model.attach_text(vocabulary)
        model.load_state_dict(checkpoint.model.state_dict(), strict=own.reason_dim == config.model.reason_dim)
        about = {"sha256": checkpoint.sha256, **known}
    else:
        model, about = RationaleModel(config.model, list(bank)), None
        model.attach_text(vocabulary)
    if config.tuning.spread:
        cast(TextEncoder, model.f_txt).spread(bank)
        torch.nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
    return model, vocabulary, about


@torch.no_grad()
def store_concept_embeddings(model: RationaleModel, bank: ConceptBank) -> None:
    """concept_embeddings = what f_txt gives for every concept."""
    model.concept_embeddings.copy_(cast(TextEncoder, model.f_txt).concept_embeddings(bank))


class Trainer:
    """Runs `fit`; `state.ckpt` in `out` holds all that is needed to go on."""

    def __init__(self, config: FitConfig) -> None:
        check(config)
        check_writable(Path(config.out))
        self.config = config
        self.out = Path(config.out)
        self.dataset = StackDataset(config.train, config.sampling, length=config.steps * config.batch, seed=config.seed)
        if config.val:
            stored_exams(config.val)
            if Path(config.val).resolve() in {Path(folder).resolve() for folder in config.train}:
                _logger.warning("%s is trained on, too: curves and thresholds on it say nothing of others", config.val)
        self.bank = ConceptBank.load()
        self.tree = DecisionTree.load()
        self.fabric = _fabric(config)
        seed_everything(config.seed, verbose=False)
        self.vocabulary: list[int] = []
        self.initial: dict[str, Any] | None = None
        objective = self._build()
        self.model = objective.model
        self.objective, self.optimizer = self.fabric.setup(objective, optimizer_of(self.model, config))
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema), use_buffers=False)
        self.multipliers = Multipliers(objective.constrained, config.constraints).to(self.fabric.device)
        self.step = 0
        self.stationarity = math.nan
        self.parts = config.batch // (config.micro_batch or config.batch)
        """Parts of a batch, over all processes."""
        if self.parts % self.fabric.world_size:
            raise InputError(
                f"Expected the {self.parts} parts of a batch (batch / micro_batch) to go evenly into the "
                f"{self.fabric.world_size} processes, got a remainder; choose another batch or micro_batch."
            )

    def _build(self) -> Objective | MaskObjective:
        """The model and its losses."""
        model, self.vocabulary, self.initial = build_model(self.config, self.bank)
        self.config = replace(self.config, model=model.config)
        if self.config.constraints.heat:
            model.start_heat(*self.config.constraints.heat)
        prepare(model, self.config.tuning)
        return Objective(model, self.config, self.bank, self.tree)

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "multipliers": self.multipliers.state_dict(),
                "step": self.step}  # fmt: skip

    def save(self) -> None:
        """Write the state under a temporary name, then rename, so that a kill leaves the earlier one."""
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise InputError(
                f"Expected finite weights, got others at step {self.step}; lower optimizer.lr. "
                f"An earlier state in {self.out} is left as it is."
            )
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
            self.model.load_state_dict(state["model"])
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
        return True

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
            now["history"] = json.loads(path.read_text(encoding="utf-8")).get("history", [])
            if changed := self._changed():
                _logger.warning("going on with other settings than before: %s", ", ".join(changed))
                now["history"].append({"step": self.step, "changed": changed})
        write_text(path, json.dumps(now, indent=1) + "\n")

    def _changed(self) -> dict[str, Any]:
        """The settings that differ from those in run.json: name -> before and now."""
        earlier = json.loads((self.out / RUN).read_text(encoding="utf-8"))
        return _changes(earlier.get("config", {}), json.loads(json.dumps(asdict(self.config))))

    # ------------------------------------------------------------ loop

    def fit(self) -> nn.Module:
        """Train to the last step and return the averaged model."""
        config, first_process = self.config, self.fabric.is_global_zero
        if self.resume():
            _logger.info("resumed at step %d", self.step)
        curves = None
        if first_process:
            self.out.mkdir(parents=True, exist_ok=True)
            if 0 < config.steps <= self.step and (self.out / RUN).exists():
                _logger.info("nothing is left to train: %s is at step %d of %d", self.out, self.step, config.steps)
                if changed := self._changed():
                    _logger.warning(
                        "its settings are others, and stay as they are: %s; choose another `out` to train with these",
                        ", ".join(changed),
                    )
            else:
                self._describe()
            curves = Curves(self.out, self.step)
        whole = partial(Column, no_wrap=True)  # a narrow terminal cuts the losses, not how far it is
        with Progress(
            TextColumn("training"),
            BarColumn(20),
            MofNCompleteColumn(table_column=whole()),
            TimeRemainingColumn(table_column=whole()),
            TextColumn("{task.description}", table_column=whole(ratio=1, overflow="ellipsis")),
            disable=not first_process,
            expand=True,
        ) as progress:
            task = progress.add_task("", total=config.steps, completed=self.step)
            running: dict[str, float] = {}
            start = before = time.monotonic()
            first, waited = self.step, 0.0
            for parts in self.batches():
                waited += time.monotonic() - before
                if self.step == config.constraints.start > 0:
                    self._start_heat(parts)
                terms = self.train_step(parts)
                for name, value in terms.items():
                    running[name] = 0.98 * running.get(name, value) + 0.02 * value
                self.step += 1
                last = self.step == config.steps
                if curves is not None:
                    text = " ".join(f"{k} {v:.3f}" for k, v in running.items())
                    progress.update(task, completed=self.step, description=text)
                    if self.step - first == min(SPEED_AFTER, config.steps - first):
                        self._tell_speed(time.monotonic() - start, waited, self.step - first)
                    if self.step % LOG_EVERY == 0 or last:
                        curves.add("train", self.step, {"seconds": time.monotonic() - start, **running})
                    if self._kkt_due():
                        self._report(curves)
                    if self.step % config.save_every == 0 or last:
                        self.save()
                    if config.val and (self.step % config.validate_every == 0 or last):
                        curves.add("val", self.step, self._validate())
                self.fabric.barrier()
                before = time.monotonic()
        if curves is not None:
            curves.close()
        return self._averaged()

    def _averaged(self) -> nn.Module:
        """The averaged model, with its concept embeddings in place."""
        model = cast(RationaleModel, self.ema.module)
        store_concept_embeddings(model, self.bank)
        return model.eval()

    def _tell_speed(self, seconds: float, waited: float, steps: int) -> None:
        """What the loader makes alone, against what the training takes."""
        begin, tries = time.monotonic(), 4
        for index in range(tries):
            self.dataset[index]
        made = tries / (time.monotonic() - begin) * max(1, self.config.workers)
        taken = steps * self.config.batch / self.fabric.world_size / max(seconds, 1e-6)
        _logger.info(
            "loader: %.2f stacks/s %s; the training takes %.2f stacks/s (ratio %.1f) and waited for examples "
            "%.0f %% of the time",
            made, f"in {self.config.workers} worker(s) beside the training" if self.config.workers else "by itself",
            taken, made / taken, 100 * waited / max(seconds, 1e-6),
        )  # fmt: skip

    def batches(self) -> Iterator[list[list[Stack]]]:
        """For every step the parts that are this process's: part p of a batch is that of process p mod processes."""
        config, fabric = self.config, self.fabric
        size = config.batch // self.parts
        examples = [
            step * config.batch + part * size + i
            for step in range(self.step, config.steps)
            for part in range(fabric.global_rank, self.parts, fabric.world_size)
            for i in range(size)
        ]
        loader = DataLoader(
            self.dataset,
            batch_size=size,
            sampler=examples,
            collate_fn=list,
            num_workers=config.workers,
            worker_init_fn=_prepare_worker,
            prefetch_factor=4 if config.workers else None,
        )
        try:
            parts = iter(loader)
            while batch := list(islice(parts, self.parts // fabric.world_size)):
                yield batch
        except InputError as error:  # from a worker, with its traceback in the message
            raise InputError(str(error).strip().splitlines()[-1].partition("InputError: ")[2] or str(error)) from error

    def train_step(self, batch: Sequence[Sequence[Stack]]) -> dict[str, float]:
        """One optimiser step and one dual step; returns the terms' means over all parts of the batch."""
        o = self.config.optimizer
        warm = min(1.0, (self.step + 1) / max(1, o.warmup_steps))
        lr = o.lr * warm * o.final_lr ** (self.step / max(1, self.config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("faster", 1.0)
        self.objective.train()
        told: list[Mapping[str, Tensor]] = []
        violated: list[Mapping[str, Tensor]] = []
        for index, stacks in enumerate(batch):
            number = index * self.fabric.world_size + self.fabric.global_rank
            last = index == len(batch) - 1
            part = Part(stacks, self.step, number)
            if last and self._kkt_due(self.step + 1):
                self.stationarity = self._stationarity(part)
            with self.fabric.no_backward_sync(self.objective, enabled=not last):
                terms, constraints = self.objective(part)
                if constraints:
                    terms["constraints"] = self.multipliers.loss(constraints)
                self.fabric.backward(torch.stack(list(terms.values())).sum() / len(batch))
            told.append({k: v.detach() for k, v in terms.items()})
            violated.append({k: g.detach() for k, g in constraints.items()})
        means = self._mean(told, TERMS)
        if not all(torch.isfinite(v) for v in means.values()):
            values = {k: round(float(v), 4) for k, v in means.items()}
            raise InputError(
                f"Expected a finite loss, got {values} at step {self.step}; lower optimizer.lr or look at the data."
            )
        self.fabric.clip_gradients(self.objective, self.optimizer, max_norm=o.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.multipliers.ascend(self._mean(violated, self.multipliers.names))
        self.ema.update_parameters(self.model)
        return {k: float(v) for k, v in means.items()}

    @torch.no_grad()
    def _start_heat(self, batch: Sequence[Sequence[Stack]]) -> None:
        """Set the heat's bias so that its mean over the batch is a typical lesion's share of a slice.

        InfoNCE compares concepts with each other, so that Eq. 2 leaves open where their cosines lie: wherever that is,
        heatmaps begin neither dark, where a sigmoid has no gradient, nor so bright that all is to be put out first. It
        is how detectors begin with the rate of what they detect (Lin et al., 2017). A heat that `constraints.heat`
        names, or of another form, is left alone.
        """
        learned = self.config.model.heatmap == "sigmoid" and self.config.constraints.heat is None
        if not (learned and self.multipliers.names):
            return
        model = cast(RationaleModel, self.model)
        scale, cosines = float(model.heat_scale.exp()), []
        concepts = model.concept_embeddings[cast(Objective, self.objective.module).constraints.described]
        for stacks in batch:
            with self.fabric.autocast():
                output = model(torch.stack([s.images for s in stacks]).to(self.fabric.device))
            cosines.append(torch.stack([output.similarity(i, concepts) for i in range(len(stacks))]).float())
        low, high = -scale - 10, scale + 10
        for _ in range(30):  # each halves what lies between
            bias = (low + high) / 2
            heat = [{"heat": torch.sigmoid(scale * c + bias).mean()} for c in cosines]
            too_bright = float(self._mean(heat, ["heat"])["heat"]) > LESION_SHARE
            low, high = (low, bias) if too_bright else (bias, high)
        for either in (model, cast(RationaleModel, self.ema.module)):
            either.start_heat(scale, bias)
        _logger.info("step %d: the heat begins at %.1f cos %+.1f", self.step, scale, bias)

    def _mean(self, rows: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
        """Means over all parts of the batch, in all processes, of the values that occur in them."""
        table = torch.zeros(2, len(names), device=self.fabric.device)
        for row in rows:
            for name, value in row.items():
                index = names.index(name)
                table[0, index] += value
                table[1, index] += 1
        total, count = cast(Tensor, self.fabric.all_reduce(table, reduce_op="sum"))
        return {name: total[i] / count[i] for i, name in enumerate(names) if count[i] > 0}

    def _kkt_due(self, step: int | None = None) -> bool:
        step = self.step if step is None else step
        constraints = self.config.constraints
        due = step % constraints.report_every == 0 or step == self.config.steps
        return due and bool(self.multipliers.names) and step > constraints.start

    def _stationarity(self, part: Part) -> float:
        """|grad f + grad psi| / (|grad f| + |grad psi|) of one part: 0 where they balance, 1 where they agree.

        In a pass of its own, past Fabric's and DistributedDataParallel's wrappers, which expect one backward pass each.
        """
        with self.fabric.autocast():
            terms, constraints = cast(Objective, self.objective.module)(part)
        if not constraints:
            return math.nan
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def gradient(value: Tensor) -> Tensor:
            parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                              for g, p in zip(parts, parameters, strict=True)]).float()  # fmt: skip

        f, psi = gradient(torch.stack(list(terms.values())).sum()), gradient(self.multipliers.loss(constraints))
        return float((f + psi).norm() / (f.norm() + psi.norm()).clamp(min=1e-12))

    def _report(self, curves: Curves) -> None:
        rows = self.multipliers.report(reset=True)
        state: dict[str, float | None] = {**summary(rows), "stationarity": self.stationarity}
        curves.add("kkt", self.step, summary(rows) | {"stationarity": self.stationarity})
        told = {name: value if math.isfinite(value) else None for name, value in state.items()}
        record = {"step": self.step, **told, "constraints": [as_record(r) for r in rows]}
        write_text(self.out / KKT, json.dumps(record, indent=1) + "\n")
        if conflicts := [r.name for r in rows if r.capped]:
            _logger.warning(
                "step %d: the multipliers of %s rest at their cap: these constraints conflict with others; "
                "lower constraints.disentangle_share, or raise constraints.localise_share or contain_share",
                self.step, ", ".join(conflicts),
            )  # fmt: skip

    def _validate(self) -> dict[str, float]:
        from MedRationaleTraining.evaluation import quick_validation

        model = self._averaged()
        row = quick_validation(model, str(self.config.val), self.config.validation_cases, self.tree, self.fabric)
        model.train()
        _logger.info("step %d: %s", self.step, {k: round(v, 3) for k, v in row.items()})
        return row


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of a run; a file that is none is refused."""
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torch's own words on a pickle advise to load it without the check.
        why = "damaged, or no such state" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise InputError(
            f"Expected a training state in {path}, got a file that cannot be read "
            f"({why}); remove it to begin anew, or choose another `out` folder."
        ) from error
    if not isinstance(state, dict) or not {"model", "ema", "optimizer", "multipliers", "step"} <= state.keys():
        raise InputError(f"Expected a training state in {path}, got another file; choose another `out` folder.")
    return state


def _fabric(config: FitConfig) -> Fabric:
    """One process, or those that torchrun or `fabric run` started; float32 where bfloat16 is only emulated."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or config.devices
    nodes = max(1, int(os.environ.get("WORLD_SIZE", "1")) // here)

    def made(precision: str) -> Fabric:
        # f_txt is trained now and then only, and the concept embeddings are the same in all processes.
        strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if here * nodes > 1 else "auto"
        return Fabric(
            accelerator=config.accelerator, devices=here, num_nodes=nodes, strategy=strategy, precision=precision
        )  # type: ignore[arg-type]

    try:
        fabric = made("32-true")
        if config.precision == "bf16-mixed" and not bf16_in_hardware(fabric.device):
            _logger.warning("%s has no bfloat16 in hardware: training in float32", fabric.device)
        elif config.precision != "32-true":
            fabric = made(config.precision)
        fabric.launch()
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

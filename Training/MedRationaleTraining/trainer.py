"""The training loop: Eq. 2 on synthetic stacks, resumable at any step."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.model.checkpoint import load_checkpoint
from MedRationaleLib.model.rationale_model import ModelOutput, RationaleModel
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleLib.model.torchvision_guard import ensure_torchvision
from MedRationaleTraining.config import FitConfig
from MedRationaleTraining.data.stacks import Stack, StackDataset
from MedRationaleTraining.losses import NodeTargets, SegmentationLoss, info_nce
from MedRationaleTraining.phrases import all_phrases, draw_phrases, draw_rationale

ensure_torchvision()
from lightning.fabric import Fabric, seed_everything  # noqa: E402

_logger = logging.getLogger(__name__)
STATE = "state.ckpt"


class Objective:
    """All terms of Eq. 2 for one batch."""

    def __init__(self, config: FitConfig, bank: ConceptBank, tree: DecisionTree) -> None:
        self._config = config.loss
        self._seed = config.seed
        self._phrases = all_phrases(bank)
        self._segmentation = SegmentationLoss(config.loss)
        self.nodes = NodeTargets(tree, list(bank))

    def __call__(self, model: RationaleModel, output: ModelOutput, stacks: list[Stack], step: int) -> dict[str, Tensor]:
        """Name -> weighted scalar; their sum is the loss."""
        rng = np.random.default_rng((self._seed, step, 7))
        device = output.embedding.device
        masks = torch.stack([s.masks for s in stacks]).to(device)
        size = output.mask_logits.shape[-2:]
        if masks.shape[-2:] != size:
            masks = torch.nn.functional.interpolate(masks.flatten(0, 1), size, mode="area").unflatten(
                0, masks.shape[:2]
            )
        dice, focal = self._segmentation(output.mask_logits.flatten(0, 1), masks.flatten(0, 1))

        scale = model.logit_scale.exp().clamp(max=100)
        encoder = model.f_txt
        answers = [a for s in stacks for a in s.answers]
        sentences = [draw_rationale(a, self._phrases, rng) for a in answers]
        texts = draw_phrases(self._phrases, rng)
        tokens = encoder.tokenize(texts + sentences).to(device)  # type: ignore[union-attr, operator]
        encoded = encoder(tokens)  # type: ignore[misc]
        concepts, rationales = encoded[: len(texts)], encoded[len(texts) :]
        pooled = _pool(output, stacks)
        terms = {"dice": dice, "focal": focal}
        terms["nodes"] = self._config.node_weight * self.nodes.loss(pooled @ concepts.T, answers, scale)

        slices, slice_answers = _slice_answers(output, stacks)
        terms["slices"] = self._config.slice_weight * self.nodes.loss(slices @ concepts.T, slice_answers, scale)
        if len(answers) > 1:
            same = torch.tensor([[a == b for b in answers] for a in answers], device=device)
            similarity = pooled @ rationales.T
            both = info_nce(similarity, same, scale) + info_nce(similarity.T, same.T, scale)
            terms["rationales"] = self._config.rationale_weight * both / 2
        return terms


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


def _slice_answers(output: ModelOutput, stacks: list[Stack]) -> tuple[Tensor, list[dict[str, str]]]:
    """Whole-slice means and what is true of each slice: its largest lesion's rationale, or that there is none."""
    means = output.slice_means().flatten(0, 1)
    answers: list[dict[str, str]] = []
    for stack in stacks:
        areas = stack.regions.sum((2, 3))  # (R, S)
        for s in range(stack.images.shape[0]):
            lesions = [r for r, lesion in enumerate(stack.is_lesion) if lesion and areas[r, s] > 1]
            largest = max(lesions, key=lambda r: float(areas[r, s]), default=None)
            answers.append(stack.answers[largest] if largest is not None else {"lesion_presence": "lesion_absent"})
    return means, answers


def build_model(config: FitConfig, bank: ConceptBank) -> tuple[RationaleModel, list[int]]:
    """The model with its text tower, from random weights or from a model folder."""
    phrases = [text for texts in all_phrases(bank).values() for text in texts]
    vocabulary = TextEncoder.vocabulary_of(phrases)
    if config.initial:
        checkpoint = load_checkpoint(config.initial, with_text=True)
        if checkpoint.model.config != config.model:
            raise InputError(
                f"Expected a model of the configured sizes in {config.initial}, got {checkpoint.model.config.name}; "
                "take its config.json's sizes or another folder."
            )
        return checkpoint.model.train(), vocabulary
    model = RationaleModel(config.model, list(bank))
    model.attach_text(vocabulary)
    return model, vocabulary


@torch.no_grad()
def store_concept_embeddings(model: RationaleModel, bank: ConceptBank) -> None:
    """concept_embeddings = unit-length mean of f_txt over the phrasings of each concept."""
    encoder = model.f_txt
    rows = []
    for texts in all_phrases(bank).values():
        mean = encoder(encoder.tokenize(texts).to(model.concept_embeddings.device)).mean(0)  # type: ignore[misc, union-attr, operator]
        rows.append(torch.nn.functional.normalize(mean, dim=0))
    model.concept_embeddings.copy_(torch.stack(rows))


class Trainer:
    """Runs `fit`; `state.ckpt` in `out` holds all that is needed to go on."""

    def __init__(self, config: FitConfig) -> None:
        if not config.train:
            raise InputError("Expected at least one synthetic set in `train`, got none; make one with `synthesize`.")
        self.config = config
        self.out = Path(config.out)
        self.bank = ConceptBank.load()
        self.tree = DecisionTree.load()
        self.fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)  # type: ignore[arg-type]
        seed_everything(config.seed, verbose=False)
        model, self.vocabulary = build_model(config, self.bank)
        model = model.to(memory_format=torch.channels_last)
        groups = [
            {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
        ]
        o = config.optimizer
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.ema = AveragedModel(self.model.module, multi_avg_fn=get_ema_multi_avg_fn(o.ema), use_buffers=False)
        self.objective = Objective(config, self.bank, self.tree)
        self.step = 0

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.module.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step}  # fmt: skip

    def save(self) -> None:
        """Write the state under a temporary name, then rename."""
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.out / (STATE + ".part")
        torch.save(self._state(), part)
        part.replace(self.out / STATE)

    def resume(self) -> bool:
        """Load the state of an earlier run, if there is one."""
        path = self.out / STATE
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location=self.fabric.device)
        try:
            self.model.module.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError(
                f"Expected a checkpoint of the configured model in {path}, got another; choose a new `out` folder."
            ) from error
        self.step = state["step"]
        return True

    # ------------------------------------------------------------ loop

    def fit(self) -> RationaleModel:
        """Train to the last step and return the averaged model, with its concept embeddings in place."""
        config = self.config
        resumed = self.resume()
        if resumed:
            _logger.info("resumed at step %d", self.step)
        with Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        ) as progress:
            task = progress.add_task("", total=config.steps, completed=self.step)
            running: dict[str, float] = {}
            start = time.monotonic()
            for stacks in self._batches():
                terms = self._train_step(stacks)
                for name, value in terms.items():
                    running[name] = 0.98 * running.get(name, value) + 0.02 * value
                self.step += 1
                text = " ".join(f"{k} {v:.3f}" for k, v in running.items())
                progress.update(task, completed=self.step, description=text)
                if self.step % 50 == 0:
                    self._log("train.csv", {"step": self.step, "seconds": time.monotonic() - start, **running})
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
                if config.val and (self.step % config.validate_every == 0 or self.step == config.steps):
                    self._validate()
        model = self.ema.module
        store_concept_embeddings(model, self.bank)
        return model.eval()

    def _batches(self) -> Iterator[list[Stack]]:
        config = self.config
        dataset = StackDataset(config.train, config.sampling, length=config.steps * config.batch, seed=config.seed)
        loader = DataLoader(
            dataset,
            batch_size=config.batch,
            sampler=range(self.step * config.batch, config.steps * config.batch),
            collate_fn=list,
            num_workers=config.workers,
            worker_init_fn=_one_thread,
            prefetch_factor=4 if config.workers else None,
        )
        return iter(loader)

    def _train_step(self, stacks: list[Stack]) -> dict[str, float]:
        o = self.config.optimizer
        warm = min(1.0, (self.step + 1) / max(1, o.warmup_steps))
        lr = o.lr * warm * o.final_lr ** (self.step / max(1, self.config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        images = torch.stack([s.images for s in stacks]).to(self.fabric.device)
        output = self.model(images)
        with self.fabric.autocast():
            terms = self.objective(self.model.module, output, stacks, self.step)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            values = {k: float(v) for k, v in terms.items()}
            raise InputError(
                f"Expected a finite loss, got {values} at step {self.step}; lower optimizer.lr or look at the data."
            )
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=o.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.model.module)
        return {k: float(v.detach()) for k, v in terms.items()}

    def _validate(self) -> None:
        from MedRationaleTraining.evaluation import quick_validation

        model = self.ema.module
        store_concept_embeddings(model, self.bank)
        row = quick_validation(model.eval(), str(self.config.val), self.config.validation_cases, self.tree, self.fabric)
        model.train()
        _logger.info("step %d: %s", self.step, {k: round(v, 3) for k, v in row.items()})
        self._log("val.csv", {"step": self.step, **row})

    def _log(self, name: str, row: dict[str, float]) -> None:
        path = self.out / name
        self.out.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow(round(v, 5) if isinstance(v, float) else v for v in row.values())


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)

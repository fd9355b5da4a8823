"""What a training step of a large configuration costs: seconds and peak memory by batch and by what is trained."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.failures import is_out_of_memory
from MedRationaleLib.model.config import TextConfig
from MedRationaleTraining.config import BenchmarkConfig, FitConfig, TuningConfig
from MedRationaleTraining.data.synthetic import SynthesisConfig, make_set
from MedRationaleTraining.phrases import all_phrases
from MedRationaleTraining.trainer import Trainer

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "lora, text frozen": {"image_encoder": "lora", "text": "frozen"},
}
"""Name -> settings of `tuning` that differ from all weights trained."""


def alone(measure: Callable[..., Any], *given: object) -> Any:
    """`measure(*given)` in a fresh process, whose peak memory is its own; None where that gives out or it is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *given).result()
        except BrokenProcessPool:
            return None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def peak_gb(device: str = "cpu") -> float:
    """Largest memory in GB that this process has held: resident on a CPU, of torch's tensors on a GPU."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands getrusage's peak on from the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e9, 2)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 2)


def training_cost(fit: FitConfig, config: BenchmarkConfig) -> list[dict[str, Any]]:
    """A row for each way of `TUNINGS` and each batch of `config.batches`; see `alone` for a `step` of None."""
    asked = [(name, batch) for name in TUNINGS for batch in config.batches]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder) / "phantoms", SynthesisConfig(cases=1, seed=0))
        write_tokenizer(Path(folder) / "text", fit.model.text)
        layers = tuple(i for i in fit.model.global_attention if i < config.depth)
        text = replace(fit.model.text, folder=str(Path(folder) / "text"))
        fit = replace(
            fit, out=str(Path(folder) / "run"), train=[str(Path(folder) / "phantoms")], val=None, initial=None,
            model=replace(fit.model, pixels=config.pixels, depth=config.depth, global_attention=layers, text=text),
            micro_batch=None, workers=0, steps=config.steps + 2, accelerator=config.device,
            constraints=replace(fit.constraints, start=0, report_every=config.steps + 2),
        )  # fmt: skip
        for name, batch in track(asked, "Training step", transient=True):
            given = replace(fit, batch=batch, tuning=TuningConfig(**TUNINGS[name]))
            found = alone(step_cost, given, config.device)
            rows.append({"tuning": name, "batch": batch, "slices": fit.sampling.slices * batch, "step": found})
    return rows


def step_cost(fit: FitConfig, device: str) -> dict[str, float]:
    """Median seconds of a step from random weights and the peak memory of this process.

    The first step is left out, for it warms up, and the last is not taken, for with it goes the KKT report.
    """
    trainer = Trainer(fit)
    seconds: list[float] = []
    for parts in islice(trainer.batches(), fit.steps - 1):
        begun = time.perf_counter()
        trainer.train_step(parts)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        trainer.step += 1
    counted = seconds[1:]
    return {
        "seconds": round(float(np.median(counted)), 3),
        "min": round(min(counted), 3),
        "max": round(max(counted), 3),
        "peak_gb": peak_gb(device),
    }


def write_tokenizer(folder: Path, sizes: TextConfig) -> None:
    """A BERT of these sizes whose vocabulary is the words of all phrasings: as many tokens as words and marks."""
    from transformers import BertConfig

    folder.mkdir()
    texts = [text for texts in all_phrases(ConceptBank.load()).values() for text in texts]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    kind = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    bert = BertConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
    )
    bert.save_pretrained(folder)

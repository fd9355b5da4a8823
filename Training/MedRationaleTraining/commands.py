"""The commands of medrationale-train: of each its options, and what it does with them and prints."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.table import Table

from MedRationaleLib.errors import InputError
from MedRationaleLib.model_folders import CARD, CONFIG, WEIGHTS, check_new, read_settings
from MedRationaleTraining.config import BenchmarkConfig, FitConfig, check
from MedRationaleTraining.data.cache import PrepareConfig, open_reader, prepare_set
from MedRationaleTraining.data.synthetic import SynthesisConfig, make_set

ARMS_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "ablations"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One of the commands."""

    help: str
    """In the list of all of them."""
    parser: Callable[[], ArgumentParser]
    """Makes the parser of its options."""
    run: Callable[[Namespace, Console], None]
    """Does it, with what the parser has read."""
    interrupted: str = "Nothing was written."
    """What to do after Ctrl+C."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of descriptions as they are, and names types as people do."""

    def _expand_help(self, action: Any) -> str:
        return re.sub(r"<class '([\w.]+)'>", r"\1", super()._expand_help(action) or "")


def new_parser(description: str, **options: Any) -> ArgumentParser:
    """A parser without options that raises ArgumentError in place of ending the process."""
    return ArgumentParser(description=description, exit_on_error=False, formatter_class=_HelpFormatter, **options)


def _synthesize_parser() -> ArgumentParser:
    parser = new_parser("Make a set of synthetic examinations with their masks and reasons. Goes on where it stopped.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the set.")
    parser.add_class_arguments(SynthesisConfig)
    return parser


def _synthesize(given: Namespace, console: Console) -> None:
    out = given.pop("out")
    given.pop("config", None)
    config = SynthesisConfig(**given.as_dict())
    made = make_set(out, config)
    console.print(f"{made} examinations made, {config.cases} are in {out}")


def _prepare_parser() -> ArgumentParser:
    parser = new_parser(
        "Prepare real examinations for training: read, resample, crop round the gland, store.\n"
        "Goes on where it stopped.\n"
        "  --reader picai        --data IMAGES (picai_public_images_fold0..4 unpacked) --labels LABELS (picai_labels)\n"
        "                        official folds: --splits splits.json --folds '[1,2,3,4]'\n"
        "  --reader prostate158  --data FOLDER with prostate158_train (and prostate158_test for --split test)\n"
        "  --reader msd          --data Task05_Prostate (no DWI, no lesions: these are then left out of the loss)\n"
        "An incomplete download is refused before anything is written. Examinations that cannot be used, for example\n"
        "with a mask on another grid, are left out and named in OUT/refused.json."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the set, for `fit --train '[OUT]'`.")
    parser.add_class_arguments(PrepareConfig)
    return parser


def _prepare(given: Namespace, console: Console) -> None:
    logging.getLogger("MedRationaleLib.study").setLevel(logging.WARNING)
    out = given.pop("out")
    given.pop("config", None)
    config = PrepareConfig(**given.as_dict())
    done = prepare_set(open_reader(config), out, rationales=config.rationales, workers=config.workers)
    left_out = f", {len(done.refused)} were left out (refused.json says why)" if done.refused else ""
    console.print(f"{done.made} examinations prepared, {done.total} are in {out}{left_out}")


def fit_parser() -> ArgumentParser:
    """All settings of a training; each is also a key of its YAML file."""
    parser = new_parser(
        "Train a model. With the same `out` it goes on from the last checkpoint.\n"
        "At the end the model folder is in OUT/model, with thresholds chosen on the validation set. For example:\n"
        "  medrationale-train fit --config Training/configs/compact.yaml --out runs/mine --optimizer.lr 1e-4",
        usage="medrationale-train fit [--config FILE]... --train '[SET,...]' --out OUT [--NAME VALUE]...",
    )
    parser.add_argument("--config", action="config", help="YAML file, such as Training/configs/compact.yaml.")
    parser.add_class_arguments(FitConfig)
    return parser


def fit_config(values: Namespace) -> FitConfig:
    """What `fit_parser` has read; raises InputError where it cannot be trained."""
    config = FitConfig.from_dict({k: v for k, v in values.as_dict().items() if k != "config"})
    check(config)
    return config


def _fit(given: Namespace, console: Console) -> None:
    _train(fit_config(given), console)


def _train(config: FitConfig, console: Console) -> None:
    from MedRationaleTraining.baselines import BaselineTrainer, export_baseline
    from MedRationaleTraining.export import export_run
    from MedRationaleTraining.lagrangian import kkt_table
    from MedRationaleTraining.trainer import KKT, Trainer

    run = Path(config.out)
    trainer = BaselineTrainer(config) if config.baseline else Trainer(config)
    trainer.fit()
    if not trainer.fabric.is_global_zero:
        return
    if config.baseline:
        folder = export_baseline(run, run / "model", name=config.baseline, calibrate_on=config.val)
    else:
        folder = export_run(run, run / "model", calibrate_on=config.val)
    if (kkt := run / KKT).exists():
        console.print(kkt_table(json.loads(kkt.read_text(encoding="utf-8"))))
    console.print(
        f"The model is in {folder}; measure it with `medrationale-train evaluate --model {folder} --data TEST_SET "
        f"--out {run / 'test'}`."
    )


def _resume_parser() -> ArgumentParser:
    parser = new_parser(
        "Go on with a run that was stopped, with the settings that it was started with.\n"
        "  medrationale-train resume --run runs/compact"
    )
    parser.add_argument("--run", type=Path, required=True, help="Folder of the run (`out` of fit).")
    parser.add_argument("--steps", type=int | None, default=None, help="Train to this step instead of the run's last.")
    return parser


def _resume(given: Namespace, console: Console) -> None:
    from MedRationaleTraining.trainer import RUN

    path = given.run / RUN
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["config"]
        config = FitConfig.from_dict({**settings, "out": str(given.run)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected a run's settings in {path}, got none that can be read ({type(error).__name__}); "
            "name the `out` folder of a fit."
        ) from error
    config = replace(config, steps=config.steps if given.steps is None else given.steps)
    check(config)
    _train(config, console)


def _export_parser() -> ArgumentParser:
    parser = new_parser(
        "Write a model folder from a run: averaged weights in float16, concept embeddings, thresholds, model card.\n"
        "  medrationale-train export --run runs/compact --out models/mine --calibrate data/synthetic/val"
    )
    parser.add_argument("--run", type=Path, required=True, help="Folder of the run (`out` of fit), finished or not.")
    parser.add_argument("--out", type=Path, required=True, help="Model folder to write.")
    parser.add_argument(
        "--settings", type=Path | None, default=None, help="YAML file of the run, where it has no run.json."
    )
    parser.add_argument(
        "--calibrate", type=str | None, default=None, help="Synthetic validation set to choose the thresholds on."
    )
    parser.add_argument("--cases", type=int | None, default=None, help="Only the first so many of it.")
    parser.add_argument(
        "--evaluation",
        type=Path | None,
        default=None,
        help="evaluation.json of these weights: its figures go into the card and its thresholds into the model.",
    )
    parser.add_argument(
        "--scores", type=Path | None, default=None, help="real_cases.json of these weights, by `score`, for the card."
    )
    parser.add_argument(
        "--initial_share",
        type=float,
        default=0.0,
        help="Share of the model that the run began from in the weights, which often makes them more robust (WiSE-FT).",
    )
    return parser


def _export(given: Namespace, console: Console) -> None:
    config = None
    if given.settings is not None:
        config = fit_config(fit_parser().parse_args(["--config", str(given.settings)]))
    from MedRationaleTraining.export import export_run

    if given.evaluation is None:  # with one, the model that was evaluated gets its figures
        check_new(given.out)
    folder = export_run(
        given.run,
        given.out,
        config=config,
        calibrate_on=given.calibrate,
        cases=given.cases,
        evaluation=given.evaluation,
        scores=given.scores,
        initial_share=given.initial_share,
    )
    size = sum((folder / name).stat().st_size for name in (CARD, CONFIG, WEIGHTS)) / 1e6
    training = read_settings(folder).training
    steps = f"{training['steps']} of {training['settings']['steps']} steps"
    console.print(f"The model, of {steps}, is in {folder} ({size:.1f} MB)")


def _calibrate_parser() -> ArgumentParser:
    parser = new_parser(
        "Choose the thresholds of a model folder anew, on another validation set; its weights stay as they are.\n"
        "  medrationale-train calibrate --model models/mine --data data/real/val --out models/calibrated"
    )
    parser.add_argument("--model", type=str, required=True, help="Name of a shipped model, or a model folder.")
    parser.add_argument("--data", type=Path, required=True, help="Validation set.")
    parser.add_argument("--out", type=Path, required=True, help="Model folder to write.")
    parser.add_argument("--cases", type=int | None, default=None, help="Only the first so many examinations.")
    return parser


def _calibrate(given: Namespace, console: Console) -> None:
    from MedRationaleTraining.export import recalibrate

    check_new(given.out)
    console.print(f"The model is in {recalibrate(given.model, given.data, given.out, cases=given.cases)}")


def _evaluate_parser() -> ArgumentParser:
    parser = new_parser(
        "Measure a model on a synthetic set, every figure with its 95 % bootstrap interval:\n"
        "  masks       Dice of gland, zones and lesions, lesion average precision, examination AUROC\n"
        "  evidence    relevance mass accuracy, pointing game and overlap of heatmaps, similarity maps and Grad-CAM\n"
        "  constraints how far apart heatmaps are, and how near to what they describe: which shares are held\n"
        "  rationales  right concepts by node, by slice and by patient, against answers from logits and from masks;\n"
        "              zone and PI-RADS category; how often mask and rationale contradict each other\n"
        "Writes evaluation.json, evaluation.md, evidence_rma.svg and evidence_examples.svg.\n"
        "  medrationale-train evaluate --model runs/compact/model --data data/synthetic/test --out runs/compact/test"
    )
    parser.add_argument("--model", type=str, default="compact", help="Name of a shipped model, or a model folder.")
    parser.add_argument("--data", type=Path, required=True, help="Synthetic set, best of the test split.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the files.")
    parser.add_argument("--cases", type=int | None, default=None, help="Only the first so many examinations.")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda.")
    return parser


def _evaluate(given: Namespace, console: Console) -> None:
    from rich.markdown import Markdown

    from MedRationaleTraining.baselines import evaluate_baseline, is_baseline
    from MedRationaleTraining.evaluation import evaluate, markdown

    measure = evaluate_baseline if is_baseline(given.model) else evaluate
    report = measure(given.model, given.data, given.out, cases=given.cases, device=given.device)
    console.print(Markdown(markdown(report)))
    console.print(f"evaluation.json and evaluation.md are in {given.out}")


def _score_parser() -> ArgumentParser:
    parser = new_parser(
        "Compare a model with an expert's masks of real examinations: volume Dice of gland, PZ and TZ, lesions found.\n"
        "A case is a folder with t2w, adc and dwi and gland.nii.gz, zones.nii.gz (1 PZ, 2 TZ), lesion.nii.gz.\n"
        "  medrationale-train score --model runs/compact/model --cases '[cases/one,cases/two]' --out runs/compact/real"
    )
    parser.add_argument("--model", type=str, default="compact", help="Name of a shipped model, or a model folder.")
    parser.add_argument("--cases", type=list[Path], required=True, help="Folders, as '[one,two]'.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for real_cases.json.")
    return parser


def _score(given: Namespace, console: Console) -> None:
    from MedRationaleTraining.real_cases import score_cases, table, write_scores

    scores = score_cases(given.model, list(given.cases))
    write_scores(given.model, scores, given.out)
    console.print(table(scores))


def _ablate_parser() -> ArgumentParser:
    parser = new_parser(
        "Train and measure the model without constraints (none), with disentanglement only (disentangle), with all\n"
        "constraints (both), with these as fixed penalties (penalty), and without our own (paper), each with several\n"
        "seeds from the same warmed-up model (--initial). Writes OUT/metrics.json and prints the table. Goes on where\n"
        "it stopped: a run that is done is not repeated, with another --test or --cases only measured anew. Calls\n"
        "with other --only or --seeds may run side by side; a last one with all of them makes the whole table.\n"
        "  medrationale-train ablate --config Training/configs/compact.yaml \\\n"
        "      --config Training/configs/ablation.yaml --initial MODEL --test data/synthetic/test --cases 30",
        usage="medrationale-train ablate [--config FILE]... --test SET --out OUT [--NAME VALUE]...",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of one run, such as Training/configs/compact.yaml."
    )
    parser.add_argument("--arms", type=Path, default=ARMS_FOLDER, help="Folder of the arms' settings.")
    parser.add_argument("--test", type=Path, required=True, help="Synthetic set that the figures come from.")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="Each in place of --seed.")
    parser.add_argument("--only", type=list[str] | None, default=None, help="Some of the arms, as '[none,both]'.")
    parser.add_argument("--cases", type=int | None, default=None, help="Only the first so many of the test set.")
    parser.add_class_arguments(FitConfig)
    return parser


def _ablate(given: Namespace, console: Console) -> None:
    from MedRationaleTraining.ablation import ARMS, METRICS, ablate, terminal_table

    own = {name: given.pop(name) for name in ("arms", "test", "seeds", "only", "cases")}
    config = fit_config(given)
    if config.baseline is not None:
        raise InputError("Expected a model with concepts, got a baseline; train and measure it with fit and evaluate.")
    command = shlex.join(["medrationale-train", *sys.argv[1:]])
    record = ablate(
        config,
        own["arms"],
        own["test"],
        seeds=list(own["seeds"]),
        only=tuple(ARMS if own["only"] is None else own["only"]),
        cases=own["cases"],
        command=command,
    )
    console.print(terminal_table(record))
    console.print(f"{METRICS} is in {config.out}")


def _speed_parser() -> ArgumentParser:
    parser = new_parser(
        "Time the making and the loading of examples in one process, and the training step of a configuration, also\n"
        "with segment_anything's own attention. The examples are those of `train`, or phantoms where it is not there.",
        usage="medrationale-train speed --config FILE [--NAME VALUE]...",
    )
    parser.add_argument("--config", action="config", help="YAML file, such as Training/configs/compact.yaml.")
    parser.add_argument("--examples", type=int, default=20, help="Stacks to load.")
    parser.add_argument("--exams", type=int, default=3, help="Examinations to synthesise.")
    parser.add_argument("--rounds", type=int, default=5, help="Steps with each attention, taken in turn.")
    parser.add_class_arguments(FitConfig)
    return parser


def _speed(given: Namespace, console: Console) -> None:
    from MedRationaleTraining.speed import measure

    counts = {name: given.pop(name) for name in ("examples", "exams", "rounds")}
    config = fit_config(given)
    if min(counts.values()) < 1:
        raise InputError(f"Expected at least 1 example, exam and round, got {', '.join(map(str, counts.values()))}.")
    speed = measure(config, **counts)
    spread = f"{min(speed.steps):.2f} to {max(speed.steps):.2f}"
    console.print(f"synthesis: {speed.exams:.2f} examinations/s, {24 * speed.exams:.0f} slices/s")
    console.print(f"loading: {speed.stacks:.1f} stacks/s, {speed.stacks * speed.slices:.0f} slices/s")
    console.print(
        f"training: {speed.batch / speed.trained:.2f} s a step ({spread}), {speed.trained * speed.slices:.1f} slices/s"
    )
    console.print(f"the loader makes {speed.stacks / speed.trained:.1f} times what the training takes")
    console.print(f"the same step with segment_anything's own attention takes {speed.gain:.2f} times as long")


def _benchmark_parser() -> ArgumentParser:
    parser = new_parser(
        "Time SAM's ViT-B on one slice (segment_anything's own encoder, ours in float32, bfloat16, compiled, int8),\n"
        "a whole study with and without the slices that have no gland, MONAI's U-Net and Swin UNETR on it, and\n"
        "`predict` with the shipped model; with --training also a training step by batch. Everything is measured in\n"
        "turn; the figures are medians and go to OUT with a plot. Stopped, the same command goes on."
    )
    parser.add_class_arguments(BenchmarkConfig)
    return parser


def _benchmark(given: Namespace, console: Console) -> None:
    from MedRationaleTraining.benchmark import measure, rows

    config = BenchmarkConfig(**given.as_dict())
    fit = fit_config(fit_parser().parse_args(["--config", config.training])) if config.training else None
    record = measure(config, "medrationale-train " + " ".join(sys.argv[1:]), fit)
    table = Table(title=f"Times as fast as segment_anything's encoder: {record['machine']['device']}")
    for name in ("", "ratio", "seconds, error, memory"):
        table.add_column(name, justify="right" if name == "ratio" else "left")
    for name, ratio, told in rows(record):
        table.add_row(name, f"{ratio:.2f}", told)
    console.print(table)
    compact = record["compact"]
    console.print(
        f"predict with the shipped model: {compact['predict_s']:.1f} s, of which the model {compact['model_s']:.1f} s"
    )
    if fit is not None:
        table = Table("trained", "slices", "seconds a step", "peak GB", title=f"A training step of {fit.model.name}")
        for row in record["training"]:
            step = row["step"]
            told = (
                ("out of memory, or killed", "")
                if step is None
                else (f"{step['seconds']:.2f}", f"{step['peak_gb']:.1f}")
            )
            table.add_row(row["tuning"], str(row["slices"]), *told)
        console.print(table)


COMMANDS = {
    "synthesize": Command(
        help="Make a synthetic set.",
        parser=_synthesize_parser,
        run=_synthesize,
        interrupted="Run the same command again to make the examinations that are missing.",
    ),
    "prepare": Command(
        help="Prepare real examinations (PI-CAI, Prostate158, MSD).",
        parser=_prepare_parser,
        run=_prepare,
        interrupted="Run the same command again to prepare the examinations that are missing.",
    ),
    "fit": Command(
        help="Train, or go on training.",
        parser=fit_parser,
        run=_fit,
        interrupted="Run the same command again to go on from the last checkpoint in `out`.",
    ),
    "resume": Command(
        help="Go on with a run that was stopped.",
        parser=_resume_parser,
        run=_resume,
        interrupted="Run the same command again to go on from the last checkpoint.",
    ),
    "ablate": Command(
        help="Measure what each constraint does.",
        parser=_ablate_parser,
        run=_ablate,
        interrupted="Run the same command again to go on with the run that was stopped.",
    ),
    "export": Command(
        help="Write a model folder from a run.",
        parser=_export_parser,
        run=_export,
    ),
    "calibrate": Command(
        help="Choose a model's thresholds on another validation set.",
        parser=_calibrate_parser,
        run=_calibrate,
    ),
    "evaluate": Command(
        help="Measure a model on a synthetic set.",
        parser=_evaluate_parser,
        run=_evaluate,
    ),
    "score": Command(
        help="Compare a model with an expert's masks of real examinations.",
        parser=_score_parser,
        run=_score,
    ),
    "speed": Command(
        help="Time synthesis, loading and the training step.",
        parser=_speed_parser,
        run=_speed,
    ),
    "benchmark": Command(
        help="Time encoder, study and predict against segment_anything and MONAI.",
        parser=_benchmark_parser,
        run=_benchmark,
        interrupted="Run the same command again to go on with what was measured.",
    ),
}

"""From a run's state to a model folder: averaged weights, concept embeddings, thresholds, card."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch

from MedRationaleLib import __version__
from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import check_writable
from MedRationaleLib.model.checkpoint import CONFIG, Checkpoint, load_checkpoint, save_checkpoint, serialized
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleLib.postprocessing import PostprocessingConfig
from MedRationaleTraining.calibration import calibrate
from MedRationaleTraining.config import FitConfig
from MedRationaleTraining.data.synthetic import describe_set, stored_exams
from MedRationaleTraining.evaluation import markdown
from MedRationaleTraining.fine_tuning import merge, prepare
from MedRationaleTraining.phrases import all_phrases
from MedRationaleTraining.real_cases import CaseScore, markdown_table, read_scores
from MedRationaleTraining.trainer import OF_A_MACHINE, RUN, STATE, read_state, store_concept_embeddings

_logger = logging.getLogger(__name__)
_TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def export_run(
    run: Path,
    out: Path,
    *,
    config: FitConfig | None = None,
    calibrate_on: str | Path | None = None,
    cases: int | None = None,
    evaluation: Path | None = None,
    scores: Path | None = None,
    initial_share: float = 0.0,
) -> Path:
    """Write the model folder `out` from the run's state and return it.

    Args:
        run: folder of a `fit`, finished or not.
        out: model folder: config.json, model.safetensors, MODEL_CARD.md.
        config: settings of the run, where it has no run.json.
        calibrate_on: synthetic validation set on which the thresholds are chosen; the first `cases` of it. Those of
            masks that were not trained (`tuning.masks: frozen`) are the initial model's, where it has some.
        evaluation: evaluation.json of these very weights, for the card; its thresholds are taken over.
        scores: real_cases.json of these very weights, for the card.
        initial_share: how much of the weights is that of the model which the run began from, the rest the run's own
            (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022).

    Raises:
        InputError: nothing to export, an evaluation or scores of other weights, thresholds from two sources, or an
            initial model that is not there.
    """
    if evaluation and calibrate_on is not None:
        raise InputError(
            "Expected thresholds from a validation set or from an evaluation, got both; leave one of them out."
        )
    report = _read_evaluation(evaluation) if evaluation else None
    if report is not None and (out / CONFIG).exists() and load_checkpoint(out).sha256 == report["weights_sha256"]:
        return _with_evaluation(out, report, scores)
    state = read_state(_existing(run / STATE))
    about = _about(run, config)
    settings: dict[str, Any] = about["config"]
    if baseline := settings.get("baseline"):
        raise InputError(
            f"Expected a run of a model that gives reasons, got one of {baseline} in {run}; "
            f"`medrationale-train resume --run {run}` writes its folder."
        )
    check_writable(out)
    bank = ConceptBank.load()
    if about["concepts"] != list(bank):
        raise InputError(f"Expected a run with the concepts of this concept bank in {run}, got others; train anew.")
    model = _averaged(state, FitConfig.from_dict(settings), about["vocabulary"], bank, run)
    if initial_share:
        _mix(model, about, initial_share)
    # What inference loads is float16, the embeddings too, which are those of the text tower as it is stored.
    model.half().float()
    store_concept_embeddings(model, bank)
    model.half().float()
    postprocessing: dict[str, Any] = {}
    training = {
        "steps": int(state["step"]),
        "settings": {k: v for k, v in settings.items() if k not in (*OF_A_MACHINE, "train", "initial", "model")},
        "sets": about["sets"],
        "history": about.get("history", []),
        "initial": about.get("initial"),
        "initial_share": initial_share,
        "medrationale": __version__,
        "torch": str(torch.__version__),
    }
    if report is not None:
        if report["weights_sha256"] != hashlib.sha256(serialized(model)).hexdigest():
            raise InputError(
                f"Expected an evaluation of the weights in {run}, got one of others in {evaluation}; "
                "export, evaluate that folder, and export again."
            )
        postprocessing = _thresholds(report)
        training["evaluation"] = _figures(report)
    elif calibrate_on is not None:
        of_masks = None
        if settings.get("tuning", {}).get("masks") == "frozen" and (known := _initial(about).postprocessing):
            of_masks = PostprocessingConfig(**known)
        chosen = calibrate(model, calibrate_on, cases=cases, of_masks=of_masks)
        postprocessing = dict(chosen.postprocessing)
        training["calibration"] = asdict(chosen)
    else:
        _logger.warning(
            "no thresholds chosen for %s, the defaults stand; choose them by `medrationale-train calibrate`", out
        )
    real = read_scores(scores, hashlib.sha256(serialized(model)).hexdigest()) if scores else None
    set_name = Path(calibrate_on).name if calibrate_on else None
    card = model_card(model, training, postprocessing, report, set_name, real)
    save_checkpoint(
        model, out, card=card, vocabulary=about["vocabulary"], postprocessing=postprocessing, training=training
    )
    return out


def recalibrate(model: str | Path, data: str | Path, out: Path, *, cases: int | None = None) -> Path:
    """Write the same weights to the folder `out`, with thresholds chosen on `data` or on the first `cases` of it.

    Figures that were measured with other thresholds are left out of its card.
    """
    stored_exams(data, cases)
    check_writable(out)
    checkpoint = load_checkpoint(model, with_text=True)
    chosen = calibrate(checkpoint.model, data, cases=cases)
    training = {k: v for k, v in checkpoint.training.items() if k != "evaluation"} | {"calibration": asdict(chosen)}
    save_checkpoint(
        checkpoint.model,
        out,
        card=model_card(checkpoint.model, training, chosen.postprocessing, None, Path(data).name),
        vocabulary=checkpoint.vocabulary,
        postprocessing=chosen.postprocessing,
        training=training,
    )
    return out


def _with_evaluation(folder: Path, report: dict[str, Any], scores: Path | None) -> Path:
    """The same model with the figures in its card, whether or not its run has gone on since."""
    checkpoint = load_checkpoint(folder, with_text=True)
    training = checkpoint.training | {"evaluation": _figures(report)}
    thresholds = _thresholds(report)
    real = read_scores(scores, checkpoint.sha256) if scores else None
    card = model_card(checkpoint.model, training, thresholds, report, None, real)
    save_checkpoint(
        checkpoint.model,
        folder,
        card=card,
        vocabulary=checkpoint.vocabulary,
        postprocessing=thresholds,
        training=training,
    )
    return folder


def _thresholds(report: dict[str, Any]) -> dict[str, Any]:
    default = asdict(PostprocessingConfig())
    return {k: v for k, v in report["postprocessing"].items() if default.get(k) != v}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    return {k: report[k] for k in ("data", "metrics", "retrieval")}


def model_card(
    model: RationaleModel,
    training: dict[str, Any],
    postprocessing: dict[str, Any],
    report: dict[str, Any] | None,
    calibrated_on: str | None,
    real: list[CaseScore] | None = None,
) -> str:
    """MODEL_CARD.md from its template."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    text, earlier = model.f_txt, _earlier(training)
    every = [s for run in (training, *earlier) for s in run.get("sets", ())]  # what went into the weights at any time
    data = list({tuple(s.get(k) for k in ("name", "examinations", "seed")): s for s in reversed(every)}.values())[::-1]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=model.config.name,
        parameters=sum(p.numel() for p in model.parameters()),
        text_parameters=sum(p.numel() for p in text.parameters()) if text is not None else 0,
        steps=training["steps"],
        config=training["settings"],
        sets=training["sets"],
        data=data,
        history=training.get("history", []),
        initial_share=training.get("initial_share", 0.0),
        earlier=earlier,
        imported=any("imported" in run for run in earlier),
        real_cases=markdown_table(real) if real else None,
        picai=any(s["picai_labels"] or s["real_backgrounds"] or s.get("reader") == "picai" for s in data),
        real=any(s["real_backgrounds"] for s in data),
        patients=any(s.get("reader") for s in data),
        postprocessing=postprocessing,
        calibrated_on=calibrated_on or ("the synthetic validation set" if "calibration" in training else None),
        evaluation=markdown(report).replace("# ", "### ", 1).strip() if report else None,
    )


def _earlier(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that the weights went through before, the latest first."""
    runs = []
    run = training.get("initial")
    while run:
        runs.append({"steps": 0, **run})
        run = run.get("initial")
    return runs


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"Expected the folder of a training run with {path.name}, found none in {path.parent}.")
    return path


def _about(run: Path, config: FitConfig | None) -> dict[str, Any]:
    """run.json; where there is none, the given settings and today's vocabulary."""
    path = run / RUN
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"Expected a run's settings in {path}, got a file that cannot be read ({error}).") from error
    if config is not None:
        about["config"] = json.loads(json.dumps(asdict(config)))
    if "config" not in about:
        raise InputError(f"Expected {RUN} in {run}, found none; give the run's settings with --settings.")
    bank = ConceptBank.load()
    phrases = [text for texts in all_phrases(bank).values() for text in texts]
    about.setdefault("concepts", list(bank))
    if "sets" not in about:
        about["sets"] = [describe_set(folder) for folder in about["config"]["train"]]
    return about | {"vocabulary": about.get("vocabulary") or TextEncoder.vocabulary_of(phrases)}


def _averaged(
    state: dict[str, Any], config: FitConfig, vocabulary: list[int], bank: ConceptBank, run: Path
) -> RationaleModel:
    model = RationaleModel(config.model, list(bank))
    model.attach_text(vocabulary)
    prepare(model, config.tuning)
    try:
        model.load_state_dict(
            {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
        )
    except RuntimeError as error:
        raise InputError(
            f"Expected the state of a '{config.model.name}' of the given sizes in {run}, got another; "
            "give the settings that it was trained with."
        ) from error
    merge(model, config.tuning)
    return model.eval()


@torch.no_grad()
def _mix(model: RationaleModel, about: dict[str, Any], share: float) -> None:
    """Move the weights by `share` of the way back to those of the model folder that the run began from."""
    if not 0 < share < 1:
        raise InputError(f"Expected a share of the initial model between 0 and 1, got {share:g}; correct the option.")
    if about["config"].get("initial") is None or about.get("initial") is None:
        raise InputError(
            "Expected a run that began from a model (`initial`), got one from random weights; leave it out."
        )
    before = _initial(about).model.state_dict()
    if before.keys() != model.state_dict().keys():
        raise InputError(
            f"Expected a run from a model of the same sizes, to mix the two, got {about['config']['initial']} without "
            "reason_dim; leave the share out."
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(before[name], share)


def _initial(about: dict[str, Any]) -> Checkpoint:
    """The model that the run began from; InputError where it is not there any more."""
    folder = about["config"]["initial"]
    initial = load_checkpoint(folder, with_text=True)
    if initial.sha256 != about["initial"]["sha256"]:
        raise InputError(f"Expected the model that the run began from in {folder}, got another; restore that folder.")
    return initial


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        markdown(report)
        return {**report, "weights_sha256": report["weights_sha256"], "postprocessing": report["postprocessing"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"Expected an evaluation.json by `evaluate` in {path}, got a file that cannot be used ({reason})."
        ) from error

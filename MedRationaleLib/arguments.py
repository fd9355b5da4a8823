"""The arguments of `medrationale` and its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from MedRationaleLib import __version__
from MedRationaleLib.errors import InputError

EXIT_CODES = (
    "Exit codes: 0 done; 1 out of memory, a fault of the programme, or an examination of a batch failed; 2 bad input; "
    "130 interrupted."
)
MOST_B_VALUE, MOST_PSA = 10_000, 100_000
"""s/mm2 and ng/ml; what is above is a slip of the hand."""
PREDICT_HELP = """Find, measure and explain lesions in one prostate MRI examination.

  medrationale predict --t2w t2w.nii.gz --adc adc.nii.gz --dwi dwi.nii.gz --out report
  medrationale predict --case 10000_1000000/ --out report
  medrationale predict --dicom examination/ --dwi 9 --out report      (series 9 in place of the DWI found)

ADC or DWI may be missing; the report says what that weakens. The T2W must be there, and axial."""

BATCH_HELP = """Find, measure and explain lesions in many prostate MRI examinations, with one model that is loaded once.

  medrationale batch --input examinations/ --output results
  medrationale batch --input manifest.csv --output results --resume

A folder has a subfolder for each examination (image files named as for `predict --case`, or DICOM), or the files of
all of them, named <patient>_<study>_t2w.mha and so on. A manifest.csv has the column id and either t2w, adc, dwi and
b_value, or case, or dicom; its paths are relative to it. It may also have psa (ng/ml) and dce (positive or negative,
what a reader saw of contrast enhancement); an empty cell is not known. Results are in OUTPUT/<id>/, and all findings
in OUTPUT/summary.csv. An examination that fails is recorded there, and the next one's turn comes."""

MODEL_HELP = """Models: which there are, what they are made of, whether they are whole; or a new one of others' weights.

  medrationale model list [FOLDER ...]        the shipped models, and those in folders given
  medrationale model info NAME                sizes, provenance, terms, figures
  medrationale model verify NAME              hash, shapes, values, concepts and stored embeddings
  medrationale model import --medsam medsam_vit_b.pth --biomedclip hub --out models/medsam_biomedclip

NAME is a shipped model or a model folder."""

IMPORT_HELP = """Make a model folder of MedSAM's (or SAM's) ViT-B weights and BiomedCLIP's text tower.

  medrationale model import --medsam medsam_vit_b.pth --biomedclip BiomedCLIP/ --out models/medsam_biomedclip
  medrationale model import --medsam medsam_vit_b.pth --biomedclip hub --out models/medsam_biomedclip

It is where fine-tuning starts (`medrationale-train fit --initial FOLDER --config Training/configs/paper.yaml`); before
that it finds nothing and explains nothing. Needs the packages of the train extra."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` shows what is expected.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command, whose name is `command`. Raises InputError for what is none of them."""
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        named = " ".join(("medrationale", given.command, *filter(None, [getattr(given, "action", None)])))
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}; `{named} --help` shows what is expected.")
    return given


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="medrationale",
        description="Explains prostate MRI findings in PI-RADS words. It assists a reader; it does not diagnose.",
        epilog=f"`medrationale predict --help` shows how to read an examination. {EXIT_CODES}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"medrationale {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show log messages, and the traceback of an error")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="{predict,batch,phantom,model,doctor}"
    )

    def command(name: str, help: str, description: str | None = None, among: Any = commands) -> _Parser:
        return among.add_parser(
            name, help=help, description=description or f"{help[0].upper()}{help[1:]}.", parents=[common],
            formatter_class=raw, epilog=EXIT_CODES, allow_abbrev=False,
        )  # fmt: skip

    sub = command("predict", "find, measure and explain lesions in an examination", PREDICT_HELP)
    group = sub.add_argument_group("examination (one of --t2w, --case, --dicom)")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--case", type=Path, metavar="DIR", help="folder with *_t2w, *_adc and *_hbv files (PI-CAI)")
    where.add_argument("--dicom", type=Path, metavar="DIR", help="DICOM folder of one examination, searched through")
    what = "file (NIfTI, MHA, MHD, NRRD); with --dicom also a series number, a series UID or a folder"
    group.add_argument("--t2w", metavar="FILE", help=f"axial T2W {what}")
    group.add_argument("--adc", metavar="FILE", help="ADC map, likewise; 1e-6 mm²/s, 1e-3 mm²/s or mm²/s")
    group.add_argument("--dwi", metavar="FILE", help="DWI of the highest b-value, likewise")
    group.add_argument("--b-value", type=_b_value, metavar="B", help="of the DWI in s/mm², if files do not tell")
    group.add_argument("--psa", type=_psa, metavar="NG_ML", help="PSA in ng/ml; its density joins the report")
    group.add_argument(
        "--dce", default="not-available", choices=("positive", "negative", "not-available"),
        help="what a reader saw of contrast enhancement, which is not among the sequences read (not-available)",
    )  # fmt: skip
    group = sub.add_argument_group("result")
    group.add_argument(
        "--out", type=_folder, required=True, metavar="DIR",
        help="folder for the results; files of an earlier run in it are replaced, other files never",
    )  # fmt: skip
    group.add_argument(
        "--quiet", action="store_true", help="print the path of the report alone (warnings go to stderr)"
    )
    group.add_argument("--profile", action="store_true", help="print where the time went, and the peak memory")
    _add_model(sub)

    sub = command("batch", "the same for many examinations, with one summary of all", BATCH_HELP)
    sub.add_argument(
        "--input", type=Path, required=True, metavar="PATH", help="folder of examinations, or a manifest.csv"
    )
    sub.add_argument(
        "--output", type=_folder, required=True, metavar="DIR", help="folder for the results; one batch at a time"
    )
    sub.add_argument(
        "--resume", action="store_true",
        help="leave out what an earlier run has finished with the same inputs, model and settings",
    )  # fmt: skip
    sub.add_argument("--quiet", action="store_true", help="print the path of the summary alone, and what failed")
    _add_model(sub)

    sub = command("phantom", "write a synthetic examination to try the programme on")
    sub.add_argument("--out", type=_folder, required=True, metavar="DIR", help="folder for the images and the truth")
    sub.add_argument("--seed", type=_natural, default=0, metavar="N", help="another number, another patient (0)")
    sub.add_argument("--quiet", action="store_true", help="print nothing")

    sub = command("model", "list, inspect, verify and import models", MODEL_HELP)
    actions = sub.add_subparsers(title="actions", dest="action", required=True, metavar="{list,info,verify,import}")
    sub = command("list", "show the models that are there", among=actions)
    sub.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="model folder, or folder of model folders, to show too"
    )
    sub = command("info", "show what a model is made of", among=actions)
    sub.add_argument("model", metavar="NAME", help="shipped model or model folder")
    sub = command("verify", "check that a model is whole; exit code 2 where it is not", among=actions)
    sub.add_argument("model", metavar="NAME", help="shipped model or model folder")
    sub = command("import", "make a model folder of published weights", IMPORT_HELP, among=actions)
    sub.add_argument(
        "--medsam", type=Path, required=True, metavar="FILE",
        help="medsam_vit_b.pth or sam_vit_b_01ec64.pth, or a ViT-B trained on from them, in segment_anything's names",
    )  # fmt: skip
    sub.add_argument(
        "--biomedclip", required=True, metavar="DIR|hub",
        help="folder with open_clip_config.json, open_clip_pytorch_model.bin and the tokenizer's files; "
        "or hub, which fetches them (0.8 GB) from huggingface.co",
    )  # fmt: skip
    sub.add_argument("--out", type=_folder, required=True, metavar="DIR", help="new folder for the model")
    sub.add_argument(
        "--pixels", type=_natural, default=1024, metavar="N",
        help="input size, a multiple of 16; positions are interpolated for others than the file's (1024)",
    )  # fmt: skip
    sub.add_argument("--quiet", action="store_true", help="print the path of the model alone")
    command("doctor", "say what is installed, which devices and models there are, and what is wrong")
    return parser


def _add_model(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("model")
    group.add_argument("--model", default="compact", metavar="NAME", help="shipped model or model folder (compact)")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="what to run on (auto)")
    group.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "bfloat16", "int8"),
        help="what to compute in: bfloat16 where the device has it (auto); int8 helps CPUs without it",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true",
        help="let torch compile the image encoder: up to a minute at first, then faster; for large models and batches",
    )  # fmt: skip
    group.add_argument(
        "--all-slices", action="store_true",
        help="look at every slice, also where a model could leave out those without gland",
    )  # fmt: skip
    group.add_argument(
        "--retrieval", default="lesion", choices=("lesion", "slice"),
        help="whose embeddings answer the questions: the lesion's own patches (default), or the mean of its slices",
    )  # fmt: skip
    group.add_argument(
        "--decision-tree", default="pirads_v2_1", choices=("pirads_v2_1", "paper_appendix_c"),
        help="PI-RADS v2.1 (default), or the tree that the paper prints",
    )  # fmt: skip


def _folder(text: str) -> Path:
    if text.strip():
        return Path(text)
    raise argparse.ArgumentTypeError("expected a folder, got an empty name")


def _b_value(text: str) -> float:
    return _positive(text, MOST_B_VALUE)


def _psa(text: str) -> float:
    return _positive(text, MOST_PSA)


def _positive(text: str, most: float) -> float:
    if re.fullmatch(r"\d+(\.\d*)?", text) and 0 < float(text) <= most:
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0 and up to {most:,.0f}, got '{text}'")


def _natural(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 0 up, got '{text}'")

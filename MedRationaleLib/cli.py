"""`medrationale predict | phantom | doctor`: reads the arguments, shows progress and a summary, and turns failures into
one sentence. What is slow to import is imported by the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from MedRationaleLib import __version__
from MedRationaleLib.errors import InputError

if TYPE_CHECKING:
    from MedRationaleLib.assessment import Assessment
    from MedRationaleLib.study import Study

EXIT_CODES = "Exit codes: 0 done; 1 out of memory or a fault of the programme; 2 bad input; 130 interrupted."
PREDICT_HELP = """Find, measure and explain lesions in one prostate MRI examination.

  medrationale predict --t2w t2w.nii.gz --adc adc.nii.gz --dwi dwi.nii.gz --out report
  medrationale predict --case 10000_1000000/ --out report
  medrationale predict --dicom examination/ --dwi 9 --out report      (series 9 in place of the DWI found)

ADC or DWI may be missing; the report says what that weakens. The T2W must be there, and axial."""


class Assessor(Protocol):
    """What predict needs of a loaded model (inference.Predictor; a fake in tests)."""

    def assess(
        self, study: Study, *, progress: Callable[[str, float], None], retrieval: Any, decision_tree: str
    ) -> Assessment:
        """See inference.Predictor.assess."""


Loader = Callable[..., Assessor]
"""load(name_or_path, device=...) -> Assessor."""


def main(argv: Sequence[str] | None = None, *, load: Loader | None = None) -> int:
    """Run one command and return its exit code (EXIT_CODES); `load` stands in for Predictor.load."""
    # Threads that spin while they wait make torch many times slower when anything else uses the cores; read at import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal without some letter shows "?" instead of stopping the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = _parser().parse_args(argv)
        with warnings.catch_warnings():
            if debug:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
            else:
                warnings.simplefilter("ignore")  # of libraries, to their developers; the Study has its own
            return args.run(args, argv, load)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind.", 130)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, the user gets one sentence
        if debug:
            traceback.print_exc()
        return _fail(*_explain(error))


def predict(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """Study in, Assessment out, written to a folder and summed up on stdout."""
    _check_arguments(args)
    from MedRationaleLib.console import console_for, show_profile, show_stages, summarise
    from MedRationaleLib.files import check_writable, written_files

    check_writable(args.out)
    with show_stages(args.quiet) as stages:
        stages("read", 0.0)
        study = _read_study(args)
        replaced = {(args.out / name).resolve() for name in written_files(args.out)}
        for source in study.provenance.values():
            if source.path and Path(source.path).resolve() in replaced:
                raise InputError(
                    f"Expected an output folder other than that of the input, got {args.out}, where the results would "
                    f"replace {Path(source.path).name}; choose another folder."
                )
        if load is None:
            stages("import", 0.0)
            import torch  # noqa: F401 - here, so that its time is told apart from the model's

            from MedRationaleLib.inference import Predictor

            load = Predictor.load
        stages("load", 0.0)
        predictor = load(args.model, device=args.device)
        assessment = predictor.assess(
            study, progress=stages, retrieval=args.retrieval, decision_tree=args.decision_tree
        )
        stages("write", 0.0)
        from MedRationaleLib.output import write_results

        timings = {
            name: round(stages.seconds[name], 3) for name in ("read", "import", "load") if name in stages.seconds
        }
        assessment.manifest["timings_s"] = timings | assessment.manifest.get("timings_s", {})
        assessment.manifest["command_line"] = shlex.join(["medrationale", *argv])
        paths = write_results(assessment, args.out)
    report = paths.report.resolve()
    if args.quiet:
        for note in dict.fromkeys((*study.warnings, *assessment.warnings)):
            sys.stderr.write(f"Warning: {note}\n")
        sys.stdout.write(f"{report}\n")
    else:
        summarise(assessment, report, console_for(sys.stdout))
    if args.profile:
        show_profile(stages.seconds, console_for(sys.stderr))
    return 0


def phantom(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """Write a synthetic examination."""
    from MedRationaleLib.console import show_stages
    from MedRationaleLib.files import check_writable

    check_writable(args.out)
    with show_stages(args.quiet) as stages:
        stages("phantom", 0.0)
        from MedRationaleLib.phantom import write_phantom

        paths = write_phantom(args.out, seed=args.seed)
    if not args.quiet:
        sys.stdout.write(
            f"A synthetic examination, with the truth about it in truth/, is in {paths.folder.resolve()}\n"
        )
    return 0


def doctor(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """Say what is installed; exit code 1 where predict cannot run."""
    from MedRationaleLib.console import console_for
    from MedRationaleLib.doctor import render, report

    found = report()
    console_for(sys.stdout).print(render(found))
    return 0 if found.ready else 1


def _check_arguments(args: argparse.Namespace) -> None:
    """What argparse cannot say by itself."""
    if args.case is None and args.dicom is None and args.t2w is None:
        given = [f"--{name}" for name in ("adc", "dwi") if getattr(args, name) is not None]
        got = f"only {' and '.join(given)}" if given else "none"
        raise InputError(f"Expected an examination, got {got}; give --t2w FILE, --case FOLDER or --dicom FOLDER.")
    if args.dicom is not None and args.b_value is not None:
        raise InputError(
            "Expected --b-value with image files, got it with --dicom, whose tags hold the b-value; leave it out."
        )


def _read_study(args: argparse.Namespace) -> Study:
    from MedRationaleLib.study import Study

    given = {"t2w": args.t2w, "adc": args.adc, "dwi": args.dwi}
    if args.dicom is not None:
        return Study.from_dicom(args.dicom, **given)
    if args.case is not None:
        return Study.from_case(args.case, **given, b_value=args.b_value)
    return Study.from_files(**given, b_value=args.b_value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` shows what is expected.")


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
    commands = parser.add_subparsers(title="commands", required=True, metavar="{predict,phantom,doctor}")

    def command(name: str, run: Callable[..., int], help: str, description: str | None = None) -> _Parser:
        made = commands.add_parser(
            name, help=help, description=description or f"{help[0].upper()}{help[1:]}.", parents=[common],
            formatter_class=raw, epilog=EXIT_CODES, allow_abbrev=False,
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    sub = command("predict", predict, "find, measure and explain lesions in an examination", PREDICT_HELP)
    group = sub.add_argument_group("examination (one of --t2w, --case, --dicom)")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--case", type=Path, metavar="DIR", help="folder with *_t2w, *_adc and *_hbv files (PI-CAI)")
    where.add_argument("--dicom", type=Path, metavar="DIR", help="DICOM folder of one examination, searched through")
    what = "file (NIfTI, MHA, MHD, NRRD); with --dicom also a series number, a series UID or a folder"
    group.add_argument("--t2w", metavar="FILE", help=f"axial T2W {what}")
    group.add_argument("--adc", metavar="FILE", help="ADC map, likewise; 1e-6 mm²/s, 1e-3 mm²/s or mm²/s")
    group.add_argument("--dwi", metavar="FILE", help="DWI of the highest b-value, likewise")
    group.add_argument("--b-value", type=_positive, metavar="B", help="of the DWI in s/mm², if files do not tell")
    group = sub.add_argument_group("result")
    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder for the results; files of an earlier run in it are replaced, other files never",
    )  # fmt: skip
    group.add_argument(
        "--quiet", action="store_true", help="print the path of the report alone (warnings go to stderr)"
    )
    group.add_argument("--profile", action="store_true", help="print where the time went, and the peak memory")
    group = sub.add_argument_group("model")
    group.add_argument("--model", default="compact", metavar="NAME", help="shipped model or model folder (compact)")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="what to run on (auto)")
    group.add_argument(
        "--retrieval", default="lesion", choices=("lesion", "slice"),
        help="whose embeddings answer the questions: the lesion's own patches (default), or the mean of its slices",
    )  # fmt: skip
    group.add_argument(
        "--decision-tree", default="pirads_v2_1", choices=("pirads_v2_1", "paper_appendix_c"),
        help="PI-RADS v2.1 (default), or the tree that the paper prints",
    )  # fmt: skip

    sub = command("phantom", phantom, "write a synthetic examination to try the programme on")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the images and the truth")
    sub.add_argument("--seed", type=_natural, default=0, metavar="N", help="another number, another patient (0)")
    sub.add_argument("--quiet", action="store_true", help="print nothing")
    command("doctor", doctor, "say what is installed, which devices and models there are, and what is wrong")
    return parser


def _positive(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d*)?", text) and float(text) > 0:
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0, got '{text}'")


def _natural(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 0 up, got '{text}'")


def _explain(error: Exception) -> tuple[str, int]:
    """(sentence, exit code) for an error that is no InputError."""
    if _is_out_of_memory(error):
        return (
            "out of memory: the examination needs more than there is; close other programmes, or use --device cpu "
            "where a GPU ran out; nothing was left behind.",
            1,
        )
    if isinstance(error, ImportError):
        return f"a package cannot be imported ({error}); `medrationale doctor` says what is missing.", 1
    if isinstance(error, OSError) and error.filename:
        return f"Expected access to {error.filename}, got '{error.strerror}'; check the path and its permissions.", 2
    return (
        f"this is a fault of the programme, not yours ({type(error).__name__}: {error}); run the command again with "
        "--debug and please report what it prints.",
        1,
    )


def _is_out_of_memory(error: Exception) -> bool:
    """torch says it by a class on the GPU and by a sentence on the CPU, ITK by a sentence."""
    words = r"out of memory|can't allocate memory|not enough memory|failed to allocate memory|bad_alloc"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None)
    )


def _fail(sentence: str, code: int) -> int:
    sys.stderr.write(f"medrationale: {' '.join(sentence.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

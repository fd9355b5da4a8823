"""`medrationale predict | batch | phantom | model | doctor`: what each command does, with failures in one sentence.

What is slow to import is imported by the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from MedRationaleLib.arguments import parse
from MedRationaleLib.errors import InputError
from MedRationaleLib.failures import explain

if TYPE_CHECKING:
    from MedRationaleLib.assessment import Assessment
    from MedRationaleLib.console import Stages
    from MedRationaleLib.decision_tree import Dce
    from MedRationaleLib.study import Study


class Assessor(Protocol):
    """What the commands need of a loaded model (inference.Predictor; a fake in tests)."""

    checkpoint: Any
    """Its `sha256` tells models apart."""
    postprocessing: Any

    @property
    def settings(self) -> dict[str, Any]:
        """How it computes, as far as that changes results."""

    def assess(
        self,
        study: Study,
        *,
        progress: Callable[[str, float], None],
        retrieval: Any,
        decision_tree: str,
        dce: Dce = "not available",
    ) -> Assessment:
        """See inference.Predictor.assess."""


Loader = Callable[..., Assessor]
"""load(name_or_path, device=...) -> Assessor."""


def main(argv: Sequence[str] | None = None, *, load: Loader | None = None) -> int:
    """Run one command and return its exit code (arguments.EXIT_CODES); `load` stands in for Predictor.load."""
    # Threads that spin while they wait make torch many times slower when anything else uses the cores; read at import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal without some letter shows "?" instead of stopping the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = parse(argv)
        with warnings.catch_warnings():
            if debug:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
            else:
                warnings.simplefilter("ignore")  # of libraries, to their developers; the Study has its own
            return COMMANDS[args.command](args, argv, load)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind.", 130)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, the user gets one sentence
        if debug:
            traceback.print_exc()
        return _fail(*explain(error))


def predict(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """Study in, Assessment out, written to a folder and summed up on stdout."""
    _check_arguments(args)
    _check_model(args, load)
    from MedRationaleLib.console import console_for, show_profile, show_stages, summarise
    from MedRationaleLib.files import check_writable, written_files
    from MedRationaleLib.output import RESULT_FILES, write_results

    check_writable(args.out, RESULT_FILES)
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
        assessment = _load(args, load, stages).assess(
            study,
            progress=stages,
            retrieval=args.retrieval,
            decision_tree=args.decision_tree,
            dce=args.dce.replace("-", " "),
        )
        stages("write", 0.0)
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


def batch(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """Studies in, a folder with the results of each and one summary out; exit code 1 where one of them failed."""
    _check_model(args, load)
    from MedRationaleLib.batch import Batch, Summary
    from MedRationaleLib.batch_input import find_studies
    from MedRationaleLib.console import show_stages

    sources = find_studies(args.input, args.output)
    summary = Summary(folder=args.output, order=tuple(source.id for source in sources))
    summary.check()
    with show_stages(args.quiet) as stages:
        predictor = _load(args, load, stages)
    asked = Batch(
        predictor=predictor,
        retrieval=args.retrieval,
        decision_tree=args.decision_tree,
        command_line=shlex.join(["medrationale", *argv]),
    )
    try:
        asked.run(sources, summary, resume=args.resume, quiet=args.quiet)
    except KeyboardInterrupt:
        done = f"{summary.count('done')} of {len(sources)} examinations"
        return _fail(f"interrupted; the results of {done} are kept, and --resume goes on from there.", 130)
    failed = summary.count("failed")
    without = summary.count("not assessed")
    told = f"{summary.count('done')} of {len(sources)} examinations done, {failed} failed"
    told = "" if args.quiet else f"{told}{f', {without} not assessed' if without else ''}: "
    sys.stdout.write(f"{told}{summary.path.resolve()}\n")
    return 1 if failed else 0


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


def model(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """List, inspect, verify or import models."""
    from MedRationaleLib.model_cli import ACTIONS

    return ACTIONS[args.action](args)


def doctor(args: argparse.Namespace, argv: Sequence[str], load: Loader | None) -> int:
    """Say what is installed; exit code 1 where predict cannot run."""
    from MedRationaleLib.console import console_for
    from MedRationaleLib.doctor import render, report

    found = report()
    console_for(sys.stdout).print(render(found))
    return 0 if found.ready else 1


COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str], Loader | None], int]] = {
    "predict": predict,
    "batch": batch,
    "phantom": phantom,
    "model": model,
    "doctor": doctor,
}


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


def _check_model(args: argparse.Namespace, load: Loader | None) -> None:
    """Refuse a name that is no model's before anything is read."""
    if load is None:
        from MedRationaleLib.model_folders import model_folder

        model_folder(args.model)


def _read_study(args: argparse.Namespace) -> Study:
    from MedRationaleLib.study import Study

    given = {"t2w": args.t2w, "adc": args.adc, "dwi": args.dwi}
    if args.dicom is not None:
        study = Study.from_dicom(args.dicom, **given)
    elif args.case is not None:
        study = Study.from_case(args.case, **given, b_value=args.b_value)
    else:
        study = Study.from_files(**given, b_value=args.b_value)
    if args.b_value is not None and study.dwi is None:
        raise InputError("Expected --b-value with a DWI, got none; give the DWI with --dwi, or leave --b-value out.")
    return study if args.psa is None else study.with_psa(args.psa)


def _load(args: argparse.Namespace, load: Loader | None, stages: Stages) -> Assessor:
    if load is None:
        stages("import", 0.0)
        import torch  # noqa: F401 - here, so that its time is told apart from the model's

        from MedRationaleLib.inference import Predictor

        load = Predictor.load
    stages("load", 0.0)
    return load(
        args.model,
        device=args.device,
        precision=args.precision,
        compiled=args.compile,
        all_slices=args.all_slices,
    )


def _fail(sentence: str, code: int) -> int:
    sys.stderr.write(f"medrationale: {' '.join(sentence.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

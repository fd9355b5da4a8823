"""`medrationale model list | info | verify | import`: what each does and shows."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from MedRationaleLib.console import console_for, show_stages, show_transfer
from MedRationaleLib.doctor import inspect_model
from MedRationaleLib.errors import InputError
from MedRationaleLib.model_folders import (
    CARD,
    WEIGHTS,
    ModelSettings,
    card_section,
    check_new,
    licence,
    model_folder,
    model_folders,
    parts_of,
    read_settings,
)

if TYPE_CHECKING:
    from MedRationaleLib.hub import Repository
    from MedRationaleLib.model.importing import ImportedModel
    from MedRationaleLib.model.weight_files import Taken

SHOWN = 5
"""So many tensors are named in the terminal; config.json has them all."""


def list_models(args: argparse.Namespace) -> int:
    """A row for each model; those that cannot be used, or are none, say why below."""
    console = console_for(sys.stdout)
    table = _table(console.is_terminal, "Model", "Parameters", "Size", "State", "Licence", "Folder")
    folders, problems = model_folders(args.folders)
    for folder in folders:
        status, state = inspect_model(folder), "cannot be used"
        try:
            settings = read_settings(folder)
            name, state = settings.model.name, settings.state if status.problem is None else state
        except InputError as error:
            name = folder.name
            problems.append(str(error))
        else:
            problems += [status.problem] if status.problem else []
        sizes = f"{status.parameters / 1e6:.1f} M", f"{status.size_mb:.1f} MB"
        table.add_row(
            name, *sizes, Text(state, "red" if state == "cannot be used" else ""), licence(folder), str(folder)
        )
    console.print(table)
    for problem in problems:
        console.print(Text(problem, "red"), soft_wrap=True)
    return 2 if problems else 0


def info(args: argparse.Namespace) -> int:
    """Sizes, provenance, terms and figures of one model."""
    folder = model_folder(args.model)
    settings = read_settings(folder)
    console = console_for(sys.stdout)
    console.print(Text(settings.model.name, "bold"))
    if settings.warning:
        console.print(Text(f"Warning: {settings.warning}", "yellow"), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, value in (*_architecture(settings), *_provenance(settings)):
        table.add_row(Text(what, "dim"), value)
    console.print(table)
    if problem := inspect_model(folder).problem:  # the figures are of other weights
        sys.stderr.write(f"medrationale: {problem}\n")
        return 2
    figures = _first_table(card_section(folder, "Figures"))
    console.print(Text(f"\nFigures ({CARD} has them all)" if figures else f"\nNo figures in {CARD}", "bold"))
    console.print(Markdown(figures))
    return 0


def verify_model(args: argparse.Namespace) -> int:
    """A line for each check; exit code 2 where one failed."""
    folder = model_folder(args.model)
    with show_stages(quiet=not sys.stderr.isatty()) as stages:
        stages("import", 0.0)
        from MedRationaleLib.model.verification import verify

        stages("verify", 0.0)
        checks = verify(folder)
    console = console_for(sys.stdout)
    for check in checks:
        word, colour = {True: ("ok", "green"), False: ("failed", "red"), None: ("not checked", "yellow")}[check.passed]
        console.print(Text(f"{check.name:<14}"), Text(f"{word:<12}", colour), Text(check.detail), soft_wrap=True)
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        sys.stderr.write(
            f"medrationale: {folder} failed {', '.join(failed)}; restore the folder, or import or export it anew.\n"
        )
    return 2 if failed else 0


def import_weights(args: argparse.Namespace) -> int:
    """Published weights in, a model folder out."""
    with show_stages(args.quiet) as stages:
        stages("import", 0.0)
        from MedRationaleLib.model.torchvision_guard import ensure_torchvision

        ensure_torchvision()
        import open_clip  # noqa: F401 - first of all, so that nothing is fetched where the train extra is missing

        from MedRationaleLib.model.importing import import_model

        check_new(args.out)
        config = _config(args.pixels)
    repository = None
    folder = Path(args.biomedclip)
    if args.biomedclip == "hub":
        from MedRationaleLib.hub import BIOMEDCLIP
        from MedRationaleLib.model.sam_weights import read_sam

        repository = BIOMEDCLIP
        read_sam(args.medsam, config)  # read again below: nothing is fetched beside a file that is refused
        try:
            folder = _fetch(repository, args.quiet)
        except KeyboardInterrupt:
            sys.stderr.write(
                "medrationale: interrupted; what came so far is kept, and the same command goes on there.\n"
            )
            return 130
    with show_stages(args.quiet) as stages:
        made = import_model(args.medsam, folder, args.out, config=config, hub=repository, progress=stages)
    out = made.folder.resolve()
    if args.quiet:
        sys.stderr.write(f"Warning: {made.warning}\n")
        sys.stdout.write(f"{out}\n")
        return 0
    console = console_for(sys.stdout)
    for line in _report(made):
        console.print(line, soft_wrap=not console.is_terminal)
    if repository is not None:
        console.print(f"The files from the hub are kept in {folder}; the model does not need them.", soft_wrap=True)
    console.print(Text(f"Warning: {made.warning}", "yellow"), soft_wrap=not console.is_terminal)
    console.print(Text(f"Model: {out}", "bold"), soft_wrap=True)
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": list_models,
    "info": info,
    "verify": verify_model,
    "import": import_weights,
}


# ------------------------------------------------------------------ import


def _config(pixels: int) -> Any:
    from dataclasses import replace

    from MedRationaleLib.model.config import medsam_biomedclip

    config = medsam_biomedclip()
    if pixels < config.patch or pixels % config.patch:
        raise InputError(f"Expected --pixels of a multiple of {config.patch}, got {pixels}; choose 1024, 512 or 256.")
    return replace(config, pixels=pixels)


def _fetch(repository: Repository, quiet: bool) -> Path:
    """Fetch the files into torch's cache of published weights, after saying how much that is."""
    import torch

    from MedRationaleLib.hub import look_up

    folder = Path(torch.hub.get_dir()) / "medrationale" / repository.name.partition("/")[2]
    download = look_up(repository, folder)
    if not quiet:
        there = f", of which {download.present / 1e6:.1f} MB are there" if download.present else ""
        sys.stderr.write(
            f"{repository.name} from {repository.page} (MIT licence): {download.size / 1e6:.1f} MB{there}, "
            f"to {folder}\n"
        )
    with show_transfer(quiet) as progress:
        download.run(progress)
    return folder


def _report(made: ImportedModel) -> Iterator[str]:
    for what, taken in (("Image encoder and mask decoder", made.image), ("Text tower", made.text)):
        yield f"{what}: {taken.name}, {taken.identity or 'not a published file that is known here'}"
        yield f"  SHA-256      {taken.sha256}"
        yield f"  taken        {taken.tensors} tensors, {taken.parameters / 1e6:.1f} M parameters"
        for change in taken.changed:
            yield f"  interpolated {change}"
        yield f"  left out     {_left_out(taken)}"
        yield f"  missing      {_names(taken.missing)}"
        yield f"  unexpected   {_names(taken.unexpected)}"
    yield f"At random (no counterpart in the files): {_names(made.random)}"
    if made.unknown_words:
        yield f"{made.unknown_words} words of the concepts' phrasings are not in the text tower's vocabulary"


def _left_out(taken: Taken) -> str:
    parts = sorted({name.rpartition(".")[0].split(".")[0] or name for name in taken.left_out})
    return f"{len(taken.left_out)} tensors without a counterpart ({', '.join(parts)})" if parts else "none"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"


# ------------------------------------------------------------------ info


def _architecture(settings: ModelSettings) -> Iterator[tuple[str, str]]:
    model, folder = settings.model, settings.folder
    yield "folder", str(folder.resolve())
    yield "state", settings.state
    yield "licence", licence(folder)
    yield "input", f"{model.pixels} x {model.pixels} pixels of T2W, ADC and DWI; patches of {model.patch} pixels"
    context = f", mixed across slices after every {model.axial_every}" if model.axial_every else ""
    yield "image encoder", f"{model.depth} blocks of width {model.embed_dim}, {model.heads} heads{context}"
    kind = {"clip": "open_clip's transformer", "biomedclip": "BERT (BiomedCLIP)"}[model.text.kind]
    yield "text tower", f"{kind}, {model.text.layers} layers of width {model.text.width}"
    yield "shared space", f"{model.shared_dim} dimensions, {len(settings.concepts)} concepts, heat by {model.heatmap}"
    shapes, precision = _shapes(folder / WEIGHTS)
    parts = parts_of(shapes)
    if parts:
        yield "parameters", ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.items())
        yield "stored in", f"{precision}, {(folder / WEIGHTS).stat().st_size / 1e6:.1f} MB"


def _provenance(settings: ModelSettings) -> Iterator[tuple[str, str]]:
    training = settings.training
    yield "format", f"{settings.format}, by MedRationale {training.get('medrationale', 'of an unknown version')}"
    yield "SHA-256", settings.weights_sha256 or "not kept"
    run: Any = training
    while run:
        if run.get("steps"):
            sets = ", ".join(dict.fromkeys(s["name"] for s in run.get("sets", ())))
            yield (
                "trained" if run is training else "before that",
                f"{run['steps']} steps" + (f" on {sets}" if sets else ""),
            )
        for what in ("image", "text") if "imported" in run else ():
            file = run["imported"][what]
            known = f" ({file['identity']})" if file.get("identity") else ""
            yield "imported", f"{file['name']}{known}, SHA-256 {file['sha256'][:12]}..."
        run = run.get("initial")


def _shapes(path: Path) -> tuple[dict[str, list[int]], str]:
    """Name -> shape of every tensor, and the precision of most, from the file's header; nothing of a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = [part.get_dtype() for part in slices.values()]
            return {k: v.get_shape() for k, v in slices.items()}, max(set(types), key=types.count)
    except (SafetensorError, OSError):
        return {}, ""


def _first_table(text: str) -> str:
    """Up to the end of the first table, or the first paragraph where there is none."""
    found = re.match(r".*?^\|.*?(?=^[^|]|\Z)", text, re.MULTILINE | re.DOTALL)
    return (found[0] if found else text.partition("\n\n")[0]).strip()


def _table(terminal: bool, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD if terminal else None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("Parameters", "Size") else "left", overflow="fold")
    return table

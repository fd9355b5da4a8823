"""medrationale-train synthesize | prepare | fit | resume | ablate | export | calibrate | evaluate | score | ..."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve whatever else runs

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from rich import get_console
from rich.logging import RichHandler

from MedRationaleLib.errors import InputError
from MedRationaleTraining.commands import COMMANDS, new_parser

_DESCRIPTION = """Train MedRationale's models on synthetic examinations with known reasons.

In this order:
  medrationale-train synthesize --picai-labels LABELS --split train --cases 1040 --seed 0 --out data/synthetic/train
  medrationale-train synthesize --picai-labels LABELS --split val --cases 90 --seed 1 --out data/synthetic/val
  medrationale-train synthesize --picai-labels LABELS --split test --cases 150 --seed 2 --out data/synthetic/test
  medrationale-train fit --config Training/configs/compact.yaml
  medrationale-train evaluate --model runs/compact/model --data data/synthetic/test --out runs/compact/test
  medrationale-train export --run runs/compact --out runs/compact/model \\
      --evaluation runs/compact/test/evaluation.json
  medrationale-train score --model runs/compact/model --cases '[CASE1,CASE2]' --out runs/compact/real
LABELS is a clone of DIAGNijmegen/picai_labels (CC BY-NC 4.0); without it the glands are procedural phantoms.
Real examinations are prepared once and then stand beside synthetic ones, as in `fit --train '[SYNTHETIC,REAL]'`:
  medrationale-train prepare --reader picai --data IMAGES --labels LABELS --out data/real/picai
What the constraints do, and other networks on the same data in as many steps:
  medrationale-train ablate --config Training/configs/compact.yaml --config Training/configs/ablation.yaml \\
      --initial MODEL --test data/synthetic/test
  medrationale-train fit --config Training/configs/compact.yaml --config Training/configs/baselines/unet.yaml
The paper's model, from `medrationale model import`, on four GPUs:
  torchrun --nproc-per-node 4 -m MedRationaleTraining.cli fit --config Training/configs/paper.yaml --initial MODEL
How fast it is:
  medrationale-train speed --config Training/configs/compact.yaml
  medrationale-train benchmark --out Resources/Benchmarks
All but `export`, `calibrate`, `evaluate`, `score` and `speed` may be stopped at any moment: the same command goes on
where it was (`resume --run runs/compact` does so without the settings)."""


def build_parser() -> ArgumentParser:
    """The parser of all subcommands; every option of a configuration is also a key of its YAML file."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = new_parser(_DESCRIPTION, prog="medrationale-train")
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.help)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    console = get_console()  # the one that progress bars use
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("MedRationaleLib.postprocessing").setLevel(logging.WARNING)
    command = "medrationale-train"
    given_arguments = sys.argv[1:] if arguments is None else arguments
    try:
        given = build_parser().parse_args([_with_underscores(a) for a in given_arguments])
        command = str(given.command)
        COMMANDS[command].run(given[command], console)
    except InputError as error:
        return _refuse(str(error))
    except ArgumentError as error:
        return _refuse(_plain(str(getattr(error, "message", error)), given_arguments))
    except KeyboardInterrupt:
        told = COMMANDS[command].interrupted if command in COMMANDS else "Nothing was written."
        sys.stderr.write(f"\nInterrupted. {told}\n")
        return 130
    return 0


def _with_underscores(argument: str) -> str:
    """Options may be written with dashes, too: --picai-labels."""
    return re.sub(r"^--[\w.-]+", lambda match: "--" + match[0][2:].replace("-", "_"), argument)


_KINDS = {
    "list": "a list such as [one,two]",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
}


def _plain(message: str, arguments: Sequence[str]) -> str:
    """A message of jsonargparse's in the words that a user has typed, with the file that it is about."""
    message = " ".join(message.split())
    command = next((a for a in arguments if a in COMMANDS), "medrationale-train")
    files = [Path(value) for option, value in pairwise(arguments) if option in ("--config", "--settings")]
    if (found := re.fullmatch(r'Parser key "(.+?)": Expected an? (.+?)\. Got value: (.*)', message)) or (
        found := re.fullmatch(
            r'Parser key "(.+?)": Does not validate .*? Subtypes: \[(.+)\] Errors: .* Given value: (.*)', message
        )
    ):
        name, kind, got = found.groups()
        kind = kind.replace(", <class 'NoneType'>", ", or null")
        kind = re.sub(r"list\[[\w.]+\]", _KINDS["list"], kind)
        kind = re.sub(r"tuple\[float, float\]", "two numbers such as [1.0,2.0]", kind)
        kind = re.sub(r"<class '(\w+)'>", lambda m: _KINDS.get(m[1], m[1]), kind)
        kind = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", kind)
        given = any(a.partition("=")[0] == f"--{name}" for a in arguments)
        return f"Expected {kind} for --{name}, got {got}; correct it{'' if given else _where(files, name)}."
    if found := re.search(r"File does not exist: '?(.+?)'?$", message):
        return f"Expected a YAML file of settings, got {found[1]}, which is not there; check the path."
    if 'expected "command" to be one of' in message:
        return f"Expected a command, got none; it is one of {', '.join(COMMANDS)} (`medrationale-train --help`)."
    if found := re.match(r"argument COMMAND: invalid choice: '(.+?)'", message):
        close = get_close_matches(found[1], COMMANDS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        return f"Expected a command, got '{found[1]}'; {meant}`medrationale-train --help` has them."
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        names = " and ".join("--" + name.rpartition(".")[2] for name in found[1].split(", "))
        return f"Expected {names}, got none; `{command} --help` says what to give."
    if found := re.search(r"does not accept option '(.+?)'|unrecognized arguments: (?:--)?(\S+)", message):
        name = found[1] or found[2]
        options = [a.dest for a in COMMANDS[command].parser()._actions] if command in COMMANDS else []
        close = get_close_matches(name, options, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        return (
            f"Expected options of `{command}`, got '{name}'{_where(files, name)}; {meant}`{command} --help` has them."
        )
    if "Problems parsing config" in message:
        for file in files:
            try:
                with file.open(encoding="utf-8") as stream:
                    yaml.safe_load(stream)
            except (OSError, ValueError, yaml.YAMLError) as error:
                return f"Expected YAML, got a file that cannot be read: {error}"
    return message


def _where(files: Sequence[Path], name: str) -> str:
    """ " in FILE" for the file that has this dotted name; nothing where it is not in one."""
    for file in reversed(files):
        try:
            value = yaml.safe_load(file.read_text(encoding="utf-8"))
            for part in name.split("."):
                value = value[part]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
        return f" in {file}"
    return ""


def _refuse(message: str) -> int:
    sys.stderr.write("medrationale-train: " + " ".join(message.split()) + "\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())

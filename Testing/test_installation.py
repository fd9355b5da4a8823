"""The Python packages of a first run: asked for with their names and sizes, installed with consent, or one sentence."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from slicer_harness.dialogs import Dialogs
    from slicer_harness.torch_standin import TorchState

MODULE = Path(__file__).resolve().parent.parent / "MedRationale"
INSTALLED = {
    "torch": "2.9.1+cu128",
    "filelock": "3.20.0",
    "jinja2": "3.1.6",
    "jsonschema": "4.25.0",
    "packaging": "25.0",
    "pillow": "12.0.0",
    "PyYAML": "6.0.3",
    "rich": "14.2.0",
    "safetensors": "0.6.2",
    "scikit-image": "0.25.2",
    "segment-anything": "1.0",
}
SENTENCE = re.compile(r"[A-Z{a-z][^\n]{30,500}\.")


@dataclass
class Python:
    """What the tests say is installed; installing through the stand-ins adds to it."""

    installation: Any
    installer: Any
    torch: TorchState | None = None
    packages: dict[str, str] = field(default_factory=lambda: dict(INSTALLED))

    def lacks(self, *names: str) -> None:
        for name in names:
            self.packages.pop(name)
            self.installer.missing.add(name.lower())
        if self.torch is not None and "torch" in names:
            self.torch.installed = False

    def version(self, name: str) -> str:
        """Stands for importlib.metadata.version."""
        if name in self.packages:
            return self.packages[name]
        got_torch = name == "torch" and self.torch is not None and self.torch.installed
        if got_torch or name.lower() in self.installer.provided:
            return INSTALLED[name]
        raise importlib.metadata.PackageNotFoundError(name)


@pytest.fixture
def bare_python(scene: Any, monkeypatch: pytest.MonkeyPatch) -> Python:
    """A Slicer without the PyTorch extension in which everything is installed, until the test takes it away."""
    import slicer.packaging

    monkeypatch.syspath_prepend(str(MODULE))
    made = Python(importlib.import_module("MedRationaleSlicer.installation"), slicer.packaging.INSTALLER)
    monkeypatch.setattr(importlib.metadata, "version", made.version)
    return made


@pytest.fixture
def python(bare_python: Python, torch_extension: TorchState) -> Python:
    """The same with the PyTorch extension."""
    torch_extension.module = "torch itself"
    bare_python.torch = torch_extension
    return bare_python


def calls() -> list[str]:
    """What slicer.packaging was asked to install."""
    import slicer.packaging

    installs = [call for call in slicer.packaging.INSTALLER.calls if call.function == "pip_install"]
    return [text for call in installs for text in call.requirements]


def refused(python: Python, **options: bool) -> str:
    """The sentence of a failure."""
    with pytest.raises(RuntimeError) as caught:
        python.installation.ensure_installed(**options)
    text = str(caught.value)
    assert SENTENCE.fullmatch(text), text
    return text


# What is missing


def test_where_nothing_is_missing_nothing_is_asked(python: Python, dialogs: Dialogs) -> None:
    assert python.installation.missing() == []
    python.installation.ensure_installed()
    assert dialogs.shown == [] and calls() == [] and python.torch.calls == []


def test_every_requirement_can_be_missing_and_torch_comes_first(python: Python) -> None:
    python.lacks(*INSTALLED)
    missing = python.installation.missing()
    assert [re.split(r"[<>=!~]", each)[0] for each in missing] == list(INSTALLED)


@pytest.mark.parametrize(
    ("name", "version", "missing"),
    [
        ("torch", "2.4.1", True),
        ("torch", "2.5", False),
        ("torch", "2.10.0+cpu", False),
        ("torch", "3", False),
        ("safetensors", "0.4.4", True),
        ("safetensors", "0.4.5", False),
        ("safetensors", "0.10.0", False),
        ("segment-anything", "1", False),
        ("segment-anything", "1.0", False),
        ("PyYAML", "5.4.1", True),
        ("packaging", "22.0", True),
        ("packaging", "23", False),
    ],
)
def test_too_old_a_version_counts_as_missing(python: Python, name: str, version: str, missing: bool) -> None:
    python.packages[name] = version
    assert bool(python.installation.missing()) is missing


# The question


def test_the_question_has_names_sizes_and_what_becomes_of_images(python: Python, dialogs: Dialogs) -> None:
    python.lacks("torch", "jinja2", "scikit-image")
    dialogs.answer("python packages", "Cancel")
    refused(python)
    (shown,) = dialogs.shown
    for word in ("torch>=2.5", "jinja2>=3.1", "scikit-image>=0.22", "GB", "images are never sent"):
        assert word in shown.text
    assert "rich" not in shown.text


def test_declined_nothing_is_installed_and_the_next_time_it_is_asked_again(python: Python, dialogs: Dialogs) -> None:
    python.lacks("torch", "rich")
    for _ in range(2):
        dialogs.answer("python packages", "Cancel")
        assert "press Apply" in refused(python)
    assert len(dialogs.shown) == 2 and calls() == [] and python.torch.calls == []


# The installation


def test_accepted_torch_comes_through_its_extension_and_the_rest_through_slicer(
    python: Python, dialogs: Dialogs
) -> None:
    import slicer.packaging

    python.lacks("torch", "jinja2", "segment-anything")
    dialogs.answer("python packages", "Ok")
    python.installation.ensure_installed()
    assert len(dialogs.shown) == 1, "nothing is asked twice"
    (torch,) = python.torch.calls
    assert torch["torchVersionRequirement"] == ">=2.5" and torch["askConfirmation"] is False
    assert calls() == ["jinja2>=3.1", "segment-anything>=1.0"]
    assert {call.requester for call in slicer.packaging.INSTALLER.calls} == {"MedRationale"}
    assert python.installation.missing() == []


@pytest.mark.parametrize("lacking", ["torch", "rich"])
def test_only_what_is_missing_is_installed(python: Python, dialogs: Dialogs, lacking: str) -> None:
    python.lacks(lacking)
    dialogs.answer("python packages", "Ok")
    python.installation.ensure_installed()
    assert calls() == ([] if lacking == "torch" else ["rich>=13.7"])
    assert len(python.torch.calls) == (lacking == "torch")


def test_a_script_that_has_agreed_is_not_asked(python: Python, dialogs: Dialogs) -> None:
    python.lacks("torch", "rich")
    python.installation.ensure_installed(ask=False)
    assert dialogs.shown == [] and calls() == ["rich>=13.7"] and python.torch.calls


# What can go wrong


def test_without_the_pytorch_extension_it_says_where_to_get_it_and_asks_nothing(
    bare_python: Python, dialogs: Dialogs
) -> None:
    bare_python.lacks("torch", "rich")
    assert "Extensions Manager" in refused(bare_python)
    assert dialogs.shown == [] and calls() == []


def test_an_older_slicer_is_told_which_one_is_needed_before_torch_is_downloaded(
    python: Python, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    python.lacks("torch", "rich")
    monkeypatch.setitem(sys.modules, "slicer.packaging", None)
    assert "Slicer 5.12" in refused(python)
    assert dialogs.shown == [] and python.torch.calls == []


def test_a_failing_pip_is_one_sentence_with_what_was_to_be_installed(python: Python) -> None:
    import slicer.packaging

    python.lacks("rich", "jinja2")
    slicer.packaging.INSTALLER.fails = True
    text = refused(python, ask=False)
    assert "rich>=13.7" in text and "jinja2>=3.1" in text and "network" in text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("light-the-torch found no torch for this computer\nand more lines"),
        subprocess.CalledProcessError(1, ["PythonSlicer", "-m", "light_the_torch"]),
        ConnectionError("Network is unreachable"),
        TimeoutError(),
        ValueError("no such backend"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_torch_that_cannot_be_had_is_one_sentence(
    python: Python, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import PyTorchUtils

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    python.lacks("torch", "rich")
    monkeypatch.setattr(PyTorchUtils.PyTorchUtilsLogic, "installTorch", fail)
    text = refused(python, ask=False)
    assert text.startswith("torch could not be installed") and "network" in text
    assert calls() == [], "the rest is of no use without torch"


def test_offline_the_rest_is_one_sentence_too(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicer.packaging

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise ConnectionError("Network is unreachable")

    python.lacks("rich")
    monkeypatch.setattr(slicer.packaging, "pip_ensure", fail)
    assert "Network is unreachable" in refused(python, ask=False)


def test_a_refusal_of_the_pytorch_extension_itself_is_one_sentence(
    python: Python, monkeypatch: pytest.MonkeyPatch
) -> None:
    import PyTorchUtils

    python.lacks("torch")
    monkeypatch.setattr(PyTorchUtils.PyTorchUtilsLogic, "installTorch", lambda *a, **o: None)
    assert "torch could not be installed" in refused(python, ask=False)


def test_what_is_not_there_after_all_is_named(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicer.packaging

    python.lacks("rich")
    monkeypatch.setattr(slicer.packaging, "pip_ensure", lambda *a, **o: None)
    text = refused(python, ask=False)
    assert "rich>=13.7" in text and "restart Slicer" in text

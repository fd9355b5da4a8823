"""The guard is tested in processes of its own: what a process has imported, it keeps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUARD = "from MedRationaleLib.model.torchvision_guard import ensure_torchvision, sam_modeling\n"
DECLARED = "import torch; print(ensure_torchvision(), hasattr(torch.ops.torchvision, 'nms'))"
MISMATCH = "raise RuntimeError('operator torchvision::nms does not exist')"


def run(code: str, *first_on_path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter with the given folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*first_on_path, ROOT]))}
    command = [sys.executable, "-c", GUARD + code]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)


@pytest.fixture
def fake_torchvision(tmp_path: Path):
    """Return a function that puts a torchvision of the given source into a folder and returns that folder."""

    def write(source: str) -> Path:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        return tmp_path

    return write


def needs(*names: str) -> None:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"the train extra is not installed: {', '.join(absent)}")


def test_everything_that_imports_torchvision_imports_after_the_guard() -> None:
    needs("torchvision", "timm", "open_clip", "lightning")
    done = run(
        "sam = sam_modeling()\n"
        "state = ensure_torchvision()\n"
        "import segment_anything, timm, open_clip, lightning.fabric, torchvision\n"
        "print(state == ensure_torchvision(), torchvision.transforms.Resize(4).size)\n"
        "print(segment_anything.modeling.Sam.__module__, sam_modeling() is sam)"
    )
    assert done.stdout.split() == ["True", "4", "segment_anything.modeling.sam", "True"], done.stderr


def test_a_matching_pair_is_left_untouched(fake_torchvision) -> None:
    done = run(DECLARED, fake_torchvision("imports_by_itself = True"))
    assert done.stdout.split() == ["native", "False"], done.stderr


def test_a_foreign_build_is_imported_anew_with_the_operators_declared(fake_torchvision) -> None:
    source = f"import torch\nfrom . import extension\nif not hasattr(torch.ops.torchvision, 'nms'):\n    {MISMATCH}"
    folder = fake_torchvision(f"{source}\nextension.bound = torch.ops.torchvision.qnms")
    (folder / "torchvision" / "extension.py").write_text("")
    done = run(f"{DECLARED}\nimport torchvision\nprint(hasattr(torchvision.extension, 'bound'))", folder)
    assert done.stdout.split() == ["declared", "True", "True"], done.stderr


@pytest.mark.parametrize(
    "error",
    ["ImportError('libcudart.so.12: cannot open shared object file')", "RuntimeError('CUDA major versions differ')"],
)
def test_another_error_is_not_swallowed(fake_torchvision, error: str) -> None:
    done = run(DECLARED, fake_torchvision(f"raise {error}"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == error.replace("('", ": ").replace("')", "")


def test_an_error_that_stays_is_raised_once_the_operators_are_there(fake_torchvision) -> None:
    done = run(DECLARED, fake_torchvision(MISMATCH))
    assert done.returncode == 1
    assert "operator torchvision::nms does not exist" in done.stderr


def test_the_network_classes_come_without_torchvision(fake_torchvision) -> None:
    done = run(
        "import sys\n"
        "sam = sam_modeling()\n"
        "print(sam.ImageEncoderViT(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2).img_size)\n"
        "print([sam.MaskDecoder, sam.PromptEncoder, sam.TwoWayTransformer, sam.Sam])\n"
        "print(sam_modeling() is sam, 'torchvision' in sys.modules, 'segment_anything' in sys.modules)",
        fake_torchvision("raise ImportError('must not be imported')"),
    )
    assert done.stdout.splitlines()[0] == "32", done.stderr
    assert done.stdout.splitlines()[-1] == "True False False"


def test_a_segment_anything_that_was_imported_before_is_used() -> None:
    needs("torchvision")
    done = run("ensure_torchvision()\nimport segment_anything\nprint(sam_modeling() is segment_anything.modeling)")
    assert done.stdout.strip() == "True", done.stderr

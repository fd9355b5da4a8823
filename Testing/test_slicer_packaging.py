"""The Slicer extension's package: what CMake lists, what is installed where, and what the extension says of itself."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from slicer_harness import probes

import MedRationaleLib

ROOT = Path(__file__).resolve().parent.parent
MODULE, LIBRARY = ROOT / "MedRationale", ROOT / "MedRationaleLib"
ICON = MODULE / "Resources" / "Icons" / "MedRationale.png"
OF_SLICER = {"numpy", "scipy", "SimpleITK", "pydicom"}
"""What Slicer's own Python has."""
OF_PYTORCH = {"torch"}
"""What Slicer's PyTorch extension installs."""
PICTURES = "Screenshots"
OF_THE_README = (PICTURES, "Benchmarks")
"""Folder of Resources that the extension's page shows, and that is not packaged."""
MODULES = "lib/Slicer-5.13/qt-scripted-modules"

SLICER_CONFIG = """
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/use.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_CURRENT_LIST_DIR}/nothing.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_CURRENT_LIST_DIR}/describe.cmake)
"""
USE_FILE = f"""
enable_testing()
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR {MODULES})
set(Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR ./{MODULES})
macro(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MY "WITH_GENERIC_TESTS;WITH_SUBDIR" "NAME" "SCRIPTS;RESOURCES" ${{ARGN}})
  if(MY_UNPARSED_ARGUMENTS OR NOT MY_NAME)
    message(FATAL_ERROR "wrong arguments: ${{ARGN}}")
  endif()
  set(_inside .)
  if(MY_WITH_SUBDIR)
    get_filename_component(_inside ${{CMAKE_CURRENT_SOURCE_DIR}} NAME)
  endif()
  foreach(_file ${{MY_SCRIPTS}} ${{MY_RESOURCES}})
    get_filename_component(_folder ${{_file}} DIRECTORY)
    install(FILES ${{_file}} COMPONENT Runtime
      DESTINATION ${{Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR}}/${{_inside}}/${{_folder}})
  endforeach()
endmacro()
macro(slicer_add_python_unittest)
  cmake_parse_arguments(MY "" "SCRIPT" "" ${{ARGN}})
  add_test(NAME py_${{MY_SCRIPT}} COMMAND true)
endmacro()
"""
DESCRIBE = """
foreach(_name HOMEPAGE ICONURL SCREENSHOTURLS DEPENDS DESCRIPTION CONTRIBUTORS)
  message(STATUS "EXTENSION_${_name}=${EXTENSION_${_name}}")
endforeach()
"""
TOOLCHAIN = """
set(CMAKE_SYSTEM_NAME Generic)
foreach(_language C CXX)
  set(CMAKE_${_language}_COMPILER true)
  set(CMAKE_${_language}_COMPILER_FORCED TRUE)
endforeach()
"""
"""Nothing is compiled, so no compiler is needed."""

IN_THE_INSTALLATION = """
import json, sys
from pathlib import Path
modules, job = Path(sys.argv[1]), Path(sys.argv[2])
from slicer_harness import application
application.bootstrap()
from slicer_harness import module_loader
module_loader.load(modules / "MedRationale.py")
panel = module_loader.show("MedRationale")
box = panel.ui.modelComboBox
import MedRationaleLib.resources
from MedRationaleSlicer import installation, worker
started = []
class Process:
    pid = 1
    def poll(self):
        return 0
def launch(args, **options):
    started.append(options["cwd"])
    return Process()
one = worker.Worker(job, progress=lambda text, fraction: None, ended=lambda outcome: None, launch=launch)
one.start()
one.cancel()
print(json.dumps({
    "library": MedRationaleLib.__file__,
    "models": [box.itemText(index) for index in range(box.count)],
    "resources": str(MedRationaleLib.resources.resource_path("Models")),
    "requirements": installation.REQUIREMENTS.is_file(),
    "started_in": started,
}))
"""


def listed(file: Path, name: str) -> list[str]:
    """The entries of `set(NAME ...)` in a CMakeLists.txt."""
    found = re.search(rf"^set\({name}\n(.*?)^  \)$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{file} has no list {name}"
    return found[1].split()


def files_in(folder: Path, fits: Callable[[Path], bool]) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts and fits(path))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def ranges(lines: list[str]) -> dict[str, str]:
    """Name -> range, of requirements."""
    found = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?\s*(.*)$", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def project_ranges() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^dependencies = \[\n(.*?)^\]$", text, re.MULTILINE | re.DOTALL)
    assert section
    return ranges(re.findall(r'^    "([^"]+)"', section[1], re.MULTILINE))


# What is listed


@pytest.mark.parametrize("folder", [MODULE, LIBRARY], ids=lambda folder: folder.name)
def test_every_python_file_is_packaged(folder: Path) -> None:
    scripts = listed(folder / "CMakeLists.txt", "MODULE_PYTHON_SCRIPTS")
    assert sorted(scripts) == files_in(folder, lambda path: path.suffix == ".py")


def test_every_resource_of_the_module_is_packaged() -> None:
    resources = listed(MODULE / "CMakeLists.txt", "MODULE_PYTHON_RESOURCES")
    assert sorted(resources) == [
        name for name in files_in(MODULE, lambda path: path.suffix != ".py") if name.startswith("Resources/")
    ]


def test_every_folder_of_data_is_packaged() -> None:
    text = (LIBRARY / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(r"foreach\(_folder IN ITEMS ([\w ]+)\)", text)
    assert found
    assert found[1].split() == sorted(
        path.name for path in (ROOT / "Resources").iterdir() if path.is_dir() and path.name not in OF_THE_README
    )
    assert files_in(ROOT / "Resources", lambda path: path.parent == ROOT / "Resources") == []


def test_the_packages_that_slicer_lacks_are_those_of_the_project_in_the_same_ranges() -> None:
    text = (MODULE / "Resources" / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    project = project_ranges()
    assert project.keys() >= OF_SLICER | OF_PYTORCH
    assert ranges(lines) == {name: r for name, r in project.items() if name not in OF_SLICER | OF_PYTORCH}
    assert lines == sorted(lines, key=str.lower)


def test_torch_is_asked_for_in_the_projects_range() -> None:
    text = (MODULE / "MedRationaleSlicer" / "installation.py").read_text(encoding="utf-8")
    assert re.findall(r'^TORCH = "(.*)"$', text, re.MULTILINE) == [project_ranges()["torch"]]


def test_the_version_is_that_of_the_newest_entry_among_the_changes() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d[\w.]*)", changes, re.MULTILINE)[0] == MedRationaleLib.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "MedRationaleLib.__version__" }' in project


def test_the_icon_is_a_square_picture_and_its_drawing_is_kept() -> None:
    content = ICON.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (128, 128)
    assert ElementTree.parse(ICON.with_suffix(".svg")).getroot().get("viewBox") == "0 0 128 128"


# What is installed


def cmake(*arguments: str | Path) -> str:
    child = subprocess.run(
        ["cmake", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    assert child.returncode == 0, child.stdout
    return child.stdout


def configure(source: Path, work: Path) -> dict[str, str]:
    """Configures the extension with a stand-in for Slicer's CMake; returns what it says of itself."""
    texts = {
        "SlicerConfig.cmake": SLICER_CONFIG,
        "use.cmake": USE_FILE,
        "describe.cmake": DESCRIBE,
        "nothing.cmake": "",
        "toolchain.cmake": TOOLCHAIN,
    }
    for name, text in texts.items():
        (work / name).write_text(text, encoding="utf-8")
    toolchain = work / "toolchain.cmake"
    said = cmake("-S", source, "-B", work / "build", f"-DSlicer_DIR={work}", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    return dict(re.findall(r"^-- EXTENSION_(\w+)=(.*)$", said, re.MULTILINE))


def needs_cmake() -> None:
    if not all(map(shutil.which, ("cmake", "make", "git"))):
        pytest.skip("cmake, make or git is not installed")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Slicer would find the modules of the installed extension."""
    needs_cmake()
    work = tmp_path_factory.mktemp("package")
    configure(ROOT, work)
    cmake("--build", work / "build")
    cmake("--install", work / "build", "--prefix", work / "installed", "--component", "Runtime")
    return work / "installed" / MODULES


def test_every_file_of_code_and_data_is_installed(installation: Path) -> None:
    library = {f"MedRationaleLib/{name}" for name in files_in(LIBRARY, lambda path: path.suffix == ".py")}
    data = {f"MedRationaleLib/_resources/{n}" for n in files_in(ROOT / "Resources", lambda path: True)}
    data = {name for name in data if name.split("/")[2] not in OF_THE_README}
    module = set(files_in(MODULE, lambda path: path.name != "CMakeLists.txt"))
    assert set(files_in(installation, lambda path: True)) == library | data | module


def test_data_is_beside_the_code_in_the_build_tree_too(installation: Path) -> None:
    built = installation.parents[3] / "build" / MODULES / "MedRationaleLib" / "_resources"
    assert files_in(built, lambda path: True) == files_in(
        installation / "MedRationaleLib" / "_resources", lambda path: True
    )


def test_the_installed_module_finds_its_library_its_data_every_model_and_its_worker(
    installation: Path, tmp_path: Path
) -> None:
    reason = probes.missing_for_slicer()
    if reason:
        pytest.skip(reason)
    shutil.copytree(installation, tmp_path / MODULES)
    modules = tmp_path / MODULES
    models = modules / "MedRationaleLib" / "_resources" / "Models"
    (models / "another").mkdir()
    shutil.copy(models / "compact" / "config.json", models / "another")
    child = subprocess.run(
        [sys.executable, "-c", IN_THE_INSTALLATION, str(modules), str(tmp_path)],
        cwd=tmp_path,
        env=probes.environment(PYTHONPATH=f"{modules}:{ROOT / 'Testing'}"),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["library"] == str(modules / "MedRationaleLib" / "__init__.py")
    assert found["resources"] == str(models) and found["requirements"]
    assert {"compact", "another"} <= set(found["models"])
    # `python -m MedRationaleLib.worker` takes the package from the folder in which it is started.
    assert found["started_in"] == [str(modules)]


@pytest.mark.parametrize(
    ("origin", "homepage"),
    [
        ("https://example.org/somebody/MedRationale.git", "https://example.org/somebody/MedRationale"),
        ("git@example.org:somebody/MedRationale.git", "https://example.org/somebody/MedRationale"),
        ("ssh://git@example.org:22/somebody/MedRationale", "https://example.org/somebody/MedRationale"),
        ("https://name:token@example.org/somebody/MedRationale/", "https://example.org/somebody/MedRationale"),
        ("/srv/git/MedRationale.git", ""),
    ],
)
def test_the_extension_links_to_where_it_was_cloned_from(tmp_path: Path, origin: str, homepage: str) -> None:
    needs_cmake()
    source = tmp_path / "source"
    for folder in ("MedRationale", "MedRationaleLib"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", source)
    pictures = source / "Resources" / PICTURES
    pictures.mkdir(parents=True)
    for name in ("panel.png", "evidence.png"):
        (pictures / name).touch()
    for command in (["init", "-q"], ["remote", "add", "origin", origin]):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    said = configure(source, tmp_path)
    assert said["HOMEPAGE"] == homepage and said["DEPENDS"] == "PyTorch"
    raw = f"{homepage}/raw/HEAD"
    shown = [f"{raw}/Resources/{PICTURES}/{name}" for name in ("evidence.png", "panel.png")]
    assert said["ICONURL"] == (f"{raw}/{ICON.relative_to(ROOT).as_posix()}" if homepage else "")
    assert said["SCREENSHOTURLS"].split() == (shown if homepage else [])
    assert "does not diagnose" in said["DESCRIPTION"]

"""What can be known of the Slicer module without running it: names that exist, imports that are light, widgets."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from slicer_harness import probes

if TYPE_CHECKING:
    from slicer_harness.application import Application

TESTING = Path(__file__).resolve().parent
ROOT = TESTING.parent
MODULE = ROOT / "MedRationale"
FILES = sorted(path for path in MODULE.rglob("*.py") if "__pycache__" not in path.parts)
PANEL = MODULE / "MedRationale.py"
UI = MODULE / "Resources" / "UI" / "MedRationale.ui"
OF_THE_APPLICATION = {"slicer", "vtk", "qt", "ctk"}
LIGHT = OF_THE_APPLICATION | {"SimpleITK", "numpy", "scipy", "MedRationaleSlicer"}
"""What may be imported when the module is loaded, beside the standard library."""
WORKED = ("Button", "Selector", "Box", "Slider", "Table", "Tree", "Bar")
"""Endings of the names of widgets that do something: one that no code knows of is dead."""
SECONDS = 0.3

LOAD = """
import json, sys, time
from pathlib import Path
from slicer_harness import application
application.bootstrap()
from slicer_harness import module_loader
blocked = json.loads(sys.argv[2])
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
known = set(sys.modules)
begin = time.process_time()
module_loader.load(Path(sys.argv[1]))
seconds = time.process_time() - begin
imported = sorted({name.partition(".")[0] for name in set(sys.modules) - known})
print(json.dumps({"seconds": seconds, "imported": imported}))
"""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, node: ast.AST, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {text}"


def dotted(node: ast.AST) -> str:
    """ "slicer.util.loadUI" of such an expression; "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imported(node: ast.AST) -> list[str]:
    """Names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


def when_loaded(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a file is imported: not those in functions, nor those for type checkers."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and dotted(statement.test).endswith("TYPE_CHECKING"):
            yield from when_loaded(statement.orelse)
            continue
        yield statement
        for name in ("body", "orelse", "finalbody"):
            yield from when_loaded(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from when_loaded(handler.body)


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Calls of a function by its plain name."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and dotted(node.func) == name:
                yield path, node


@cache
def widgets() -> dict[str, str]:
    """Name -> class of the widgets in the .ui file."""
    return {each.get("name", ""): each.get("class", "") for each in ElementTree.parse(UI).iter("widget")}


# Names


def test_every_name_taken_from_slicer_exists(slicer_app: Application) -> None:
    import slicer

    absent, seen = [], 0
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            names = []
            if isinstance(node, ast.Attribute):
                parts = dotted(node).split(".")
                if parts[:2] == ["slicer", "util"] and len(parts) == 3:
                    names = [(slicer.util, parts[2])]
                elif parts[0] == "slicer" and len(parts) in (2, 3) and parts[1].startswith("vtk"):
                    names = [(slicer, parts[1]), *((getattr(slicer, parts[1], None), p) for p in parts[2:])]
            elif isinstance(node, ast.ImportFrom) and node.module in ("slicer", "slicer.util"):
                names = [(slicer if node.module == "slicer" else slicer.util, alias.name) for alias in node.names]
            seen += len(names)
            absent += [where(path, node, name) for owner, name in names if not hasattr(owner, name)]
    assert absent == []
    assert seen > 20


def test_texts_to_translate_are_literals() -> None:
    found = [*calls("_"), *calls("tr"), *calls("translate")]
    assert len(found) > 20
    assert [
        where(path, call, ast.unparse(call))
        for path, call in found
        if not all(isinstance(each, ast.Constant) and isinstance(each.value, str) for each in call.args)
    ] == []


def test_translated_texts_are_filled_in_with_the_names_that_they_hold() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format"):
                continue
            text = node.func.value
            if not (isinstance(text, ast.Call) and dotted(text.func) == "_" and isinstance(text.args[0], ast.Constant)):
                continue
            given = {each.arg for each in node.keywords}
            if None in given:  # **mapping
                continue
            try:
                text.args[0].value.format(**dict.fromkeys(map(str, given), 0))
            except (KeyError, IndexError, ValueError) as error:
                wrong.append(where(path, node, repr(error)))
    assert wrong == []


def test_the_panel_relies_on_what_the_worker_is_bound_to_say() -> None:
    schema = json.loads((ROOT / "Resources" / "Schemas" / "worker_message.schema.json").read_text(encoding="utf-8"))
    bound = {each["properties"]["type"]["const"]: set(each.get("required", ())) for each in schema["oneOf"]}
    for node in tree_of(MODULE / "MedRationaleSlicer" / "worker.py").body:
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "KINDS":
            assert isinstance(node.value, ast.Dict)
            relied = {
                ast.literal_eval(key): value for key, value in zip(node.value.keys, node.value.values, strict=True)
            }
            assert relied.keys() == bound.keys()
            for kind, fields in relied.items():
                assert {ast.literal_eval(key) for key in fields.keys} <= bound[kind], kind
            return
    raise AssertionError("the panel's table of messages is not where it was")


# Imports


def test_loading_the_module_imports_nothing_that_has_to_be_installed_first() -> None:
    light = LIGHT | set(sys.stdlib_module_names)
    heavy, waiting, seen = [], list(FILES), set(FILES)
    while waiting:
        path = waiting.pop()
        for statement in when_loaded(tree_of(path).body):
            for name in imported(statement):
                if name.startswith("MedRationaleLib"):  # as light as what it imports itself
                    waiting += {source_of(name)} - seen
                    seen.add(source_of(name))
                elif name.partition(".")[0] not in light:
                    heavy.append(where(path, statement, name))
    assert heavy == []


def source_of(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_application_is_known_to_its_module_alone() -> None:
    others = [path for folder in ("MedRationaleLib", "Training") for path in (ROOT / folder).rglob("*.py")]
    assert len(others) > 40
    assert [
        where(path, node, name)
        for path in others
        for node in ast.walk(tree_of(path))
        for name in imported(node)
        if name.partition(".")[0] in OF_THE_APPLICATION
    ] == []


def test_the_module_does_not_import_the_trainer() -> None:
    names = {name.partition(".")[0] for path in FILES for node in ast.walk(tree_of(path)) for name in imported(node)}
    assert "MedRationaleLib" in names and "MedRationaleTraining" not in names


def load_in_a_child(blocked: list[str]) -> dict[str, object]:
    child = subprocess.run(
        [sys.executable, "-c", LOAD, str(PANEL), json.dumps(blocked)],
        cwd=TESTING,
        env=probes.environment(PYTHONPATH=str(TESTING)),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout.splitlines()[-1]))


@pytest.fixture
def needs_slicer() -> None:
    reason = probes.missing_for_slicer()
    if reason:
        pytest.skip(reason)


def test_the_module_loads_where_none_of_its_packages_is_installed(needs_slicer: None) -> None:
    absent = ["torch", "monai", "skimage", "PIL", "jsonschema", "yaml", "pydicom", "rich", "jinja2", "safetensors"]
    found = load_in_a_child([*absent, "segment_anything", "packaging", "pip"])
    assert "MedRationaleSlicer" in found["imported"]


def test_loading_the_module_takes_no_time_worth_mentioning(needs_slicer: None) -> None:
    """Beyond Slicer itself. The processor's time, so that whatever else runs here does not count; best of three."""
    times = [load_in_a_child([])["seconds"] for _ in range(3)]
    assert min(times) <= SECONDS, times


# Widgets


def test_every_widget_is_of_a_class_that_slicer_has(slicer_app: Application) -> None:
    import ctk
    import slicer
    from PySide6 import QtWidgets

    custom = {each.findtext("class") for each in ElementTree.parse(UI).iter("customwidget")}
    for name, cls in widgets().items():
        if cls in custom:
            assert hasattr(ctk, cls) or hasattr(slicer, cls), f"{name}: no stand-in for {cls}"
        else:
            assert hasattr(QtWidgets, cls), f"{name}: {cls} is neither Qt's nor among the custom widgets"
    assert custom <= set(widgets().values()), "custom widgets that are not used"


def test_every_name_is_given_once() -> None:
    names = [each.get("name") for each in ElementTree.parse(UI).iter("widget")]
    assert len(names) == len(set(names))


def test_every_widget_bound_to_a_parameter_names_one_that_there_is() -> None:
    fields = {
        each.target.id
        for node in ast.walk(tree_of(PANEL))
        if isinstance(node, ast.ClassDef) and node.name == "MedRationaleParameterNode"
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    bound = bound_to_parameters()
    assert len(bound) >= 5 and set(bound.values()) <= fields
    assert len(set(bound.values())) == len(bound), "a parameter has two widgets"


def bound_to_parameters() -> dict[str, str]:
    """Name of a widget -> the parameter that it shows."""
    return {
        widget.get("name", ""): value.findtext("string", "")
        for widget in ElementTree.parse(UI).iter("widget")
        for value in widget.findall("property")
        if value.get("name") == "SlicerParameterName"
    }


def in_code() -> dict[str, str]:
    """Names of widgets in the code -> where they stand: ui.NAME, self.ui.NAME, and "NAME" for getattr(self.ui, ...)."""
    found = {}
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            parts = dotted(node).split(".") if isinstance(node, ast.Attribute) else []
            if len(parts) >= 2 and parts[-2] == "ui" and parts[:-2] in ([], ["self"]):
                found[parts[-1]] = where(path, node, parts[-1])
            elif isinstance(node, ast.Constant) and node.value in widgets():
                found[node.value] = where(path, node, node.value)
    return found


def test_every_widget_that_the_code_names_is_in_the_panel() -> None:
    found = in_code()
    assert len(found) > 20
    assert [place for name, place in found.items() if name not in widgets()] == []


def test_every_widget_that_does_something_is_known_to_the_code() -> None:
    section = "CollapsibleButton"  # folds by itself
    known = set(in_code()) | set(bound_to_parameters())
    active = [name for name in widgets() if name.endswith(WORKED) and not name.endswith(section)]
    assert len(active) > 15
    assert [name for name in active if name not in known] == []


def test_every_selector_of_volumes_gets_the_scene() -> None:
    connections = {
        (each.findtext("signal"), each.findtext("receiver"), each.findtext("slot"))
        for each in ElementTree.parse(UI).iter("connection")
    }
    selectors = [name for name, cls in widgets().items() if cls == "qMRMLNodeComboBox"]
    assert selectors
    for name in selectors:
        assert ("mrmlSceneChanged(vtkMRMLScene*)", name, "setMRMLScene(vtkMRMLScene*)") in connections

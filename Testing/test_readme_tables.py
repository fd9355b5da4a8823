"""The README's tables of figures are those of the files beside them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")
if any(find_spec(name) is None for name in ("lightning", "monai", "jsonargparse")):
    pytest.skip("the train extra is not installed", allow_module_level=True)

from MedRationaleTraining.readme_tables import TABLES, filled, with_table  # noqa: E402

from MedRationaleLib.errors import InputError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def test_a_table_stands_between_its_marks() -> None:
    text = with_table("before\n<!-- this -->\nold\n<!-- /this -->\nafter\n", "this", "| new |\n")
    assert text == "before\n<!-- this -->\n| new |\n<!-- /this -->\nafter\n"
    assert with_table(text, "this", "| new |\n") == text
    with pytest.raises(InputError, match="<!-- this -->"):
        with_table("no marks", "this", "")


def test_the_readme_is_what_make_tables_writes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text, ROOT) == text, "run `make tables`"


@pytest.mark.parametrize("mark", list(TABLES))
def test_a_table_is_in_the_readme_where_its_figures_are_there_and_only_then(mark: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (f"<!-- {mark} -->" in text) == (ROOT / TABLES[mark][0]).exists()

"""The README's tables of figures, from the files that the commands write: `make tables`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import write_text
from MedRationaleTraining import ablation, benchmark

TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "ablation": ("Resources/Models/compact/metrics.json", ablation.table),
    "benchmark": ("Resources/Benchmarks/cpu.json", benchmark.table),
}
"""Mark, as in <!-- ablation --> and <!-- /ablation --> -> file of figures, and what makes Markdown of it."""


def with_table(text: str, mark: str, table: str) -> str:
    """The text with `table` between the two lines of `mark`."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise InputError(f"Expected the lines {begin.strip()} and {end}, found none; put them where the table goes.")
    return text[: found.start()] + begin + table + end + text[found.end() :]


def filled(text: str, root: Path) -> str:
    """The README's text with the table of every file of figures that is there."""
    for mark, (name, table) in TABLES.items():
        path = root / name
        if path.exists():
            text = with_table(text, mark, table(json.loads(path.read_text(encoding="utf-8"))))
    return text


if __name__ == "__main__":
    root = Path(sys.argv[1])
    readme = root / "README.md"
    write_text(readme, filled(readme.read_text(encoding="utf-8"), root))

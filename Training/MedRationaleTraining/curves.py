"""Training curves: CSV files to read, and TensorBoard to look at."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from MedRationaleLib.files import write_text

NAMES = ("train", "val", "kkt")


class Curves:
    """train.csv, val.csv and kkt.csv in `out`, and the same under tensorboard/."""

    def __init__(self, out: Path, step: int) -> None:
        """Forgets what an interrupted run logged after `step`, for it will be logged again."""
        self._out = out
        for name in NAMES:
            path = out / f"{name}.csv"
            if path.exists():
                head, *rows = path.read_text(encoding="utf-8").splitlines()
                kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= step]
                write_text(path, "\n".join([head, *kept]) + "\n")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def add(self, name: str, step: int, row: Mapping[str, float]) -> None:
        """One row of one of NAMES."""
        path = self._out / f"{name}.csv"
        head = path.read_text(encoding="utf-8").partition("\n")[0].split(",") if path.exists() else ["step"]
        if added := [key for key in row if key not in head]:  # a term that does not occur at every step
            earlier = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
            head += added
            write_text(path, "\n".join([",".join(head), *(line + "," * len(added) for line in earlier)]) + "\n")
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, head).writerow({"step": step} | {k: round(v, 5) for k, v in row.items()})
        for key, value in row.items():
            self._board.add_scalar(f"{name}/{key}", value, step)

    def close(self) -> None:
        """Write what is still buffered."""
        self._board.close()

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
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *row])
            writer.writerow([step, *(round(v, 5) for v in row.values())])
        for key, value in row.items():
            self._board.add_scalar(f"{name}/{key}", value, step)

    def close(self) -> None:
        """Write what is still buffered."""
        self._board.close()

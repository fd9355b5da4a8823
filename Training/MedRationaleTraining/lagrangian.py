"""Inequality constraints g <= 0 in a loss: Lagrange multipliers with dual ascent, or fixed penalties (paper, Eq. 4).

One class solves three problems that differ in what they add to the objective and in how a multiplier changes:

augmented   psi(g, m) = m g + rho g^2 / 2 where g > -m / rho, else -m^2 / (2 rho)     m <- clamp(m + rate g)
lagrangian  m g                                                                      m <- clamp(m + rate g)
penalty     weight max(g, 0)                                                         m is the weight, and stays

(Rockafellar's psi; Nocedal and Wright, Numerical Optimization, 17.4. With rate = rho the first is the method of
multipliers.) While the running mean of g is above 1, g counts as 1 at most in the dual step: heatmaps that are far off
at the start would else drive their multipliers to the cap before the weights have moved. After that it counts in full,
for g has a long tail (most examples hold, a few are far off), and multipliers that never see the tail come to rest
where its mean is still positive. With a `margin` all of this has g + margin for g, so that what scatters about its
bound from one set of examples to the next scatters within it; reports have g itself. A multiplier is at least 0 and at
most `cap`; one that rests at its cap says that the constraints conflict with one another or with the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from MedRationaleTraining.config import ConstraintConfig

RECENT = 0.1
"""Weight of the newest g in its running mean."""


@dataclass(frozen=True, kw_only=True)
class Kkt:
    """The Karush-Kuhn-Tucker conditions of one constraint, over the steps since the last report."""

    name: str
    multiplier: float
    """Dual feasible where it is at least 0, which clamping ensures."""
    value: float
    """Mean g: in units of the constraint's epsilon, feasible where it is at most 0."""
    steps: int
    """Steps in which the constraint occurred."""
    capped: bool
    """The multiplier rests at its cap: the constraints conflict."""

    @property
    def violation(self) -> float:
        """max(g, 0): primal feasibility."""
        return max(self.value, 0.0)

    @property
    def slackness(self) -> float:
        """m g, which is 0 at the optimum: a constraint that has room has no multiplier."""
        return self.multiplier * self.value


class Multipliers(nn.Module):
    """One multiplier for each named constraint; float32 buffers, so that they are in the checkpoint."""

    value: Tensor
    recent: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], config: ConstraintConfig) -> None:
        super().__init__()
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        self._config = config
        start = config.weight if config.solver == "penalty" else 0.0
        self.register_buffer("value", torch.full((len(self.names),), start))
        self.register_buffer("recent", torch.zeros(len(self.names)))
        self.register_buffer("total", torch.zeros(len(self.names)))
        self.register_buffer("count", torch.zeros(len(self.names)))

    def _of(self, constraints: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        where = torch.tensor([self._index[name] for name in constraints], dtype=torch.long, device=self.value.device)
        return where, torch.stack([g.float() for g in constraints.values()])

    def loss(self, constraints: Mapping[str, Tensor]) -> Tensor:
        """Name -> g, a scalar; what they add to the objective. Constraints that are not named do not occur."""
        if not constraints:
            return self.value.sum() * 0
        where, g = self._of(constraints)
        m, c = self.value[where], self._config
        g = g + c.margin
        if c.solver == "penalty":
            return (m * g.clamp(min=0)).sum()
        if c.solver == "lagrangian":
            return (m * g).sum()
        return torch.where(g > -m / c.rho, m * g + c.rho / 2 * g.square(), -m.square() / (2 * c.rho)).sum()

    @torch.no_grad()
    def ascend(self, constraints: Mapping[str, Tensor]) -> None:
        """The dual step, after the primal one; a g that is not finite is left out."""
        if not constraints:
            return
        where, g = self._of(constraints)
        finite = torch.isfinite(g)
        where, g = where[finite], g[finite]
        self.total[where] += g
        self.count[where] += 1
        g = g + self._config.margin
        recent = self.recent[where].lerp(g, RECENT)
        self.recent[where] = recent
        if self._config.solver != "penalty":
            counted = torch.where(recent > 1, g.clamp(max=1.0), g)
            self.value[where] = (self.value[where] + self._config.rate * counted).clamp(0.0, self._config.cap)

    def report(self, *, reset: bool = False) -> list[Kkt]:
        """Every constraint that occurred since the last reset."""
        rows = [
            Kkt(
                name=name,
                multiplier=float(self.value[i]),
                value=float(self.total[i] / self.count[i]),
                steps=int(self.count[i]),
                capped=self._config.solver != "penalty" and float(self.value[i]) >= self._config.cap,
            )
            for i, name in enumerate(self.names)
            if self.count[i] > 0
        ]
        if reset:
            self.total.zero_()
            self.count.zero_()
        return rows


def summary(rows: Sequence[Kkt]) -> dict[str, float]:
    """The worst of each condition, for the training curves."""
    return {
        "max_violation": max((r.violation for r in rows), default=0.0),
        "max_slackness": max((abs(r.slackness) for r in rows), default=0.0),
        "max_multiplier": max((r.multiplier for r in rows), default=0.0),
        "capped": float(sum(r.capped for r in rows)),
    }


def kkt_table(record: Mapping[str, Any]) -> Table:
    """kkt.json for the terminal: the constraint that is violated most on top."""
    table = Table(
        title=f"KKT conditions at step {record['step']}, means since the last report: "
        f"largest violation {record['max_violation']:.3f} epsilon, "
        f"largest |multiplier x g| {record['max_slackness']:.3f}, "
        f"stationarity {'-' if record['stationarity'] is None else format(record['stationarity'], '.2f')}"
    )
    table.add_column("constraint", overflow="fold")
    for name in ("g / epsilon", "multiplier", "slackness", "steps", ""):
        table.add_column(name, justify="right")
    for row in sorted(record["constraints"], key=lambda r: -r["value"]):
        figures = (f"{row[k]:.3f}" for k in ("value", "multiplier", "slackness"))
        verdict = "at its cap: conflict" if row["capped"] else "violated" if row["value"] > 0 else "held"
        name = row["name"].replace(".", " ")  # so that it breaks between words
        table.add_row(name, *figures, str(row["steps"]), verdict)
    return table


def as_record(row: Kkt) -> dict[str, Any]:
    """For JSON."""
    return asdict(row) | {"violation": row.violation, "slackness": row.slackness}

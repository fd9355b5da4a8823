"""The solver against problems whose optimum and multipliers are known, and against cooper."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from MedRationaleTraining.config import ConstraintConfig  # noqa: E402
from MedRationaleTraining.lagrangian import Multipliers, as_record, summary  # noqa: E402

Problem = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def corner(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """min |x|^2 with x1 + x2 >= 1 (active: x = (1/2, 1/2), m = 1) and x1 <= 3 (not active: m = 0)."""
    return x.square().sum(), {"sum": 1 - x.sum(), "room": x[0] - 3}


def solve(problem: Problem, config: ConstraintConfig, steps: int = 4000, lr: float = 0.02):
    x = torch.zeros(2, requires_grad=True)
    multipliers = Multipliers(["sum", "room"], config)
    for step in range(steps):
        f, g = problem(x)
        (gradient,) = torch.autograd.grad(f + multipliers.loss(g), x)
        with torch.no_grad():
            x -= lr * gradient
        multipliers.ascend({k: v.detach() for k, v in g.items()})
        if step == steps - 2:
            multipliers.report(reset=True)
    return x.detach(), multipliers


@pytest.mark.parametrize(("solver", "tolerance"), [("augmented", 1e-3), ("lagrangian", 1e-2)])
def test_the_optimum_and_the_multipliers_of_a_known_problem_are_found(solver, tolerance) -> None:
    x, multipliers = solve(corner, ConstraintConfig(solver=solver, rho=1.0, rate=0.02))
    assert torch.allclose(x, torch.tensor([0.5, 0.5]), atol=tolerance)
    assert multipliers.value.tolist() == pytest.approx([1.0, 0.0], abs=2 * tolerance)
    active, room = multipliers.report()
    assert active.violation < tolerance and abs(active.slackness) < tolerance
    assert room.multiplier == 0 and room.slackness == 0 and room.value == pytest.approx(-2.5, abs=0.01)


def test_a_fixed_penalty_stops_short_of_the_constraint_where_its_weight_is_too_small() -> None:
    x, multipliers = solve(corner, ConstraintConfig(solver="penalty", weight=0.4))
    assert torch.allclose(x, torch.tensor([0.2, 0.2]), atol=0.01)  # 2 x = weight
    assert multipliers.value.tolist() == pytest.approx([0.4, 0.4])
    assert multipliers.report()[0].violation == pytest.approx(0.6, abs=0.02)


def test_constraints_that_contradict_each_other_end_at_the_cap_and_say_so() -> None:
    def impossible(x):
        return x.square().sum(), {"sum": 1 - x[0], "room": x[0] + 1}

    _, multipliers = solve(impossible, ConstraintConfig(rho=0.5, rate=0.1, cap=5.0))
    rows = multipliers.report()
    assert all(row.capped and row.violation > 0 for row in rows)
    assert summary(rows)["capped"] == 2
    assert as_record(rows[0])["violation"] == rows[0].violation


@pytest.mark.parametrize("solver", ["augmented", "lagrangian"])
def test_cooper_walks_the_same_path(solver) -> None:
    cooper = pytest.importorskip("cooper")
    config = ConstraintConfig(solver=solver, rho=0.7, rate=0.03)
    steps, lr = 300, 0.05
    x, ours = solve(corner, config, steps, lr)

    class Oracle(cooper.ConstrainedMinimizationProblem):
        def __init__(self) -> None:
            super().__init__()
            multiplier = cooper.multipliers.DenseMultiplier(num_constraints=2)
            options = {}
            formulation = cooper.formulations.Lagrangian
            if solver == "augmented":
                formulation = cooper.formulations.AugmentedLagrangian
                options["penalty_coefficient"] = cooper.penalty_coefficients.DensePenaltyCoefficient(
                    init=torch.full((2,), config.rho)
                )
            self.both = cooper.Constraint(
                multiplier=multiplier,
                constraint_type=cooper.ConstraintType.INEQUALITY,
                formulation_type=formulation,
                **options,
            )

        def compute_cmp_state(self, at):
            f, g = corner(at)
            state = cooper.ConstraintState(violation=torch.stack(list(g.values())))
            return cooper.CMPState(loss=f, observed_constraints={self.both: state})

    theirs = torch.zeros(2, requires_grad=True)
    problem = Oracle()
    primal = torch.optim.SGD([theirs], lr=lr)
    dual = torch.optim.SGD(problem.dual_parameters(), lr=config.rate, maximize=True)
    optimizer = cooper.optim.SimultaneousOptimizer(cmp=problem, primal_optimizers=primal, dual_optimizers=dual)
    for _ in range(steps):
        optimizer.roll(compute_cmp_state_kwargs={"at": theirs})
    assert torch.allclose(x, theirs.detach(), atol=1e-5)
    assert torch.allclose(ours.value, problem.both.multiplier.weight.detach(), atol=1e-5)


def test_a_constraint_that_does_not_occur_keeps_its_multiplier_and_nan_is_left_out() -> None:
    multipliers = Multipliers(["a", "b"], ConstraintConfig(rate=0.5))
    multipliers.ascend({"b": torch.tensor(0.5)})
    assert multipliers.value.tolist() == [0.0, 0.25]
    multipliers.ascend({"a": torch.tensor(float("nan")), "b": torch.tensor(-0.25)})
    assert multipliers.value.tolist() == [0.0, 0.125]
    assert [(r.name, r.steps, r.value) for r in multipliers.report()] == [("b", 2, 0.125)]
    assert float(multipliers.loss({})) == 0


def test_what_is_far_off_moves_its_multiplier_no_faster_and_is_reported_as_it_is() -> None:
    multipliers = Multipliers(["a"], ConstraintConfig(rate=0.5))
    multipliers.ascend({"a": torch.tensor(60.0)})
    assert multipliers.value.tolist() == [0.5]
    assert multipliers.report()[0].violation == 60.0


def test_with_a_margin_a_constraint_is_held_within_its_bound_and_reported_as_it_is() -> None:
    x, multipliers = solve(corner, ConstraintConfig(rho=1.0, rate=0.02, margin=0.1))
    assert torch.allclose(x, torch.tensor([0.55, 0.55]), atol=1e-3)
    active, room = multipliers.report()
    assert active.value == pytest.approx(-0.1, abs=0.01) and active.violation == 0 and room.multiplier == 0


def test_a_constraint_that_most_examples_hold_and_a_few_are_far_off_rests_where_its_mean_is_zero() -> None:
    multipliers = Multipliers(["a"], ConstraintConfig(rate=0.1))
    multipliers.value += 5.0
    for _ in range(10):
        for g in [-0.5] * 9 + [4.5]:
            multipliers.ascend({"a": torch.tensor(g)})
    assert float(multipliers.value) == pytest.approx(5.0, abs=1e-4)


@pytest.mark.parametrize("solver", ["augmented", "lagrangian", "penalty"])
@pytest.mark.parametrize("at", [-0.9, -0.1, 0.3])
def test_the_gradient_of_each_form_is_its_finite_difference(solver, at) -> None:
    multipliers = Multipliers(["a"], ConstraintConfig(solver=solver, rho=0.8, weight=0.6)).double()
    multipliers.value += 0.3
    g = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    multipliers._of = lambda c: (torch.tensor([0]), torch.stack(list(c.values())))  # keep float64
    assert torch.autograd.gradcheck(lambda v: multipliers.loss({"a": v}), (g,))


def test_the_multipliers_are_in_the_checkpoint() -> None:
    config = ConstraintConfig()
    multipliers = Multipliers(["a", "b"], config)
    multipliers.ascend({"a": torch.tensor(1.0)})
    other = Multipliers(["a", "b"], config)
    other.load_state_dict(multipliers.state_dict())
    assert other.report() == multipliers.report()

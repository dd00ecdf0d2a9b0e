import math

import pytest
import torch
from torch.optim import SGD

from zsq.core import MultiStep, RecipeError, Run


def optimizer(lr: float = 1.0) -> SGD:
    return SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(schedule: MultiStep, steps: int) -> list[float]:
    """The learning rate of each step of a loop."""
    descent = optimizer()
    built, found = schedule.build(descent), []
    for _ in range(steps):
        found.append(descent.param_groups[0]["lr"])
        descent.step()
        built.step()
    return found


def test_the_rate_drops_at_the_steps_by_hand():
    # steps 0 and 1 at 1, step 2 at 1/2, from step 3 on 1/4
    assert rates(MultiStep(at=(2, 3), factor=0.5), 5) == [1.0, 1.0, 0.5, 0.25, 0.25]


def test_the_factor_is_a_tenth_unless_told():
    assert rates(MultiStep(at=(1,)), 2) == pytest.approx([1.0, 0.1])


def test_without_steps_the_rate_stays():
    assert rates(MultiStep(), 5) == [1.0] * 5
    assert rates(MultiStep(at=(2,), factor=1.0), 5) == [1.0] * 5


def test_a_schedule_goes_on_where_it_was(tmp_path):
    def loop(run: Run, steps: int) -> list[float]:
        descent = run.track("optimizer", optimizer())
        schedule, found = run.track("schedule", MultiStep(at=(2, 4), factor=0.5).build(descent)), []
        for _ in run.steps(steps, "distill"):
            found.append(descent.param_groups[0]["lr"])
            descent.step()
            schedule.step()
        return found

    assert loop(Run(tmp_path, device="cpu"), 3) == [1.0, 1.0, 0.5]
    assert loop(Run(tmp_path, device="cpu"), 6) == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("at", [(3, 2), (5, 1, 9), (0, 4), (-1,)])
def test_steps_out_of_order_are_refused(at):
    with pytest.raises(RecipeError, match=r"at must be ascending steps from 1 on, got \("):
        MultiStep(at=at)


@pytest.mark.parametrize("factor", [0.0, -0.1, 1.1, math.nan])
def test_a_factor_that_does_not_lower_is_refused(factor):
    with pytest.raises(RecipeError, match=rf"factor must lie in \(0, 1\], got {factor}"):
        MultiStep(factor=factor)

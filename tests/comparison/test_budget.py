"""Budgets of a comparison, and the number of steps that fit into seconds."""

import math

import pytest

from bpkd_sdk.comparison.setup import LOG_EVERY, Budget, step_times, time_per_step


def history(seconds, every=LOG_EVERY, evaluate_at=()):
    """Return records as training writes them, with the seconds of each interval of `every` steps."""
    records = []
    for number, spent in enumerate(seconds, 1):
        records.append({"step": number * every, "terms": {"ce": 1.0}, "seconds": spent})
        if number in evaluate_at:
            records.append({"step": number * every, "metrics": {}})
    return records


@pytest.mark.parametrize(
    ("steps", "seconds", "text"), [(300, None, "steps=300"), (None, 600, "seconds=600"), (None, 0.5, "seconds=0.5")]
)
def test_a_budget_is_steps_or_seconds(steps, seconds, text):
    budget = Budget.create(steps, seconds)
    assert (budget.unit, budget.amount) == (text.split("=")[0], steps or seconds)
    assert str(budget) == text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((None, None), "either `steps` or `seconds`, but got steps=None and seconds=None"),
        ((3, 5), "either `steps` or `seconds`, but got steps=3 and seconds=5"),
        *(((steps, None), f"`steps` to be a whole number of at least 1, but got {steps!r}") for steps in (0, -1, 1.5, True, "3")),
        *(((None, seconds), "`seconds` to be a number above 0, but got") for seconds in (0, -1, math.nan, math.inf, "9")),
    ],
)  # fmt: skip
def test_other_budgets_are_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        Budget.create(*arguments)


@pytest.mark.parametrize(("seconds", "ms", "steps"), [(60, 250, 240), (60, 249, 240), (1, 300, 3), (0.3, 300, 1)])
def test_steps_are_those_that_fit(seconds, ms, steps):
    assert Budget("seconds", seconds).steps(ms) == steps
    assert steps * ms <= 1000 * seconds < (steps + 1) * ms


def test_a_budget_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="One step takes 8 s, more than the budget of seconds=5"):
        Budget("seconds", 5).steps(8000)


def test_time_is_of_steps_alone_and_by_the_stretch():
    records = history([2.0, 1.0, 1.5], evaluate_at=(2, 3))
    assert step_times(records) == pytest.approx([400, 200, 300])


def test_a_trial_leaves_the_warm_up_out_and_takes_the_median():
    step_counts = []

    def train(steps):
        step_counts.append(steps)
        return history([9.0, 0.1, 0.1, 0.1, 5.0, 0.2])

    assert time_per_step(train, 10) == pytest.approx(20)
    assert step_counts == [30]


def test_a_trial_that_is_over_too_soon_is_repeated_with_more_steps():
    step_counts = []

    def train(steps):
        step_counts.append(steps)
        return history([0.05] * (steps // LOG_EVERY))

    assert time_per_step(train, 40) == pytest.approx(10)
    assert step_counts == [30, 120, 480]
    assert (480 - LOG_EVERY) * 10 >= 2000 > (120 - LOG_EVERY) * 10

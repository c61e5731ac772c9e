"""Budgets: their text, and the steps that fit into seconds."""

import pytest

from bpkd_sdk.comparison.run import LOG_EVERY, Budget, step_times, time_per_step


def history(seconds, every=LOG_EVERY, evaluate_at=()):
    """Records as training writes them: a stretch of `every` steps took so many seconds."""
    records = []
    for number, spent in enumerate(seconds, 1):
        records.append({"step": number * every, "terms": {"ce": 1.0}, "seconds": spent})
        if number in evaluate_at:
            records.append({"step": number * every, "metrics": {}})
    return records


@pytest.mark.parametrize(
    ("text", "unit", "amount"), [("steps=300", "steps", 300), ("seconds=600", "seconds", 600), ("seconds=0.5", "seconds", 0.5)]
)  # fmt: skip
def test_a_budget_reads_as_it_is_written(text, unit, amount):
    budget = Budget.parse(text)
    assert (budget.unit, budget.amount) == (unit, amount)
    assert str(budget) == text


@pytest.mark.parametrize(
    "text",
    ["steps=abc", "steps=1.5", "steps=0", "steps", "seconds=-1", "seconds=nan", "seconds=inf", "hours=2", "300", ""],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"`budget` to be like 'steps=300' or 'seconds=600', but got") as error:
        Budget.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(("seconds", "ms", "steps"), [(60, 250, 240), (60, 249, 240), (1, 300, 3), (0.3, 300, 1)])
def test_steps_are_those_that_fit(seconds, ms, steps):
    assert Budget("seconds", seconds).steps(ms) == steps
    assert steps * ms <= 1000 * seconds < (steps + 1) * ms


def test_a_budget_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="A step takes 8 s, so a budget of seconds=5 holds none"):
        Budget("seconds", 5).steps(8000)


def test_time_is_of_steps_alone_and_by_the_stretch():
    records = history([2.0, 1.0, 1.5], evaluate_at=(2, 3))
    assert step_times(records) == pytest.approx([400, 200, 300])


def test_a_trial_leaves_the_warm_up_out_and_takes_the_median():
    asked = []

    def train(steps):
        asked.append(steps)
        return history([9.0, 0.1, 0.1, 0.1, 5.0, 0.2])

    assert time_per_step(train, 10) == pytest.approx(20)
    assert asked == [30]


def test_a_trial_that_is_over_too_soon_is_repeated_with_more_steps():
    asked = []

    def train(steps):
        asked.append(steps)
        return history([0.05] * (steps // LOG_EVERY))

    assert time_per_step(train, 40) == pytest.approx(10)
    assert asked == [30, 120, 480]
    assert (480 - LOG_EVERY) * 10 >= 2000 > (120 - LOG_EVERY) * 10

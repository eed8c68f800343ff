"""Calling reward functions, checking what they return, weighing and adding."""

import asyncio
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import RewardError, RewardFunction, RowErrors, check_columns, score

PROMPTS = ["a", "b", "c"]
COMPLETIONS = ["x", "yy", "zzz"]


def giving(values):
    return lambda completions: values


def one(function, **options):
    return score([RewardFunction("mine", function)], PROMPTS, COMPLETIONS, **options)


def test_the_total_is_the_weighted_sum_and_none_adds_nothing():
    parts = [
        RewardFunction("first", giving([1.0, None, None])),
        RewardFunction("second", giving([2, 4, None]), weight=-0.5),
    ]
    result = score(parts, PROMPTS, COMPLETIONS)
    assert result.total.tolist() == [0.0, -2.0, 0.0]
    assert result.valid.tolist() == [True, True, False]
    np.testing.assert_array_equal(result.components["first"], np.array([1, np.nan, np.nan], np.float32))
    np.testing.assert_array_equal(result.components["second"], np.array([2, 4, np.nan], np.float32))
    assert result.errors == {"first": 0, "second": 0}
    assert (result.total.dtype, result.components["first"].dtype, result.valid.dtype) == (np.float32, np.float32, bool)


def test_a_component_of_weight_zero_is_a_metric_and_makes_no_row_valid():
    parts = [RewardFunction("main", giving([None, 1, 1])), RewardFunction("length", giving([5, 6, 7]), weight=0.0)]
    result = score(parts, PROMPTS, COMPLETIONS)
    assert result.components["length"].tolist() == [5, 6, 7]
    assert (result.total.tolist(), result.valid.tolist()) == ([0, 1, 1], [False, True, True])


@pytest.mark.parametrize("values", [np.array([True, False, True]), (1, np.float64(0), np.ones((1,))), iter([1, 0, 1])])
def test_bools_arrays_and_other_numbers_are_numbers(values):
    assert one(giving(values)).total.tolist() == [1.0, 0.0, 1.0]


def test_jax_arrays_are_numbers():
    import jax.numpy as jnp

    assert one(giving(jnp.array([1.0, 0.5, 0.0]))).total.tolist() == [1.0, 0.5, 0.0]


def test_a_function_gets_the_columns_that_it_names_or_all():
    seen = {}

    def named(completions, level, scale=2):
        seen["named"] = (completions, level, scale)
        return [0, 0, 0]

    def everything(prompts, **rest):
        seen["everything"] = (prompts, rest)
        return [0, 0, 0]

    def by_position(prompts, completions, /, answer):
        seen["by_position"] = (prompts, completions, answer)
        return [0, 0, 0]

    columns = {"level": [1, 2, 3], "answer": ["p", "q", "r"]}
    parts = [RewardFunction(f.__name__, f) for f in (named, everything, by_position)]
    score(parts, PROMPTS, COMPLETIONS, columns)
    assert seen["named"] == (COMPLETIONS, [1, 2, 3], 2)
    assert seen["everything"] == (PROMPTS, {"completions": COMPLETIONS, **columns})
    assert seen["by_position"] == (PROMPTS, COMPLETIONS, ["p", "q", "r"])


def test_a_function_cannot_change_the_columns_of_the_next_one():
    def spoil(completions, answer):
        answer.clear()
        return [0, 0, 0]

    parts = [RewardFunction("spoil", spoil), RewardFunction("read", lambda answer: [len(answer)] * 3)]
    assert score(parts, PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]}).total.tolist() == [3, 3, 3]


def test_columns_are_checked_without_a_call():
    called = []

    def mine(completions, solution, scale=1, **columns):
        called.append(completions)

    part = RewardFunction("mine", mine)
    check_columns([part], ["solution", "other"])
    with pytest.raises(ValueError, match=r"'mine' needs 'solution', but the data has answer, completions, prompts"):
        check_columns([part], ["answer"])
    assert not called


@pytest.mark.parametrize("on_error", ["stop", "invalid"])
def test_a_column_that_is_not_there_is_an_error_whatever_on_error_says(on_error):
    with pytest.raises(ValueError, match=r"'mine' needs 'solution', but the data has answer, completions, prompts"):
        one(lambda completions, solution: [0, 0, 0], columns={"answer": [1, 2, 3]}, on_error=on_error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39, "1.0", [1.0, 2.0], {}, object(), 1j])
def test_a_value_that_is_no_finite_number_names_function_and_row(bad):
    with pytest.raises(RewardError, match=r"'mine' returned .* at row 1; return None .* 'invalid'"):
        one(giving([1.0, bad, 0.0]))


def test_a_total_that_overflows_is_an_error_of_its_row():
    parts = [RewardFunction("mine", giving([1, 9e37, 2])), RewardFunction("other", giving([0, 9e37, 0]), weight=2.0)]
    with pytest.raises(RewardError, match=r"the weighted total of row 1 is 2\.7e\+38"):
        score(parts, PROMPTS, COMPLETIONS)
    result = score(parts, PROMPTS, COMPLETIONS, on_error="invalid")
    assert (result.total.tolist(), result.valid.tolist()) == ([1.0, 0.0, 2.0], [True, False, True])


def test_numbers_of_any_kind_of_array_are_numbers():
    assert one(lambda completions: jnp.array([1.0, 0.5, 2.0], jnp.bfloat16)).total.tolist() == [1.0, 0.5, 2.0]
    assert one(giving([np.float16(1), jnp.array([0.5]), np.bool_(True)])).total.tolist() == [1.0, 0.5, 1.0]


def test_a_value_that_cannot_be_read_is_an_error_of_its_row():
    class Held:
        def __array__(self, *args, **options):
            raise RuntimeError("detach me first")

    with pytest.raises(RewardError, match=r"'mine' returned .* at row 1"):
        one(giving([1.0, Held(), 0.0]))


@pytest.mark.parametrize("bad", [float("nan"), "1.0"])
def test_a_bad_value_makes_only_its_row_invalid_when_asked(bad):
    parts = [RewardFunction("good", giving([1, 1, 1])), RewardFunction("mine", giving([1.0, bad, None]))]
    result = score(parts, PROMPTS, COMPLETIONS, on_error="invalid")
    assert result.total.tolist() == [2.0, 0.0, 1.0]
    assert result.valid.tolist() == [True, False, True]
    assert np.isnan(result.components["mine"]).tolist() == [False, True, True]
    assert result.errors == {"good": 0, "mine": 1}


WHOLE_BATCH = [
    ([1.0, 0.0], "returned 2 rewards for 3 completions"),
    ([1.0] * 4, "returned 4 rewards for 3 completions"),
    (0.5, "returned float in place of a list of 3 numbers"),
    (None, "returned NoneType in place of a list"),
    ("abc", "returned str in place of a list"),
    (np.float32(1), "in place of a list"),
    ({"score": 1, "b": 2, "c": 3}, "returned dict in place of a list"),
]


@pytest.mark.parametrize(("values", "message"), WHOLE_BATCH)
def test_a_wrong_count_is_named_or_makes_every_row_invalid(values, message):
    with pytest.raises(RewardError, match=rf"'mine' .*{message}.*rows 0 to 2 \(the whole batch\)"):
        one(giving(values))
    result = one(giving(values), on_error="invalid")
    assert (result.valid.any(), result.total.tolist(), result.errors) == (False, [0, 0, 0], {"mine": 3})


def test_an_exception_is_named_and_kept_as_the_cause_or_makes_every_row_invalid():
    def fail(completions):
        raise KeyError("final")

    with pytest.raises(
        RewardError, match=r"'mine' raised KeyError: 'final', at rows 0 to 2 .*, in .*test_scoring.py:\d+"
    ) as caught:
        one(fail)
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, ValueError)
    result = one(fail, on_error="invalid")
    assert (result.valid.any(), result.errors) == (False, {"mine": 3})


def test_rows_that_failed_one_by_one_do_not_spoil_the_others():
    def by_row(completions):
        raise RowErrors([1.0, None, 0.5], {1: TimeoutError("too slow")})

    with pytest.raises(RewardError, match=r"'mine' raised TimeoutError: too slow, at row 1"):
        one(by_row)
    result = one(by_row, on_error="invalid")
    assert (result.total.tolist(), result.valid.tolist(), result.errors) == ([1, 0, 0.5], [1, 0, 1], {"mine": 1})


def test_an_interrupt_is_not_taken_for_a_failed_reward():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(interrupted, on_error="invalid")


def test_a_function_that_exits_has_failed_and_does_not_end_the_run():
    def leave(completions):
        sys.exit(3)

    async def leave_later(completions):
        sys.exit(3)

    async def leave_in_a_task_of_its_own(completions):
        return await asyncio.gather(leave_later(completions))

    for function in (leave, leave_later, leave_in_a_task_of_its_own):
        with pytest.raises(RewardError, match=r"'mine' raised SystemExit: 3, at rows 0 to 2"):
            one(function)
        parts = [RewardFunction("mine", function), RewardFunction("other", giving([1, 2, 3]))]
        result = score(parts, PROMPTS, COMPLETIONS, on_error="invalid")
        assert result.errors == {"mine": 3, "other": 0}
        assert not result.valid.any()


def test_a_coroutine_function_that_exits_leaves_the_others_their_scores():
    async def leave(completions):
        sys.exit(3)

    async def stay(completions):
        return [1, 2, 3]

    parts = [RewardFunction("mine", leave), RewardFunction("other", stay)]
    assert score(parts, PROMPTS, COMPLETIONS, on_error="invalid").components["other"].tolist() == [1, 2, 3]


def waiting_pair():
    """Two coroutine functions, each of which can only end while the other is running."""
    events: dict[str, asyncio.Event] = {}

    def meet(mine, other):
        async def reward(completions):
            events.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), timeout=10)
            return [1, 2, 3]

        return reward

    return [RewardFunction("left", meet("left", "right")), RewardFunction("right", meet("right", "left"))]


def test_coroutine_functions_run_concurrently():
    assert score(waiting_pair(), PROMPTS, COMPLETIONS).total.tolist() == [2, 4, 6]


def test_coroutine_functions_work_inside_a_running_loop():
    async def notebook():
        return score(waiting_pair(), PROMPTS, COMPLETIONS)

    assert asyncio.run(notebook()).total.tolist() == [2, 4, 6]


def test_what_a_coroutine_function_keeps_of_its_loop_serves_the_next_batch():
    free, beside = asyncio.Semaphore(1), []

    async def limited(completions):
        async def one_row(completion):
            async with free:  # bound to the loop in which it first has to wait
                await asyncio.sleep(0)
                return len(completion)

        if not beside:
            beside.append(asyncio.create_task(asyncio.sleep(0.05, "still there")))
        assert beside[0].get_loop() is asyncio.get_running_loop()
        return list(await asyncio.gather(*map(one_row, completions)))

    for _ in range(3):
        assert one(limited).total.tolist() == [1, 2, 3]


def test_a_function_that_is_awaited_may_score():
    async def inner(completions):
        return [1, 2, 3]

    async def outer(completions):
        return one(inner).total.tolist()

    assert one(outer).total.tolist() == [1, 2, 3]


def test_an_exception_in_a_coroutine_function_is_an_error_like_any_other():
    async def fail(completions):
        raise OSError("no answer")

    with pytest.raises(RewardError, match="'mine' raised OSError: no answer"):
        one(fail)
    assert one(fail, on_error="invalid").errors == {"mine": 3}


def test_no_rows_give_no_scores():
    result = score([RewardFunction("mine", lambda completions: [])], [], [])
    assert (result.total.shape, result.valid.shape) == ((0,), (0,))


OK = RewardFunction("ok", giving([0, 0, 0]))


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ([], {}, "one at least is needed"),
        ([OK, OK], {}, "distinct names"),
        ([OK._replace(weight=float("nan"))], {}, "weight of reward function 'ok' must be finite"),
        ([OK._replace(weight=0.0)], {}, "every reward function has weight 0"),
        ([OK._replace(function=3)], {}, "'ok' is not callable"),
        ([OK], {"on_error": "ignore"}, "on_error must be 'stop' or 'invalid', got 'ignore'"),
        ([OK], {"columns": {"answer": [1]}}, "column 'answer' must hold 3 values, .*got 1"),
        ([OK], {"completions": ["x"]}, "as many completions as prompts, got 1 and 3"),
    ],
)
def test_impossible_arguments_are_refused(functions, options, message):
    with pytest.raises(ValueError, match=message):
        score(functions, PROMPTS, **{"completions": COMPLETIONS, **options})

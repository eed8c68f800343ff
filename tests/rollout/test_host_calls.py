"""Calls that hang, raise, exit or block beside calls that do not."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from jaxrl_post.rollout import host_calls
from jaxrl_post.rollout.host_calls import Caller, Outcome, call


async def double(x):
    await asyncio.sleep(0)
    return 2 * x


def triple(x):
    return 3 * x


@pytest.fixture
def gate():
    """What hanging calls wait for; it opens after the test, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def test_plain_and_async_functions_give_their_values_in_order():
    calls = [(double, (number,)) if number % 2 else (triple, (number,)) for number in range(40)]
    caller = Caller(timeout=20, concurrency=7)
    assert [outcome.value for outcome in caller(calls)] == [2 * n if n % 2 else 3 * n for n in range(40)]
    assert caller([]) == []
    assert caller([(lambda: double(5), ())]) == [Outcome(10)]


def test_what_hangs_is_given_up_and_keeps_nobody_waiting(gate, monkeypatch):
    async def deaf():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    late = Outcome(error="timed out after 0.5 s", timed_out=True)
    caller = Caller(timeout=0.5)
    calls = [(gate.wait, (60,)), (asyncio.sleep, (60,)), (triple, (1,))]
    assert caller(calls) == [late, late, Outcome(3)]
    monkeypatch.setattr(host_calls, "GRACE", 0.2)
    assert caller([(deaf, ()), (triple, (1,))]) == [late, Outcome(3)]
    monkeypatch.undo()
    assert caller([(triple, (2,))]) == [Outcome(6)]


def test_a_coroutine_that_blocks_the_loop_costs_what_had_not_come_back_and_the_next_batch_nothing(gate, monkeypatch):
    monkeypatch.setattr(host_calls, "GRACE", 0.5)

    async def blocks():
        await asyncio.sleep(0.3)
        gate.wait(60)

    caller = Caller(timeout=0.6)
    found = caller([(blocks, ()), (double, (4,))])
    assert found[0].timed_out
    assert found[1] == Outcome(8)
    assert caller([(double, (5,))]) == [Outcome(10)]


def test_calls_that_block_the_loop_one_after_the_other_have_each_a_time_of_their_own(monkeypatch):
    monkeypatch.setattr(host_calls, "GRACE", 0.2)

    async def computes(x):
        time.sleep(0.1)  # as what an environment computes, without giving way
        return x

    found = Caller(timeout=0.3)([(computes, (x,)) for x in range(10)])  # a second in all
    assert [outcome.value for outcome in found] == list(range(10))


def test_what_had_not_begun_when_the_loop_was_blocked_is_made_in_another_and_once(gate, monkeypatch):
    monkeypatch.setattr(host_calls, "GRACE", 0.2)
    made = []

    async def blocks(x):
        made.append(x)
        gate.wait(60)

    async def notes(x):
        made.append(x)
        return x

    found = Caller(timeout=0.3)([(blocks, (0,)), (notes, (1,)), (blocks, (2,)), (notes, (3,))])
    assert [outcome.timed_out for outcome in found] == [True, False, True, False]
    assert [found[1].value, found[3].value] == [1, 3]
    gate.set()
    time.sleep(0.3)
    assert sorted(made) == [0, 1, 2, 3]


def test_an_error_that_cannot_be_told_has_its_name():
    class Odd(BaseException):
        def __str__(self):
            raise RuntimeError

    def fails():
        raise Odd

    assert Caller(timeout=5.0)([(fails, ()), (triple, (1,))]) == [Outcome(error="Odd"), Outcome(3)]


def test_an_argument_may_be_called_function():
    assert asyncio.run(call(lambda function: 2 * function, function=4)) == 8


def test_more_hanging_calls_than_may_run_at_a_time_do_not_take_the_time_of_the_others(gate):
    caller = Caller(timeout=0.4, concurrency=2)
    found = caller([(gate.wait, (60,))] * 3 + [(triple, (1,)), (double, (1,))])
    assert [outcome.timed_out for outcome in found] == [True, True, True, False, False]
    assert [outcome.value for outcome in found[3:]] == [3, 2]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad"), "ValueError: bad"),
        (SystemExit(3), "SystemExit: 3"),
        (TimeoutError(), "TimeoutError"),
        (StopIteration(), None),
        (asyncio.CancelledError(), "CancelledError"),
        (RuntimeError("x" * 1000), "RuntimeError: " + "x" * 186),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_raised_is_an_outcome_and_no_time_out(error, text, is_async):
    def plain():
        raise error

    async def coroutine():
        raise error

    caller = Caller(timeout=20)
    failed, sound = caller([(coroutine if is_async else plain, ()), (triple, (1,))])
    assert not failed.timed_out
    assert failed.error == text if text else "StopIteration" in failed.error
    assert sound == Outcome(3)


def test_calls_can_be_made_where_a_loop_runs_already_and_all_see_one_loop():
    async def which():
        return asyncio.get_running_loop()

    async def notebook():
        caller = Caller(timeout=20)
        first, second = caller([(which, ()), (which, ())])
        (third,) = caller([(which, ())])
        return first.value, second.value, third.value

    one = asyncio.run(notebook())
    assert one[0] is one[1] is one[2]
    # Another caller's too: what belongs to a loop, as a lock does, serves all rollouts of an environment.
    assert Caller(timeout=20)([(which, ())])[0].value is one[0]


def test_threads_of_calls_do_not_keep_the_process_from_its_end():
    code = (
        "import runpy, time\n"
        f"Caller = runpy.run_path({host_calls.__file__!r})['Caller']\n"
        "print(Caller(timeout=0.2)([(time.sleep, (600,))])[0].timed_out)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be positive and finite, in seconds, got 0"),
        ({"timeout": float("inf")}, "timeout must be positive and finite"),
        ({"timeout": 1, "concurrency": 0}, "concurrency must be at least 1 call at a time, got 0"),
    ],
)
def test_wrong_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Caller(**options)

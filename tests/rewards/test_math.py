"""The reward for mathematics, and the processes that compare for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrl_post.rewards import RewardFunction, gsm8k_answer, math_verify, math_verify_reward, score
from jaxrl_post.rewards import math as math_module
from jaxrl_post.rewards.workers import Workers

EQUAL = [  # right answer, completion
    (r"\frac{1}{2}", "0.5"),
    ("0.5", r"\boxed{\frac{1}{2}}"),
    ("1/2", r"So it is \boxed{\frac12}."),
    (r"$\dfrac{1}{2}$", r"The answer is $\frac{1}{2}$"),
    ("1234", "1,234"),
    ("1,234", r"\boxed{1234}"),
    (1234, "#### 1,234"),
    (0.5, "1/2"),
    ("2x+1", "1+2x"),
    ("(x-1)(x+1)", r"\boxed{x^2 - 1}"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"\{1, 2, 3\}", r"\boxed{\{3, 1, 2\}}"),
    ("[0, 1)", r"\boxed{[0,1)}"),
    ("1/3", r"\boxed{0.333333}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}"),
    ("5", r"\boxed{x = 5}"),
    ("-3", "\N{MINUS SIGN}3"),
    ("72", "She sold 48 and then 24.\nThe answer is 72."),
    ("2 + 70 = <<2+70=72>>72\n#### 72", "48 + 24 = 72\n#### 72 clips"),
    ("$10", r"\boxed{10 dollars}"),
    ("10 dollars", r"\boxed{10\text{ dollars}}"),
    (r"Since $x=2$, we get \boxed{4}.", "4"),
    ("4", r"First \boxed{3}, no: \boxed{4}"),
    ("4", r"\boxed{4} and then \boxed{5"),
    (r"\left\{ 1 \right\}", r"\boxed{\left\{ 1 \right\}}"),
    ("Monday", r"\boxed{\text{Monday}}"),
    ("7", "#### Step 1\nAdd 3 and 4. The answer is 7."),
]
UNEQUAL = [
    ("2x+1", "2x-1"),
    ("2x+1", r"\boxed{2y+1}"),
    ("1/3", "0.33"),
    ("[0, 1)", r"\boxed{[0,1]}"),
    (r"\{1, 2, 3\}", r"\boxed{\{1, 2\}}"),
    ("4", r"First \boxed{4}, no: \boxed{3}"),
    ("4", r"4, or rather \boxed{}"),
    ("1234", r"\boxed{1,235}"),
    ("72", "I cannot tell."),
    ("72", ""),
    ("72", "#### 7 and 2"),
    ("1", "1+2x"),
    ("10", r"\boxed{11 dollars}"),
    ("Monday", "Domany"),
]


@pytest.mark.parametrize(("pairs", "expected"), [(EQUAL, 1.0), (UNEQUAL, 0.0)], ids=["equal", "unequal"])
def test_answers_are_compared_as_mathematics(pairs, expected):
    answers, completions = zip(*pairs, strict=True)
    rewards = math_verify([""] * len(pairs), completions, answers)
    assert [pair for pair, reward in zip(pairs, rewards, strict=True) if reward != expected] == []


def test_a_right_answer_that_is_missing_or_cannot_be_parsed_gives_none():
    answers = [None, "", "?", "$%&", r"\frac{1", float("nan"), "(((", "5"]
    completions = ["1", "", r"\boxed{?}", "1", "2", "nan", r"\boxed{(((}", "5"]
    assert math_verify([""] * 8, completions, answers) == [None] * 7 + [1.0]


def test_what_needs_no_parser_is_decided_as_the_parser_would():
    numbers = ["0", "-0", "1", "+1", "01", "1.0", "-1", "0.5", ".5", "1/2", "2/4", "-1/2", r"\frac{1}{2}", r"\dfrac12"]
    numbers += [r"-\frac{1}{2}", "1,234", "1234", "1234.0", "$1234", r"\$1234", "1000000", "1,000,000"]
    texts = [*numbers, "x", "2x+1", "x^2-3x+1", "-a^{10}", "A", "B"]
    decided, pairs = [], []
    for gold in texts:
        for given in texts:
            pair = math_module._final_answer(gold), math_module._final_answer(rf"\boxed{{{given}}}")
            if (value := math_module._at_sight(*pair)) is not None:
                decided.append(value)
                pairs.append(pair)
    assert len(pairs) > len(numbers) * 10
    assert sum(decided) > len(texts)
    parsed = math_module._compared(math_module._pool(30.0, 1), pairs)
    assert [p for p, one, other in zip(pairs, decided, parsed, strict=True) if one != other] == []


def test_numbers_need_no_process(monkeypatch):
    monkeypatch.setattr(Workers, "map", None)
    texts = [r"\boxed{\frac{1}{2}}", "1,234", "#### $18", "x + 1", "3"]
    assert math_verify([""] * 5, texts, ["0.5", "1234", "9*2=18\n#### 18", "x+1", "4"]) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_the_last_box_that_is_closed_holds_the_answer():
    for text, inside in (
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{1 \boxed{2}}", "2"),
        (r"\boxed{\frac{1}{2}} {", r"\frac{1}{2}"),
        (r"\\boxed{3}} \fboxed {4\}}", r"4\}"),
        (r"} \boxed{5", None),
    ):
        assert math_module._last_box(text) == inside


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>5</answer>",
        "<think>3 or 4?</think><answer>\n5\n</answer>",
        "<ANSWER>x = 5</ANSWER>, as 7 > 3",
        "<answer>4</answer> No: <answer>The answer is 5</answer>",
        r"\boxed{4} <answer>5</answer>",
        r"<answer>4</answer> No: \boxed{5}",
        r"<answer>It is \boxed{5}, not 4</answer>",
        r"<answer>4</answer> In <answer> tags: \boxed{5}",
    ],
)
def test_an_answer_between_tags_is_the_answer(completion):
    assert math_verify([""] * 2, [completion] * 2, ["5", "4"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "endless", ["#" * 500_000, r"\boxed{" * 70_000, r"\boxed{1" + " " * 500_000 + "1}", "\\" * 500_000]
)
def test_an_endless_completion_is_read_through_once(endless):
    """Each takes below a second, and took more than ten minutes where its length counted squared."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it is read again and again"))
    signal.alarm(60)
    try:
        found = math_module._final_answer(endless)
        math_module._at_sight(found, found)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_reward_is_a_component_of_a_score():
    parts = [RewardFunction("math", math_verify)]
    result = score(parts, ["p"] * 3, ["2x", "2x", "2x"], {"answer": ["x+x", "x", "?"], "level": [1, 2, 3]})
    assert result.total.tolist() == [1.0, 0.0, 0.0]
    assert result.valid.tolist() == [True, True, False]


def test_a_gsm8k_answer_follows_the_last_mark():
    assert gsm8k_answer("a\n#### 1\nb\n####  -1,234,567 \nmore") == "-1234567"
    assert gsm8k_answer("#### $18.50") == "$18.50"
    assert [gsm8k_answer(text) for text in ("", "18", "### 18", "18 ####", "18\n#### \n")] == [None] * 5


def test_without_math_verify_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "jaxrl-post\[math\]"'):
        math_verify(["p"], ["1"], ["1"])


def test_the_module_does_not_import_math_verify():
    code = "import sys, jaxrl_post.rewards; sys.exit('math_verify' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_options_without_meaning_are_errors():
    for timeout in (0.0, float("inf")):
        with pytest.raises(ValueError, match="timeout must be positive and finite"):
            math_verify_reward(timeout=timeout)
    with pytest.raises(ValueError, match="processes must be at least 1"):
        math_verify_reward(processes=0)


ODD = """
import os, time
def equal(gold, gold_alone, given, given_alone):
    print("noise on standard output")
    if given == "sleep":
        time.sleep(100)
    if given == "spin":
        9 ** 9 ** 9  # one call into C, which no handler of a signal interrupts
    if given == "die":
        os._exit(3)
    if given == "memory":
        bytearray(2 ** 40)
    if given == "pid":
        return os.getpid()
    return given == "yes"
"""


@pytest.fixture
def odd(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    return file


def row(text):
    return ["", True, text, True]


def test_a_row_that_hangs_or_ends_its_process_gives_none_and_the_others_are_scored(odd, monkeypatch, caplog):
    monkeypatch.setattr(math_module, "_COMPARISON", odd)
    reward = math_verify_reward(timeout=1.25, processes=2)
    texts = ["yes", "sleep", "no", "spin", "yes", "die", "sleep", "no", "yes"]
    begin = time.monotonic()
    rewards = reward([""] * 9, [rf"\boxed{{{text}}}" for text in texts], ["x"] * 9)
    assert rewards == [1.0, None, 0.0, None, 1.0, None, None, 0.0, 1.0]
    assert time.monotonic() - begin < 30  # sleeping alone takes 100
    # A pair is compared once, however often it occurs.
    assert "of 5 comparisons" in caplog.text
    assert "1 died" in caplog.text
    assert "2 timed out" in caplog.text
    workers = math_module._pool(1.25, 2)
    assert workers.lost == {"timed out": 2, "died": 1}
    assert workers.map([row("yes")] * 5) == [True] * 5
    workers.close()


def test_a_process_is_kept_from_call_to_call_and_replaced_when_it_dies(odd):
    with Workers(odd, "equal", processes=1) as workers:
        pid = workers.map([row("pid")])
        assert workers.map([row("pid")]) == pid
        assert workers.map([row("die"), row("pid")])[0] is None
        assert workers.map([row("pid")]) not in (pid, [None])
        os.kill(workers.map([row("pid")])[0], signal.SIGKILL)  # while it has nothing to do
        time.sleep(0.2)
        assert workers.map([row("yes")]) == [True]
        assert workers.lost == {"died": 1}


def test_too_much_memory_is_refused_and_the_error_is_kept(odd):
    with Workers(odd, "equal", processes=1) as workers:
        assert workers.map([row("memory"), row("yes")]) == [None, True]
        assert workers.lost == {"failed": 1}
        assert workers.last_error == "MemoryError: "


def test_rows_are_split_over_processes(odd):
    with Workers(odd, "equal", timeout=30.0, processes=2) as workers:
        workers.map([row("yes")] * 4)
        deadline = time.monotonic() + 30
        pids = set()
        while len(pids) < 2 and time.monotonic() < deadline:
            pids |= set(workers.map([row("pid")] * 50))
        assert len(pids) == 2


def test_nothing_is_left_after_close(odd):
    workers = Workers(odd, "equal", timeout=1.0, processes=2)
    pids = set(workers.map([row("pid"), row("sleep"), row("pid"), row("die"), row("pid")])) - {None}
    pids |= {worker.process.pid for worker in workers._workers}
    workers.close()
    workers.close()
    for pid in pids:
        with pytest.raises(ChildProcessError):  # neither running nor a zombie
            os.waitpid(pid, os.WNOHANG)
    assert workers.map([row("yes")]) == [True]
    workers.close()


def test_an_interrupted_call_leaves_no_answers_to_the_next(odd, monkeypatch):
    with Workers(odd, "equal", timeout=30.0, processes=1) as workers:
        workers.map([row("yes")])
        with monkeypatch.context() as patch:

            def interrupt(*_):
                raise KeyboardInterrupt

            patch.setattr(workers, "_collect", interrupt)
            with pytest.raises(KeyboardInterrupt):
                workers.map([row("yes")])
        assert workers.map([row("no")]) == [False]


def test_threads_may_share_the_processes():
    results = {}

    def ask(number):
        results[number] = math_verify([""], [f"x+{number}"], [f"{number}+x"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {2: [1.0], 3: [1.0], 4: [1.0]}


def test_a_process_that_cannot_start_is_an_error_that_says_why(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import a_package_that_is_not_there\n")
    with (
        Workers(broken, "equal", processes=1) as workers,
        pytest.raises(RuntimeError, match=r"equal of .*broken.py could not start: ModuleNotFoundError: No module"),
    ):
        workers.map([row("yes")])


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"], ids=["exit", "killed"])
def test_processes_end_with_the_one_that_started_them(odd, tmp_path, end):
    # The script has no guard for __main__: it must run once, and not again in each process.
    script, module = tmp_path / "script.py", Path(math_module.__file__).with_name("workers.py")
    script.write_text(
        "import importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('workers', {str(module)!r})\n"
        "module = sys.modules['workers'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"workers = module.Workers({str(odd)!r}, 'equal', processes=1)\n"
        "print(workers.map([['', True, 'pid', True]])[0], flush=True)\n" + end
    )
    pids = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, timeout=60).stdout.split()
    assert len(pids) == 1
    deadline = time.monotonic() + 10
    while _alive(int(pids[0])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int(pids[0]))


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # an orphan may wait for an init that does not reap
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")

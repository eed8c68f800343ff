"""Problems, generators of verifiable tasks, and what is held out; files are read in `sources`.

A problem is a dict of columns. `prompt` is always there and is a string; `answer` usually is; `prompt_id` is the
problem's position in its source. A conversation has its messages in `prompt_messages`, and `prompt` shows them as text;
`chat` makes tokens of either. Every further column is kept, so that a reward function can ask for it by name.
Order, repetition and batches are the business of `stream`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeAlias

from jaxrl_post.data.templates import render

Problem: TypeAlias = dict[str, Any]
"""The columns of one problem: `prompt: str`, `prompt_id: int`, usually `answer: str`, and whatever rewards need."""


IDENTITY = "identity"
"""The column that tells problems apart whose prompts do not."""


class Source(Protocol):
    """A random-access sequence of problems; anything with a length and `source[i] -> Problem` will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...


class ReasoningGymSource:
    """Problems of a reasoning-gym task, generated when they are asked for.

    Problem `i` is drawn with the random state `seed + i`, so two sources whose seeds differ by less than `size` share
    problems: take seeds from `spaced_seed`. Even far seeds can draw the same problem, hence `held_out` and `exclude`.

    Columns: `prompt`, `prompt_id`, `answer`, and `entry`, the task's own record, which `score_answer` reads.

    Args:
        task: name of the task, e.g. `"spell_backward"`.
        seed: see above.
        size: number of problems.
        prompt: template over `question`, `answer` and the keys of the record's metadata (`{word}`, `{numbers}`, ...).
            Lists are joined by commas, or by the text after a colon: `{numbers: }` joins by spaces.
        answer: template of the answer, over the same keys.
        lowercase: lower-case prompt and answer, the scorer's own answer included.
        options: options of the task's generator.

    Raises:
        ImportError: if reasoning-gym is not installed.
        ValueError: for an unknown task, option or template key, naming those there are.

    Example:
        >>> source = ReasoningGymSource("spell_backward", seed=0, size=100, prompt="{word}>", lowercase=True)
        >>> problem = source[3]
        >>> word = problem["prompt"].removesuffix(">")
        >>> problem["answer"] == word[::-1], source.score_answer(word[::-1], problem["entry"])
        (True, 1.0)
    """

    def __init__(
        self,
        task: str,
        *,
        seed: int,
        size: int,
        prompt: str = "{question}",
        answer: str = "{answer}",
        lowercase: bool = False,
        options: Mapping[str, Any] | None = None,
    ):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.task = task
        self.columns: tuple[str, ...] = ("prompt", "prompt_id", "answer", "entry")
        self._size = size
        self._prompt = prompt
        self._answer = answer
        self._lowercase = lowercase
        self._dataset = _create_dataset(task, seed, size, dict(options or {}))
        self[0]  # a wrong template is an error now, not at the first batch

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        # The generators answer any index; only IndexError ends Python's iteration over a sequence.
        if not 0 <= index < self._size:
            raise IndexError(f"problem {index} of {self._size}")
        try:
            entry = self._dataset[index]
        except Exception as error:
            raise ValueError(
                f"task {self.task!r} could not generate problem {index}: {error}; change its options"
            ) from error
        keys = {**entry["metadata"], "question": entry["question"], "answer": entry["answer"]}
        try:
            prompt, answer = render(self._prompt, keys, "prompt"), render(self._answer, keys, "answer")
        except ValueError as error:
            raise ValueError(f"task {self.task!r}: {error}") from error
        if self._lowercase:
            prompt, answer = prompt.lower(), answer.lower()
        if self._lowercase and isinstance(entry["answer"], str):
            # A scorer that compares letters must not punish the case that we took away.
            entry = {**entry, "answer": entry["answer"].lower()}
        return {"prompt": prompt, "prompt_id": index, "answer": answer, "entry": entry}

    def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """The task's own score of an answer to a problem, usually in `[0, 1]`; many tasks give partial credit."""
        return self._dataset.score_answer(answer, entry)


def spaced_seed(seed: int, part: int, *, size: int, parts: int = 8) -> int:
    """A generator's seed whose problems overlap with those of no other seed and part.

    Generators that draw problem `i` with the state `s + i` give shifted copies of each other for neighbouring `s`.
    The seed is `(seed * parts + part) * size`: the ranges `[s, s + size)` of all seeds and parts are disjoint.

    Args:
        seed: seed of the run, at least 0.
        part: which use of the data, `0 .. parts - 1` (e.g. 0 training, 1 validation, 2 held-out).
        size: the largest number of problems that any part draws; the same in every call.
        parts: number of uses; the same in every call.

    Returns:
        The seed `s`.

    Raises:
        ValueError: for a negative seed, a part outside its range, or a size below 1.

    Example:
        >>> spaced_seed(0, 1, size=1000), spaced_seed(1, 0, size=1000)
        (1000, 8000)
    """
    if seed < 0 or size < 1 or not 0 <= part < parts:
        raise ValueError(f"need seed >= 0, size >= 1, 0 <= part < parts; got {seed=}, {size=}, {part=}, {parts=}")
    return (seed * parts + part) * size


def identity(problem: Problem) -> str:
    """What tells a problem from others: its prompt, unless it has a column `identity`.

    Example:
        >>> identity({"prompt": "Guess!", "identity": "secret 7"}), identity({"prompt": "1+1="})
        ('secret 7', '1+1=')
    """
    return problem.get(IDENTITY, problem["prompt"])


def held_out(
    source: Source,
    count: int,
    *,
    exclude: AbstractSet[str] = frozenset(),
    keep: Callable[[Problem], bool] | None = None,
) -> list[Problem]:
    """The first `count` problems of a source whose prompts (or what `identity` gives) are distinct and not excluded.

    Args:
        source: read in order from its first problem.
        count: number of problems, at least 1.
        exclude: prompts that must not be among them.
        keep: further condition on a problem, e.g. `prompt_fits(...)`.

    Returns:
        `count` problems.

    Raises:
        ValueError: if the source does not hold as many.

    Example:
        >>> problems = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
        >>> held_out(problems, 2, exclude={"b"})
        [{'prompt': 'a'}, {'prompt': 'c'}]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    found: dict[str, Problem] = {}
    for index in range(len(source)):
        problem = source[index]
        if identity(problem) not in exclude and (keep is None or keep(problem)):
            found.setdefault(identity(problem), problem)
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"{count} problems with distinct prompts were asked for, but among {len(source)} problems only {len(found)} "
        f"have prompts that differ, fit and are not excluded; ask for fewer or enlarge the source"
    )


def check_disjoint(prompts: Iterable[str], held_out: Iterable[str]) -> None:
    """Make sure that no prompt is both trained on and held out.

    Args:
        prompts: prompts of training problems.
        held_out: prompts of held-out problems.

    Raises:
        ValueError: names one shared prompt and how many there are.

    Example:
        >>> check_disjoint(["1+1=", "1+2="], ["2+2="])
    """
    shared = sorted(set(prompts) & set(held_out))
    if shared:
        raise ValueError(
            f"{len(shared)} held-out prompts are also trained on, e.g. {shared[0]!r}; pass the held-out prompts as "
            f"`exclude` to the training stream"
        )


def columns(problems: Sequence[Problem], *, repeat: int = 1) -> dict[str, list[Any]]:
    """The columns of a batch, as reward functions take them: one list per name, without `prompt`.

    Args:
        problems: `P` problems.
        repeat: how often each value occurs, the group size `G`; rows are prompt-major, as in `Rollouts`.

    Returns:
        For every column that any of the problems has, a list of `P * G` values, None where a problem lacks it.

    Raises:
        ValueError: if `repeat` is below 1.

    Example:
        >>> columns([{"prompt": "1+1=", "answer": "2"}, {"prompt": "hello"}], repeat=2)
        {'answer': ['2', '2', None, None]}
    """
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}")
    names = dict.fromkeys(key for problem in problems for key in problem if key != "prompt")
    return {name: [problem.get(name) for problem in problems for _ in range(repeat)] for name in names}


def _create_dataset(task: str, seed: int, size: int, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(f'task {task!r} needs reasoning-gym: pip install "jaxrl-post[tasks]"') from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(sorted(DATASETS))}"
        raise ValueError(f"reasoning-gym has no task {task!r}; {hint}")
    known = sorted(set(DATASETS[task][1].__dataclass_fields__) - {"seed", "size"})
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task {task!r} has no option {unknown[0]!r}; {hint}It has: {', '.join(known)}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **options)
    # The generators check their options with assert.
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"task {task!r} rejects its options {options}: {error}") from error

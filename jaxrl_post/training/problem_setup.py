"""The problems of a run: from a generator or from files, cut into parts that share none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_post import data, rewards
from jaxrl_post.training.config import Config, ConfigError
from jaxrl_post.training.environment_setup import HostTurns, TaskSource, Turns
from jaxrl_post.training.stages import make_method
from jaxrl_post.types import ANSWER_TOKENS

# Parts of the data that must not share problems: each draws from seeds of its own.
_TRAIN, _WARM_START, _VALIDATION, _HELD_OUT = range(4)
_HELD_OUT_SEED = 0  # the same problems whatever the run's seed, so that runs can be compared


class Problems(NamedTuple):
    """The problems of a run.

    Attributes:
        train: what the method trains on.
        warm_start: the worked examples of the supervised stage.
        validation: decides when the supervised stage is over.
        held_out: what accuracy is measured on.
        held_out_given: held-out problems with the completions that the method trains on, for its loss on them.
        exclude: prompts (what `data.identity` gives) that training must not see: of `validation` and what is held out.
    """

    train: data.Source
    warm_start: list[data.Problem]
    validation: list[data.Problem]
    held_out: list[data.Problem]
    held_out_given: list[data.Problem]
    exclude: frozenset[str]


def make_problems(config: Config, tokenizer: data.Tokenizer, turns: Turns | HostTurns | None = None) -> Problems:
    """Sources of the run's problems; held-out ones differ in content from all that training sees."""
    options = config.data
    fits = data.prompt_fits(tokenizer, options.max_prompt_length, on_long_prompt=options.on_long_prompt)

    def answer_fits(problem: data.Problem) -> bool:
        name = answer_column(train)
        return fits(problem) and completion_fits(tokenizer, problem, name, config.rollout.max_new_tokens)

    def spoken(source: Any) -> Any:
        return data.ChatSource(source, system=options.system) if options.chat else source

    def generated(seed: int, part: int) -> data.Source:
        first = data.spaced_seed(seed, part, size=options.size)
        if isinstance(turns, Turns):
            return TaskSource(turns.environment, tokenizer, first=first, size=options.size)
        assert options.task is not None
        try:
            source = data.ReasoningGymSource(
                options.task,
                seed=first,
                size=options.size,
                prompt=options.prompt or "{question}",
                answer=options.answer or "{answer}",
                lowercase=options.lowercase,
                options=options.task_options,
            )
        except ValueError as error:
            raise ConfigError([f"data.task = {options.task!r}: {error}"]) from None
        return spoken(source)

    def read(files: tuple[str, ...], *, kind: str, supervised: bool = False, split: str | None = None) -> data.Source:
        pairs = kind == "pairs"
        names = ("prompt", "answer", *(("chosen", "rejected") if pairs else ()))
        templates = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        columns = {name: text for name, text in options.columns.items() if pairs or name not in ("chosen", "rejected")}
        scored = kind == "rollouts"
        compared = scored and any(reward.name is not None and reads_answer(reward.name) for reward in config.rewards)
        need = {"chosen", "rejected"} if pairs else set()
        if compared or "answer" in templates or ANSWER_TOKENS in make_method(config).wants:
            need.add("answer")
        source = data.open_source(
            files,
            columns={**templates, **columns},
            kind=options.kind,
            require=sorted(need),
            split=split,
            lowercase=options.lowercase,
            on_bad_row=options.on_bad_row,
        )
        check_kind(source.row_type, options.kind)
        if supervised and answer_column(source) not in source.columns:
            key = "data.files" if files is options.files else "data.eval_files"
            raise ConfigError([f"{key}: rows have no {answer_column(source)!r} to train on; give data.answer"])
        return spoken(source)

    def some(source: data.Source, count: int, exclude: frozenset[str]) -> list[data.Problem]:
        return data.held_out(source, count, exclude=exclude, keep=fits) if count else []

    def as_many_as_fit(source: data.Source, keep: Callable[[data.Problem], bool]) -> list[data.Problem]:
        fitting = {data.identity(problem) for problem in map(source.__getitem__, range(len(source))) if keep(problem)}
        count = min(held_out_count, len(fitting))
        return data.held_out(source, count, keep=keep) if count else []

    def held_out_given(kind: str) -> list[data.Problem]:
        try:
            source = read(options.eval_files, kind=kind, supervised=kind == "completions")
        except ValueError:
            if config.rewards:
                return []  # these problems are for accuracy alone
            raise
        names, limit = given_columns(kind, source), config.rollout.max_new_tokens
        return as_many_as_fit(
            source, lambda problem: fits(problem) and all(completion_fits(tokenizer, problem, n, limit) for n in names)
        )

    warm = config.warm_start
    held_out_count = config.eval.problems
    with_given: list[data.Problem] = []
    if not options.files:
        held_out = some(generated(_HELD_OUT_SEED, _HELD_OUT), held_out_count, frozenset())
        train = generated(config.seed, _TRAIN)
        warm_source, validation_source = generated(config.seed, _WARM_START), generated(config.seed, _VALIDATION)
    else:
        kind = make_method(config).learns_from
        supervised = kind == "completions" or warm is not None
        train = warm_source = validation_source = read(
            options.files, kind=kind, supervised=supervised, split=options.split
        )
        held_out = []
        if options.eval_files and held_out_count:
            # Whatever is trained on, these are sampled for.
            held_out = as_many_as_fit(read(options.eval_files, kind="rollouts"), fits)
            with_given = [] if kind == "rollouts" else held_out_given(kind)
    exclude = frozenset(map(data.identity, (*held_out, *with_given)))
    wants_check = warm is not None and warm.until is not None
    validation = some(validation_source, warm.check_problems, exclude) if warm is not None and wants_check else []
    exclude |= set(map(data.identity, validation))
    examples = data.held_out(warm_source, warm.examples, exclude=exclude, keep=answer_fits) if warm is not None else []
    data.check_disjoint(map(data.identity, examples), exclude)
    return Problems(train, examples, validation, held_out, with_given, exclude)


def check_kind(found: data.RowType | None, given: str | None) -> None:
    """Raise ConfigError for rows whose labels no method learns from; nothing passes over them in silence.

    Args:
        found: what kind of rows the files hold.
        given: `data.kind`.
    """
    instead = {
        "unpaired": "kind: completion trains on every completion alike (sft), and kind: prompt samples new ones",
        "stepwise": "kind: prompt samples completions in the place of the given steps",
    }
    if found is not None and found.kind in instead:
        key = "data.kind" if given is None else f"data.kind = {given!r}"
        why = f"the rows are {found}, and no method learns from their labels yet"
        raise ConfigError([f"{key}: {why}; {instead[found.kind]}"])


def reads_answer(name: str) -> bool:
    """Whether a reward of this library compares completions with the right answer."""
    function = getattr(rewards, name, None)
    return function is not None and "answer" in inspect.signature(function).parameters


def answer_column(source: data.Source) -> str:
    """The column that supervised training learns from: `completion` where the data's layout has it, else `answer`."""
    row_type = getattr(source, "row_type", None)
    return "completion" if row_type is not None and row_type.kind in ("completion", "conversation") else "answer"


def given_columns(kind: str, source: data.Source) -> tuple[str, ...]:
    """The columns of the completions that a method of this kind trains on: none if it samples them.

    Args:
        kind: `Method.learns_from`.
        source: of the problems.
    """
    if kind == "pairs":
        return ("chosen", "rejected")
    return (answer_column(source),) if kind == "completions" else ()


def completion_fits(tokenizer: data.Tokenizer, problem: data.Problem, name: str, limit: int) -> bool:
    """Whether a given completion and its stop token are within the limit of new tokens."""
    return len(data.encode_completion(tokenizer, problem, name)) <= limit

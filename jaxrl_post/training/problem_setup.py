"""The problems of a run: from a generator or from files, cut into parts that share none."""

from __future__ import annotations

import inspect
import itertools
import re
import string
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jaxrl_post import data, rewards
from jaxrl_post.training.config import Config, ConfigError, DataConfig
from jaxrl_post.training.environment_setup import HostTurns, TaskSource, Turns
from jaxrl_post.training.stages import make_method
from jaxrl_post.types import ANSWER_TOKENS

# Parts of the data that must not share problems: each draws from seeds of its own.
_TRAIN, _WARM_START, _VALIDATION, _HELD_OUT = range(4)
_HELD_OUT_SEED = 0  # the same problems whatever the run's seed, so that runs can be compared


class TrainingError(ValueError):
    """The run cannot go on; the message says what was seen and what to try."""


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


def make_problems(
    config: Config, tokenizer: data.Tokenizer, turns: Turns | HostTurns | None = None, *, measured_only: bool = False
) -> Problems:
    """Sources of the run's problems; held-out ones differ in content from all that training sees.

    Args:
        config: of the run.
        tokenizer: its tokenizer.
        turns: its environment.
        measured_only: leave `data.files` alone, which may be gone: only what is held out can be relied on then, and
            where there are `data.eval_files`, nothing else is made.
    """
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
        check_kind(source.row_type, options.kind, make_method(config).wants)
        if supervised and answer_column(source) not in source.columns:
            raise ConfigError([f"data.files: rows have no {answer_column(source)!r} to train on; give data.answer"])
        return spoken(source)

    def some(source: data.Source, count: int, exclude: frozenset[str]) -> list[data.Problem]:
        return data.held_out(source, count, exclude=exclude, keep=fits) if count else []

    def held_out_given(kind: str, plain: Any) -> list[data.Problem]:
        names = given_columns(kind, train)
        absent = [name for name in names if not made_of(name, options) <= set(plain.columns)]
        if absent and not config.rewards:
            why = f"rows have no {absent[0]!r} for the method's loss, and no rewards score what is sampled for them"
            raise ConfigError([f"data.eval_files: {why}; give one or the other"])
        if absent or not names:
            return []  # these problems are for accuracy alone
        source = read(options.eval_files, kind=kind)
        keep = given_fits(config, tokenizer, names, fits, f"data.eval_files: {config.method.name}")
        found = [*itertools.islice(filter(keep, map(source.__getitem__, range(len(source)))), held_out_count)]
        if not found and not config.rewards:
            limits = "data.max_prompt_length and rollout.max_new_tokens"
            raise ConfigError([f"data.eval_files: no row is within {limits}; raise them or give shorter ones"])
        return found

    alone = measured_only and bool(options.eval_files)
    warm = None if alone else config.warm_start
    held_out_count = config.eval.problems
    with_given: list[data.Problem] = []
    if not options.files:
        held_out = some(generated(_HELD_OUT_SEED, _HELD_OUT), held_out_count, frozenset())
        train = generated(config.seed, _TRAIN)
        warm_source, validation_source = generated(config.seed, _WARM_START), generated(config.seed, _VALIDATION)
    else:
        kind = make_method(config).learns_from
        supervised = kind == "completions" or warm is not None
        if alone:
            train = read(options.eval_files, kind="rollouts")
        else:
            train = read(options.files, kind=kind, supervised=supervised, split=options.split)
        warm_source = validation_source = train
        held_out = []
        if options.eval_files and held_out_count:
            source = read(options.eval_files, kind="rollouts")  # whatever is trained on, these are sampled for
            fitting = {data.identity(p) for p in (source[i] for i in range(len(source))) if fits(p)}
            if not fitting and config.rewards:
                limit = f"data.max_prompt_length = {options.max_prompt_length} tokens"
                raise ConfigError([f"data.eval_files: no prompt is within {limit}; raise it or give shorter ones"])
            held_out = some(source, min(held_out_count, len(fitting)), frozenset())
            with_given = held_out_given(kind, source)
    exclude = frozenset(map(data.identity, (*held_out, *with_given)))
    wants_check = warm is not None and warm.until is not None
    validation = some(validation_source, warm.check_problems, exclude) if warm is not None and wants_check else []
    exclude |= set(map(data.identity, validation))
    examples = data.held_out(warm_source, warm.examples, exclude=exclude, keep=answer_fits) if warm is not None else []
    data.check_disjoint(map(data.identity, examples), exclude)
    return Problems(train, examples, validation, held_out, with_given, exclude)


def check_kind(found: data.RowType | None, given: str | None, wants: Collection[str] = ()) -> None:
    """Raise ConfigError for rows whose labels the method does not learn from; nothing passes over them in silence.

    Args:
        found: what kind of rows the files hold.
        given: `data.kind`.
        wants: the columns that the method reads.
    """
    instead = {
        "unpaired": "method: {name: kto} does; kind: completion trains on every completion alike (sft), and kind: "
        "prompt samples new ones",
        "stepwise": "kind: prompt samples completions in the place of the given steps",
    }
    if found is not None and found.kind in instead and not (found.kind == "unpaired" and "label" in wants):
        key = "data.kind" if given is None else f"data.kind = {given!r}"
        why = f"the rows are {found}, and the method does not learn from their labels"
        raise ConfigError([f"{key}: {why}; {instead[found.kind]}"])


def reads_answer(name: str) -> bool:
    """Whether a reward of this library compares completions with the right answer."""
    function = getattr(rewards, name, None)
    return function is not None and "answer" in inspect.signature(function).parameters


_WITH_COMPLETION = ("completion", "conversation", "unpaired")


def answer_column(source: data.Source) -> str:
    """The column that supervised training learns from: `completion` where the data's layout has it, else `answer`."""
    row_type = getattr(source, "row_type", None)
    return "completion" if row_type is not None and row_type.kind in _WITH_COMPLETION else "answer"


def given_columns(kind: str, source: data.Source) -> tuple[str, ...]:
    """The columns of the completions that a method of this kind trains on: none if it samples them.

    Args:
        kind: `Method.learns_from`.
        source: of the problems.
    """
    if kind == "pairs":
        return ("chosen", "rejected")
    return (answer_column(source),) if kind == "completions" else ()


def made_of(name: str, options: DataConfig) -> set[str]:
    """The columns of a file's rows that a problem's column is made of: those that its template names, or itself.

    Example:
        >>> sorted(made_of("chosen", DataConfig(max_prompt_length=8, chosen="{good.text}{end}")))
        ['end', 'good']
        >>> made_of("chosen", DataConfig(max_prompt_length=8))
        {'chosen'}
    """
    template = options.columns.get(name) or getattr(options, name, None)
    if template is None:
        return {name}
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    return {re.split(r"[.\[]", field)[0] for field in fields}


def given_fits(
    config: Config,
    tokenizer: data.Tokenizer,
    names: tuple[str, ...],
    prompt_fits: Callable[[data.Problem], bool],
    where: str,
) -> Callable[[data.Problem], bool]:
    """Whether a problem's prompt, and the completions that are trained on, are within the limits.

    Args:
        config: of the run.
        tokenizer: of the run.
        names: columns of the completions.
        prompt_fits: whether its prompt is.
        where: what trains on them, for the errors.

    Returns:
        The condition. It raises TrainingError where a completion is missing, and under `data.on_long_prompt: error`
        where one is too long.
    """
    limit = config.rollout.max_new_tokens

    def fits(problem: data.Problem) -> bool:
        for name in names:
            if not isinstance(problem.get(name), str):
                raise TrainingError(
                    f"{where} trains on given completions, but a problem has no {name!r}: "
                    f"{problem['prompt'][:80]!r}; set data.{name} to a template over its columns"
                )
        long = [name for name in names if not completion_fits(tokenizer, problem, name, limit)]
        if long and config.data.on_long_prompt == "error":
            raise TrainingError(
                f"{where}: the {long[0]} {problem[long[0]][:80]!r} and its stop token are more than "
                f"rollout.max_new_tokens = {limit}; raise the limit, or set data.on_long_prompt to filter to skip "
                "such problems"
            )
        return prompt_fits(problem) and not long

    return fits


def completion_fits(tokenizer: data.Tokenizer, problem: data.Problem, name: str, limit: int) -> bool:
    """Whether a given completion and its stop token are within the limit of new tokens."""
    return len(data.encode_completion(tokenizer, problem, name)) <= limit

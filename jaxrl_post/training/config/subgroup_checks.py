"""What must hold where the members of a group are sampled in different ways: under token budgets, or by early exits."""

from __future__ import annotations

import string

from jaxrl_post.rollout import BUDGET, EXIT
from jaxrl_post.training.config.content_checks import refuse_unused
from jaxrl_post.training.config.errors import Problems
from jaxrl_post.training.config.methods_check import tokenizer_of
from jaxrl_post.training.config.schema import Config, ExitsConfig
from jaxrl_post.types import Method


def check_subgroups(config: Config, made: Method, problems: Problems) -> None:
    """`rollout.budgets` and `rollout.exits`: sizes, texts, and that a method which reads them has them."""
    rollout, name = config.rollout, config.method.name
    if rollout is None or not problems.ok("rollout"):
        return
    if rollout.budgets is None:
        refuse_unused(rollout, "rollout", ("budget_prompt",), "rollout.budgets is not given", problems)
    else:
        _budgets(config, problems)
    if rollout.exits is not None:
        _exits(config, rollout.exits, problems)
    if BUDGET in made.wants and rollout.budgets is None:
        why = "rewards completions by the budget that they were asked to keep to; give e.g. [512, 1024, 2048, 2560]"
        problems.add("rollout.budgets", f"method {name} {why}", None)
    if EXIT in made.wants and rollout.exits is None:
        why = "compares answers from early exits of one thought; give e.g. {count: 7}"
        problems.add("rollout.exits", f"method {name} {why}", None)


def _budgets(config: Config, problems: Problems) -> None:
    rollout, budgets = config.rollout, config.rollout.budgets
    if isinstance(budgets, tuple):
        if not budgets:
            problems.add("rollout.budgets", "must hold at least one budget; leave it out for none", [])
            return
        for index, budget in enumerate(budgets):
            if budget is not None and budget < 1:
                problems.add(f"rollout.budgets.{index}", "must be at least 1 token, or null for no budget", budget)
        if rollout.group_size % len(budgets):
            problems.add(
                "rollout.group_size",
                f"must be a multiple of the {len(budgets)} budgets of rollout.budgets, which get equal shares of it; "
                f"try {-(-rollout.group_size // len(budgets)) * len(budgets)}",
                rollout.group_size,
            )
        share = config.training is not None and config.training.share_prompts
        if share and len(set(budgets)) > 1:
            problems.add(
                "training.share_prompts",
                "the completions of a prompt under different budgets (rollout.budgets) have different prompts, which "
                "cannot be run once for all; set it to false, or give one budget",
                share,
            )
    if rollout.exits is not None:
        problems.add(
            "rollout.exits",
            "makes one trajectory of a prompt a group, rollout.budgets several prompts of a problem; give one of them",
        )
    _sentence(config, problems)


def _sentence(config: Config, problems: Problems) -> None:
    text, key = config.rollout.budget_prompt, "rollout.budget_prompt"
    try:
        columns = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        problems.add(key, f"is not a template: {error}; write a brace itself as {{{{ or }}}}", text)
        return
    if columns != {"budget"}:
        problems.add(key, "must name {budget}, and nothing else, where the number of tokens goes", text)
        return
    budgets = config.rollout.budgets
    numbers = [b for b in budgets if b is not None] if isinstance(budgets, tuple) else [1234567890]
    for number in numbers:
        _encodes(config, text.format(budget=number), key, problems)


def _exits(config: Config, exits: ExitsConfig, problems: Problems) -> None:
    size = config.rollout.group_size
    if size != exits.count + 1:
        problems.add(
            "rollout.group_size",
            f"must be rollout.exits.count + 1 = {exits.count + 1}: the exits of a trajectory, and itself",
            size,
        )
    refuse_unused(config.rollout, "rollout", ("stop",), "rollout.exits leaves thoughts at tokens", problems)
    for name, text in (("text", exits.text), ("end", exits.end)):
        key = f"rollout.exits.{name}"
        if text == "":
            other = "; null: all of the completion is thought" if name == "end" else ""
            problems.add(key, f"must hold at least one token{other}", text)
        elif text is not None:
            _encodes(config, text, key, problems)


def _encodes(config: Config, text: str, key: str, problems: Problems) -> None:
    """A problem if the tokenizer does not know a character of the text."""
    if config.data is None or not problems.ok(key, "data.tokenizer", "data.alphabet"):
        return
    try:
        tokenizer_of(config.data).encode(text)
    except (ValueError, OSError) as error:
        problems.add(key, str(error))

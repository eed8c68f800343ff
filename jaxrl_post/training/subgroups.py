"""How the members of a group differ: under which token budgets they are sampled, or from which exits of one thought.

From the configuration to the prompts' texts, and to what is measured of the parts; checks are in `config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_post import data, rewards
from jaxrl_post.rollout import BUDGET, EXIT, Exits
from jaxrl_post.training.config import BudgetScheduleConfig, Config
from jaxrl_post.types import Rollouts


class Budgets(NamedTuple):
    """The budgets of a group, in equal shares, and how its prompts speak of them.

    Attributes:
        given: a budget in tokens (None: none) for each sub-group, or a schedule of one for all.
        sentence: template over `budget` that follows a prompt.
    """

    given: tuple[int | None, ...] | BudgetScheduleConfig
    sentence: str

    @property
    def parts(self) -> int:
        """Number of sub-groups."""
        return len(self.given) if isinstance(self.given, tuple) else 1

    def at(self, step: int) -> tuple[int | None, ...]:
        """The budget of each sub-group at a step of the stage.

        Example:
            >>> Budgets(BudgetScheduleConfig(start=256, decay=0.7, every=150), "{budget}").at(300)
            (125,)
        """
        if isinstance(self.given, tuple):
            return self.given
        schedule = self.given
        budget = rewards.budget_schedule(step, start=schedule.start, decay=schedule.decay, every=schedule.every)
        return (int(float(budget) + 1e-3),)  # a whole number of tokens, whatever the last bits of the power

    def prompt(self, prompt: str, budget: int | None) -> str:
        """A prompt under a budget.

        Example:
            >>> Budgets((8, None), " Use {budget} tokens.").prompt("2 + 2 = ?", 8)
            '2 + 2 = ? Use 8 tokens.'
        """
        return prompt if budget is None else prompt + self.sentence.format(budget=budget)

    def within(self, steps: int) -> list[int | None]:
        """All budgets of a stage of so many steps, each once."""
        starts = [0] if isinstance(self.given, tuple) else range(0, steps, self.given.every)
        return list(dict.fromkeys(budget for step in starts for budget in self.at(step)))


def make_budgets(config: Config) -> Budgets | None:
    """What `rollout.budgets` says; None without."""
    given = config.rollout.budgets
    return None if given is None else Budgets(given, config.rollout.budget_prompt)


def make_exits(config: Config, tokenizer: data.Tokenizer) -> Exits | None:
    """What `rollout.exits` says; None without."""
    given = config.rollout.exits
    if given is None:
        return None
    return Exits(
        count=given.count,
        text=tuple(map(int, tokenizer.encode(given.text))),
        end=() if given.end is None else tuple(map(int, tokenizer.encode(given.end))),
        max_new_tokens=given.max_new_tokens or config.rollout.max_new_tokens,
        whole=given.whole,
    )


def with_budgets(rollouts: Rollouts, budgets: tuple[int | None, ...]) -> Rollouts:
    """Rollouts with `extras["budget"]`, for budgets that share the groups evenly.

    Args:
        rollouts: `[P, G]`.
        budgets: tokens, None for none; their number divides `G`.
    """
    row = np.repeat([float(budget or 0) for budget in budgets], rollouts.group_size // len(budgets))
    every = jnp.broadcast_to(jnp.asarray(row, jnp.float32), rollouts.reward.shape)
    return rollouts.replace(extras={**rollouts.extras, BUDGET: every})


def subgroup_metrics(arrays: Mapping[str, np.ndarray], correct_at: float) -> dict[str, float]:
    """How long thoughts are, and how the sub-groups do.

    Args:
        arrays: `length` `[P, G]`, tokens sampled; `reward` and `valid` `[P, G]`; `exit` and `budget` where there are.
        correct_at: a completion with at least this total reward is correct.

    Returns:
        With exits `exits/thought_length` (tokens) and `exits/full_accuracy`, that of whole trajectories; with budgets
        `budgets/<tokens or none>/mean_length` and `.../accuracy`.
    """
    metrics = {}

    def accuracy(chosen: np.ndarray) -> dict[str, float]:
        known = arrays["valid"] & chosen
        return {"accuracy": float((arrays["reward"][known] >= correct_at).mean())} if known.any() else {}

    if EXIT in arrays:
        metrics["exits/thought_length"] = float(arrays[EXIT][:, -1].mean())
        whole = np.zeros(arrays["valid"].shape, bool)
        whole[:, -1] = True
        metrics |= {f"exits/full_{name}": value for name, value in accuracy(whole).items()}
    if BUDGET in arrays:
        for budget in np.unique(arrays[BUDGET]):
            chosen = arrays[BUDGET] == budget
            found = {"mean_length": float(arrays["length"][chosen].mean()), **accuracy(chosen)}
            metrics |= {f"budgets/{int(budget) or 'none'}/{name}": value for name, value in found.items()}
    return metrics

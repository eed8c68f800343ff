"""Between texts and rollouts: prompts are encoded, completions sampled, decoded and scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import data, rewards
from jaxrl_post.rollout import BUDGET, EXIT, Exits, Prompts, SamplingParams
from jaxrl_post.training.setup import Setup
from jaxrl_post.training.subgroups import Budgets, sample_groups, subgroup_metrics, with_budgets
from jaxrl_post.types import FINISH_LENGTH, Array, Params, Policy, Rollouts


class Sampled(NamedTuple):
    """Rollouts with their texts, and what the rewards said of them.

    Attributes:
        rollouts: on the device, rewards and validity filled in.
        completions: `B` texts.
        scored: by the reward functions; None where there are none.
    """

    rollouts: Rollouts
    completions: list[str]
    scored: rewards.Scored | None


@functools.lru_cache(maxsize=32)
def compiled_generate(
    policy: Policy,
    sampling: SamplingParams,
    max_new_tokens: int,
    group_size: int,
    parts: int = 1,
    exits: Exits | None = None,
) -> Callable[..., Rollouts]:
    """`sample_groups`, jitted; samplers of the same kind share it, so that training and evaluation compile once."""
    limits = {"max_new_tokens": max_new_tokens, "group_size": group_size, "parts": parts}
    return jax.jit(functools.partial(sample_groups, policy, sampling=sampling, exits=exits, **limits))


class Sampler:
    """Samples completions of problems and scores them, in batches of fixed shape.

    Args:
        setup: the run's parts.
        sampling: how tokens are drawn; the tokenizer's end-of-sequence ids are added to its stop tokens.
        group_size: completions per prompt.
        max_new_tokens: longest completion.
        prompts: prompts of one compiled call; a longer list is sampled in several calls.
        prompt_length: longest prompt, tokens.
        rewarded: score the completions with the run's reward functions.
        budgets: what the members of a group are asked to keep to; None for nothing.
        exits: makes groups serial; None for completions that are sampled separately.
    """

    def __init__(
        self,
        setup: Setup,
        sampling: SamplingParams,
        *,
        group_size: int,
        max_new_tokens: int,
        prompts: int,
        prompt_length: int,
        rewarded: bool = True,
        budgets: Budgets | None = None,
        exits: Exits | None = None,
    ):
        self._setup = setup
        self._group_size = group_size
        self._prompts = prompts
        self._prompt_length = prompt_length
        self._rewarded = rewarded
        self._budgets = budgets
        stops = setup.stop_tokens + sampling.stop_tokens
        self._generate = compiled_generate(
            setup.policy,
            sampling._replace(stop_tokens=stops),
            max_new_tokens,
            group_size,
            1 if budgets is None else budgets.parts,
            exits,
        )

    def __call__(
        self,
        params: Params,
        problems: Sequence[data.Problem],
        key: Array,
        *,
        first_id: int = 0,
        version: int = 0,
    ) -> Sampled:
        """Sample and score `group_size` completions of each problem.

        Args:
            params: the policy's parameters.
            problems: `P` problems.
            key: of the random streams.
            first_id: id of the first sequence; the others follow.
            version: the policy's version, recorded with every token; scheduled budgets are those of this step.
        """
        tokenizer = self._setup.tokenizer
        budgets = (None,) if self._budgets is None else self._budgets.at(version)
        asked = [self._asked(problem, budget) for problem in problems for budget in budgets]
        encoded = [data.encode_prompt(tokenizer, problem) for problem in asked]
        each = self._group_size // len(budgets)  # completions of one text
        pieces = []
        for start in range(0, len(problems), self._prompts):
            some = problems[start : start + self._prompts]
            rows = len(some)
            chunk = encoded[start * len(budgets) : (start + rows) * len(budgets)]
            chunk = chunk + chunk[:1] * (self._prompts * len(budgets) - len(chunk))  # filled up to the compiled shape
            tokens, length = data.pad_prompts(chunk, self._prompt_length)
            ids = first_id + start * self._group_size + np.arange(len(chunk) * each, dtype=np.uint64)
            prompt_ids = [problem.get("prompt_id", -1) for problem in some for _ in budgets]
            prompts = Prompts(
                tokens=jnp.asarray(tokens),
                length=jnp.asarray(length),
                prompt_id=jnp.asarray(prompt_ids + [-1] * (len(chunk) - len(prompt_ids)), jnp.int32),
                id=jnp.asarray((ids % 2**32).astype(np.uint32).reshape(len(chunk), each)),
            )
            with jax.set_mesh(self._setup.mesh):
                piece = self._generate(params, prompts, key, version=version)
            pieces.append(piece if rows == self._prompts else _first_prompts(piece, rows))
        rollouts = pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
        if self._budgets is not None:
            rollouts = with_budgets(rollouts, budgets)
        completions = self._decode(rollouts, [len(prompt) for prompt in encoded for _ in range(each)])
        if not self._rewarded:
            return Sampled(rollouts, completions, None)
        scored = rewards.score(
            self._setup.reward_functions,
            [problem["prompt"] for problem in asked for _ in range(each)],
            completions,
            data.columns(problems, repeat=self._group_size),
            on_error=self._setup.config.on_reward_error,
        )
        shape = (len(problems), self._group_size)
        rollouts = rollouts.replace(
            reward=jnp.asarray(scored.total.reshape(shape)),
            rewards={name: jnp.asarray(values.reshape(shape)) for name, values in scored.components.items()},
            valid=jnp.asarray(scored.valid.reshape(shape)),
        )
        return Sampled(rollouts, completions, scored)

    def _asked(self, problem: data.Problem, budget: int | None) -> data.Problem:
        return problem if self._budgets is None else data.extend_prompt(problem, self._budgets.prompt("", budget))

    def _decode(self, rollouts: Rollouts, prompt_lengths: list[int]) -> list[str]:
        tokens, lengths = jax.device_get((rollouts.tokens, rollouts.length))
        texts = []
        for row, (start, length) in enumerate(zip(prompt_lengths, lengths.reshape(-1), strict=True)):
            texts.append(self._setup.tokenizer.decode(tokens[row, start:length].tolist()))
        return texts


def _first_prompts(rollouts: Rollouts, count: int) -> Rollouts:
    prompts, group = rollouts.num_prompts, rollouts.group_size
    return jax.tree.map(lambda x: x[: count if x.shape[0] == prompts else count * group], rollouts)


def sampled_metrics(sampled: Sampled, correct_at: float) -> dict[str, float]:
    """What a batch of rollouts says about the policy, before anything is filtered.

    Args:
        sampled: rollouts and their scores.
        correct_at: a completion with at least this total reward is correct.

    Returns:
        `reward` (mean over scored completions), `reward_std` (mean over groups of the unbiased standard deviation),
        `frac_reward_zero_std` (groups whose rewards are all equal), `accuracy`, `rewards/<name>/mean|std`,
        `rewards/unscored` (fraction), `completions/*` (tokens; `clipped_ratio` is the fraction cut at the limit),
        `entropy` (nats per token, of the tempered distribution), and those of `subgroup_metrics`.
    """
    rollouts = sampled.rollouts
    arrays = jax.device_get(
        {
            "mask": rollouts.mask,
            "entropy": rollouts.extras["entropy"],
            "finish": rollouts.finish,
            "reward": rollouts.reward,
            "valid": rollouts.valid,
            **{name: rollouts.extras[name] for name in (BUDGET, EXIT) if name in rollouts.extras},
        }
    )
    lengths = arrays["mask"].sum(axis=1)
    ended = arrays["finish"].reshape(-1) != FINISH_LENGTH
    metrics = {
        "entropy": float(arrays["entropy"].sum() / max(arrays["mask"].sum(), 1.0)),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1.0 - ended.mean()),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    if sampled.scored is None:
        return metrics
    metrics |= subgroup_metrics({**arrays, "length": lengths.reshape(arrays["reward"].shape)}, correct_at)
    reward, valid = arrays["reward"].astype(np.float64), arrays["valid"]
    counts = valid.sum(axis=1)
    metrics["rewards/unscored"] = float(1.0 - valid.mean())
    if not valid.any():
        return metrics
    metrics["reward"] = float(reward[valid].mean())
    metrics["accuracy"] = float((reward[valid] >= correct_at).mean())
    groups = [row[keep] for row, keep in zip(reward, valid, strict=True) if keep.sum() > 1]
    if groups and counts.max() > 1:
        stds = np.array([group.std(ddof=1) for group in groups])
        metrics["reward_std"] = float(stds.mean())
        metrics["frac_reward_zero_std"] = float((stds < 1e-6).mean())
    for name, values in sampled.scored.components.items():
        known = values[~np.isnan(values)].astype(np.float64)
        if known.size:
            metrics[f"rewards/{name}/mean"] = float(known.mean())
            metrics[f"rewards/{name}/std"] = float(known.std(ddof=1)) if known.size > 1 else 0.0
    for name, errors in sampled.scored.errors.items():
        if errors:
            metrics[f"rewards/{name}/errors"] = float(errors)
    return metrics

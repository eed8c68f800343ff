"""Measurements on held-out problems: greedy and sampled accuracy, pass@k, lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxrl_post import data
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.training.sampler import Sampled, Sampler, sampled_metrics
from jaxrl_post.training.setup import Setup
from jaxrl_post.types import Params


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    r"""Unbiased estimate of the probability that at least one of k samples is correct.

    $$1 - \binom{n-c}{k} / \binom{n}{k}$$

    Args:
        correct: `[P]` int, number of correct samples `c` of each problem.
        samples: `n`.
        k: at most `n`.

    Returns:
        `[P]` float64.

    Raises:
        ValueError: if k is not in `[1, n]`.

    Example:
        >>> pass_at_k(np.array([0, 1, 4]), samples=4, k=2).tolist()
        [0.0, 0.5, 1.0]

    Reference:
        Evaluating Large Language Models Trained on Code, arXiv 2107.03374.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the number of samples {samples}, got {k}")
    wrong = samples - np.asarray(correct, np.float64)
    drawn = np.arange(k)
    none_right = np.prod(np.clip(wrong[:, None] - drawn, 0, None) / (samples - drawn), axis=1)
    return 1.0 - none_right


class Evaluator:
    """Accuracy of a policy on fixed problems, at fixed seeds: the same parameters always give the same numbers.

    Args:
        setup: the run's parts.
    """

    def __init__(self, setup: Setup):
        config = setup.config
        self._setup = setup
        rows = max(1, config.rollout.prompts * config.curriculum.oversample * config.rollout.group_size)
        self._samples = config.eval.samples
        sampler = functools.partial(Sampler, setup, prompt_length=config.data.max_prompt_length)
        count = max(1, len(setup.problems.held_out))
        how = setup.generation(SamplingParams(greedy=True))
        most = max(count, len(setup.problems.validation))
        self._greedy = sampler(how, name="evaluate/greedy", prompts=min(rows, most))
        how = setup.generation(setup.sampling(), self._samples)
        self._sampled = sampler(how, name="evaluate/sampled", prompts=min(max(1, rows // self._samples), count))

    def greedy_accuracy(self, params: Params, problems: Sequence[data.Problem]) -> float:
        """Fraction of problems whose greedy completion is correct; one that could not be scored is not."""
        return float(self._correct(self._greedy(params, problems, self._key())).mean())

    def __call__(self, params: Params) -> dict[str, float]:
        """`eval/accuracy` (greedy), `eval/sampled_accuracy`, `eval/pass@k`, `eval/completions/*`; empty if nothing is
        held out.
        """
        problems = self._setup.problems.held_out
        if not problems or not self._setup.reward_functions:
            return {}
        config = self._setup.config
        greedy = self._greedy(params, problems, self._key())
        sampled = self._sampled(params, problems, self._key())
        correct = self._correct(sampled).reshape(len(problems), self._samples)
        every = sampled_metrics(greedy, config.eval.correct_at)
        return {
            "eval/accuracy": float(self._correct(greedy).mean()),
            "eval/sampled_accuracy": float(correct.mean()),
            f"eval/pass@{config.eval.k}": float(pass_at_k(correct.sum(axis=1), self._samples, config.eval.k).mean()),
            "eval/problems": float(len(problems)),
            **{f"eval/{name}": every[name] for name in every if name.startswith("completions/")},
        }

    def _key(self) -> jax.Array:
        return jax.random.key(0)

    def _correct(self, sampled: Sampled) -> np.ndarray:
        assert sampled.scored is not None
        return sampled.scored.valid & (sampled.scored.total >= self._setup.config.eval.correct_at)

"""Early exits: answers from several points of one thought, whose tokens are sampled once.

A group is then serial: its members share the beginning of one trajectory, each is told at another place of it to stop
thinking, and the last one is the trajectory itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post import masked, models
from jaxrl_post.rollout.drawing import own_of_sequences
from jaxrl_post.rollout.generate import PLAIN, Prompts, SamplingParams, generate
from jaxrl_post.rollout.groups import EXIT, join_columns, merge_groups
from jaxrl_post.types import FINISH_STOP, Array, Params, Policy, Rollouts, typed_key

_CUTS = 0x65786974  # parts the draws of the cuts from those of tokens, which have the same ids


class Exits(NamedTuple):
    """How a thought is left early.

    Attributes:
        count: `m`, exits of a thought; the group has one member more.
        text: token ids that end the thought at an exit, at least one.
        end: token ids that end a thought by itself, e.g. those of `</think>`; empty: all of the completion is thought.
        max_new_tokens: longest answer after an exit.
        whole: a member's mask covers the thought up to its exit and `text` too, so that exits are learned; False: only
            its answer, so that every sampled token is trained once.
    """

    count: int
    text: tuple[int, ...]
    end: tuple[int, ...]
    max_new_tokens: int
    whole: bool = True

    def most_chosen(self, max_new_tokens: int) -> int:
        """The most tokens in a member's mask, where trajectories have at most `max_new_tokens`."""
        answer = self.max_new_tokens
        return max_new_tokens + len(self.text) + answer if self.whole else max(max_new_tokens, answer)


def thought_length(
    rollouts: Rollouts, end: tuple[int, ...] = (), stop_sequences: tuple[tuple[int, ...], ...] = ()
) -> Array:
    """Tokens of each thought: what stands before `end` in a completion, or all but what stopped it.

    Args:
        rollouts: as sampled: the mask covers the completion.
        end: token ids that end a thought; the first time counts.
        stop_sequences: those of its sampling; a completion that stopped at none of them did so at a token.

    Returns:
        `[P, G]` int32; 0 where there is no thought.

    Example:
        >>> from jaxrl_post.data import to_rollouts
        >>> rows = to_rollouts([[2], [2]], [[[5, 6, 9, 8]], [[5, 6]]], length=5)
        >>> thought_length(rows, end=(9,)).tolist(), thought_length(rows).tolist()
        ([[2], [2]], [[4], [2]])
    """
    tokens, sampled = rollouts.tokens, rollouts.mask > 0
    count = jnp.sum(sampled, axis=1, dtype=jnp.int32)
    stopped = rollouts.finish.reshape(-1) == FINISH_STOP
    length = rollouts.length.reshape(-1)

    def begins(text: tuple[int, ...]) -> Array:
        here = sampled
        for offset, token in enumerate(text):
            behind = jnp.pad(tokens, ((0, 0), (0, offset)), constant_values=-1)[:, offset:]
            inside = jnp.pad(sampled, ((0, 0), (0, offset)))[:, offset:]
            here &= inside & (behind == token)
        return here

    stop = jnp.ones_like(count)
    for text in stop_sequences:
        place = jnp.maximum(length - len(text), 0)[:, None]
        found = jnp.take_along_axis(begins(text), place, axis=1)[:, 0] & (len(text) <= count)
        stop = jnp.where(found, jnp.maximum(stop, len(text)), stop)
    whole = count - jnp.where(stopped, stop, 0)
    if end:
        here = begins(end)
        first = jnp.argmax(here, axis=1).astype(jnp.int32) - (length - count)
        whole = jnp.where(jnp.any(here, axis=1), first, whole)
    return whole.reshape(rollouts.reward.shape)


def draw_exits(key: Array, ids: Array, thought: Array, *, count: int) -> Array:
    r"""Places to leave thoughts at: `count` draws of $\mathrm{Uniform}\{1, \ldots, n\}$ in order.

    Args:
        key: typed or raw.
        ids: `[P]` uint32, of the trajectories; with the key they determine the draws.
        thought: `[P]` int32, $n$, tokens of each thought.
        count: exits of a thought.

    Returns:
        `[P, count]` int32, tokens of the thought before the exit, ascending; a place may come twice. All 0 where there
        is no thought.

    Raises:
        ValueError: if `count` is below 1 or the shapes differ.

    Example:
        >>> draw_exits(jax.random.key(0), jnp.arange(2), jnp.array([1, 0]), count=3).tolist()
        [[1, 1, 1], [0, 0, 0]]

    Reference: S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models (arXiv 2505.07686).
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 exit, got {count}")
    masked.check_axes("thought", thought, "[P]")
    masked.check_like("ids", ids, "thought", thought)
    key = jax.random.fold_in(typed_key(key), _CUTS)
    uniform = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number), (count,)))(ids)
    drawn = 1 + jnp.floor(uniform * thought[:, None]).astype(jnp.int32)
    return jnp.sort(jnp.minimum(drawn, thought[:, None]), axis=1)


def exit_prompts(rollouts: Rollouts, cuts: Array, text: tuple[int, ...]) -> tuple[Array, Array]:
    """Prompts that end at the cuts of a trajectory, with the text that ends the thought behind them.

    Args:
        rollouts: trajectories `[P, 1]` as sampled.
        cuts: `[P, m]` int32, sampled tokens before the cut; one beyond the trajectory's end counts as its end.
        text: token ids, at least one.

    Returns:
        Tokens `[P * m, T + len(text)]` int32 and lengths `[P * m]` int32, prompt-major.

    Raises:
        ValueError: if the groups are not of one, `cuts` is not `[P, m]`, or `text` is empty.

    Example:
        >>> from jaxrl_post.data import to_rollouts
        >>> tokens, length = exit_prompts(to_rollouts([[2]], [[[5, 6, 7]]], length=4), jnp.array([[1, 3]]), (9,))
        >>> tokens.tolist(), length.tolist()
        ([[2, 5, 9, 0, 0], [2, 5, 6, 7, 9]], [3, 5])
    """
    if rollouts.group_size != 1:
        raise ValueError(f"rollouts must be one trajectory per prompt, got groups of {rollouts.group_size}")
    if not text:
        raise ValueError("text must hold at least one token; without it nothing tells the policy to stop thinking")
    masked.check_axes("cuts", cuts, "[P, m]")
    if cuts.shape[0] != rollouts.num_prompts:
        raise ValueError(f"cuts must have a row for each of {rollouts.num_prompts} prompts, got shape {cuts.shape}")
    sampled = jnp.sum(rollouts.mask > 0, axis=1, dtype=jnp.int32)[:, None]
    begins = rollouts.length - sampled
    kept = (begins + jnp.clip(cuts, 0, sampled)).reshape(-1, 1)
    tokens = jnp.repeat(rollouts.tokens, cuts.shape[1], axis=0)
    places = jnp.arange(tokens.shape[1] + len(text))
    spoken = jnp.asarray(text, tokens.dtype)[jnp.clip(places - kept, 0, len(text) - 1)]
    tokens = jnp.where(places < kept, jnp.pad(tokens, ((0, 0), (0, len(text)))), spoken)
    length = kept + len(text)
    return jnp.where(places < length, tokens, 0), length[:, 0]


def generate_exits(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    exits: Exits,
    sampling: SamplingParams = PLAIN,
    max_new_tokens: int,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> Rollouts:
    """Sample one trajectory of each prompt, and answers from early exits of its thought: serial groups.

    Member `i < m` of a group is the prompt, the thought up to its cut and `exits.text`, not sampled again, and an
    answer; member `m` is the trajectory. `logp` of the text is what the policy gives it.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P` prompts of at most `L` tokens; `id` is `[P, m + 1]`, or None.
        key: of the random streams.
        exits: how thoughts are left.
        sampling: temperature, truncation, stop tokens, of trajectories and answers.
        max_new_tokens: `N`, the longest trajectory.
        version: recorded for every sampled token.
        cache_dtype: see `generate`.

    Returns:
        `Rollouts` of `[P, m + 1]` in order of the exits, with `T = L + N + len(text) + exits.max_new_tokens`.
        `extras["exit"]` `[P, m + 1]` int32 is the number of tokens of the thought before the answer.

    Raises:
        ValueError: as `generate`, `draw_exits` and `exit_prompts`; for limits or sampling that differ between prompts.

    Example:
        >>> import functools
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> prompts = Prompts(jnp.array([[2, 3], [4, 5]]), jnp.array([2, 2]))
        >>> leave = Exits(count=2, text=(7,), end=(), max_new_tokens=2)
        >>> params, key = policy.init(jax.random.key(0)), jax.random.key(1)
        >>> sample = functools.partial(generate_exits, policy, exits=leave, max_new_tokens=3)
        >>> out = jax.eval_shape(sample, params, prompts, key)
        >>> out.reward.shape, out.tokens.shape, out.extras["exit"].shape
        ((2, 3), (6, 8), (2, 3))

    Reference: S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models (arXiv 2505.07686).
    """
    count, members = prompts.tokens.shape[0], exits.count + 1
    ids = prompts.id
    if ids is None:
        ids = jnp.arange(count * members, dtype=jnp.uint32).reshape(count, members)
    if ids.shape != (count, members):
        raise ValueError(f"prompts.id must be [P, m + 1] = [{count}, {members}], got {ids.shape}")
    if prompts.max_new_tokens is not None:
        raise ValueError("prompts.max_new_tokens does not apply to early exits; give max_new_tokens and exits' own")
    differ = own_of_sequences(sampling)
    if differ:
        raise ValueError(f"sampling's {', '.join(differ)} must be the same for all prompts where thoughts are left")
    if sampling.stop_strings is not None:
        raise ValueError("sampling.stop_strings do not apply where thoughts are left; give stop_sequences instead")
    sample = {"sampling": sampling, "version": version, "cache_dtype": cache_dtype}
    own = prompts._replace(id=ids[:, -1:])
    whole = generate(policy, params, own, key, max_new_tokens=max_new_tokens, **sample)
    thought = thought_length(whole, exits.end, sampling.stop_sequences)
    cuts = draw_exits(key, ids[:, -1], thought[:, 0], count=exits.count)
    tokens, length = exit_prompts(whole, cuts, exits.text)
    early = Prompts(tokens, length, jnp.repeat(whole.prompt_id, exits.count), ids[:, :-1].reshape(-1, 1))
    answers = generate(policy, params, early, key, max_new_tokens=exits.max_new_tokens, **sample)
    if exits.whole:
        answers = _with_thought(policy, params, answers, whole, cuts, exits, key, sampling.temperature, version)
    group = join_columns([merge_groups(answers, exits.count), whole])
    return group.replace(extras={**group.extras, EXIT: jnp.concatenate([cuts, thought], axis=1)})


def _with_thought(
    policy: Policy,
    params: Params,
    answers: Rollouts,
    whole: Rollouts,
    cuts: Array,
    exits: Exits,
    key: Array,
    temperature: Array | float,
    version: Array | int,
) -> Rollouts:
    """Answers `[P * m, 1]` whose masks begin with the thought: its statistics are those of when it was sampled."""
    places = jnp.arange(answers.mask.shape[1])
    sampled = jnp.sum(whole.mask > 0, axis=1, dtype=jnp.int32)[:, None]
    begin = jnp.repeat((whole.length - sampled)[:, 0], exits.count)[:, None]
    end = begin + cuts.reshape(-1, 1)
    thought, text = (places >= begin) & (places < end), (places >= end) & (places < end + len(exits.text))
    score = models.score(policy, temperature=temperature, max_chosen=len(exits.text))
    # As it was sampled: without dropout.
    given = score.still(params, answers.replace(mask=text.astype(jnp.float32)), frozenset({"logp", "entropy"}), key)

    def fill(of_answer: Array, of_thought: Array, of_text: Array) -> Array:
        padded = jnp.pad(of_thought, ((0, 0), (0, of_answer.shape[1] - of_thought.shape[1])))
        return jnp.where(text, of_text, jnp.where(thought, jnp.repeat(padded, exits.count, axis=0), of_answer))

    known = {"entropy": given.entropy}
    extras = {
        name: fill(x, whole.extras[name], known.get(name, given.logp)).astype(x.dtype)
        for name, x in answers.extras.items()
    }
    earlier = thought | text
    return answers.replace(
        mask=jnp.where(earlier, 1.0, answers.mask),
        logp=fill(answers.logp, whole.logp, given.logp).astype(answers.logp.dtype),
        step=jnp.where(earlier, 0, answers.step),
        version=jnp.where(earlier, version, answers.version),
        extras=extras,
    )

"""Rollouts of many turns: a policy and an environment written in JAX speak to each other inside one program.

The loop over tokens is in `slots`, and environments are in `environments`; here is who speaks when, and what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.rollout.environments.interface import Environment, Text, Transition
from jaxrl_post.rollout.generate import PLAIN, Prompts, assemble, behind_prompts, check_requests, is_known, launch
from jaxrl_post.rollout.slots import Drawn, Reply, Requests
from jaxrl_post.sampling import SamplingParams
from jaxrl_post.sampling.draw import row_keys
from jaxrl_post.sampling.transforms import check, is_off
from jaxrl_post.types import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    Array,
    Params,
    Policy,
    PyTree,
    Rollouts,
    typed_key,
)

REWARD = "environment"
"""`[B, T]` of `Rollouts.rewards`: what the environment gave for each action, on its last token."""

_RESETS = 0x72657365  # parts the environment's random numbers from those of tokens, which have the same ids
_STEPS = 0x73746570


class Exchange(NamedTuple):
    """Where each of `R` sequences is in its episode.

    Attributes:
        state: of the environment.
        turn: `[R]` int32, actions that are over.
        action: `[R, A]` int32, what the policy has said in this turn, 0 behind it.
        said: `[R]` int32, how many tokens that is.
        observation: `[R, O]` tokens, the last one.
        fed: `[R]` int32, how many of them the policy has been fed.
        fingerprint: `[R]` int32, of the environment's state; 0 if states have none.
    """

    state: PyTree
    turn: Array
    action: Array
    said: Array
    observation: Text
    fed: Array
    fingerprint: Array


class Conversation(NamedTuple):
    """Feeds observations and plays actions: the `Turns` of `decode_all`.

    Attributes:
        environment: whose functions are used.
        states: of the environment, one for each of `P` prompts, as `reset` gives them.
        key: of the environment's random numbers.
        requests: the sequences.
        max_turns: actions of a sequence.
        max_turn_tokens: `A`, tokens of an action.
    """

    environment: Environment
    states: PyTree
    key: Array
    requests: Requests
    max_turns: int
    max_turn_tokens: int

    @property
    def marks(self) -> Mapping[str, Any]:
        """Of each token: its turn from 1, or 0 if it was fed; of a turn's first the fingerprint; of its last the rest.

        That is the reward, and 1 where the action has been played.
        """
        return {"turn": jnp.int32, "state": jnp.int32, "reward": jnp.float32, "played": jnp.int32}

    def begin(self, request: Array) -> Exchange:
        """Episodes before the first token."""
        prompt = jnp.minimum(request // self.requests.group_size, len(self.requests.tokens) - 1)
        state = jax.tree.map(lambda x: x[prompt], self.states)
        none = jnp.zeros(request.shape, jnp.int32)
        observation = Text(jnp.zeros((*request.shape, self.environment.max_observation), jnp.int32), none)
        action = jnp.zeros((*request.shape, self.max_turn_tokens), jnp.int32)
        return Exchange(state, none, action, none, observation, none, self._fingerprint(state, none))

    def feed(self, state: Exchange, drawn: Drawn) -> Drawn:
        """`drawn`, with the next token of an observation where one is not yet fed whole."""
        tokens, length = state.observation
        fed = state.fed < length
        place = jnp.minimum(state.fed, tokens.shape[1] - 1)[:, None]
        token = jnp.where(fed, jnp.take_along_axis(tokens, place, axis=1)[:, 0], drawn.token)
        mask = jnp.where(fed, 1.0, drawn.mask)
        others = jax.tree.map(lambda x: jnp.where(fed[:, None], 0, x), drawn.others)
        return Drawn(token, mask, *(jnp.where(fed, 0.0, x) for x in drawn[2:5]), others=others)

    def reply(self, state: Exchange, request: Array, token: Array, alive: Array, stopped: Array, left: Array) -> Reply:
        """The state after one token of each sequence: where it ends an action, the environment has played it."""
        sampled = alive & (state.fed >= state.observation.length)
        place = jnp.where(sampled, state.said, self.max_turn_tokens)
        action = state.action.at[jnp.arange(len(token)), place].set(token, mode="drop")
        said = state.said + sampled
        ended = sampled & (stopped | (said >= self.max_turn_tokens) | (left <= 0))
        played, sound = self._play(state, request, Text(action, said), ended)
        turn = state.turn + ended
        length = jnp.where(ended, played.observation.length, state.observation.length)
        # Without room for the observation and an action of one token there is nobody to tell it to.
        cut = (turn >= self.max_turns) | (left <= length)
        finish = jnp.where(alive & sound, jnp.where(played.done, FINISH_STOP, FINISH_LENGTH), FINISH_ABORT)
        marks = {
            "turn": jnp.where(sampled, state.turn + 1, 0),
            "state": jnp.where(sampled & (state.said == 0), state.fingerprint, 0),
            "reward": jnp.where(ended & sound, played.reward, 0.0),
            "played": ended.astype(jnp.int32),
        }
        following = Exchange(
            state=played.state,
            turn=turn,
            action=jnp.where(ended[:, None], 0, action),
            said=jnp.where(ended, 0, said),
            observation=Text(jnp.where(ended[:, None], played.observation.tokens, state.observation.tokens), length),
            fed=jnp.where(ended, 0, state.fed + (alive & ~sampled)),
            fingerprint=jnp.where(ended, self._fingerprint(played.state, turn), state.fingerprint),
        )
        over = ~alive | ended & (played.done | ~sound | cut)
        return Reply(following, marks, sampled, sampled & ~ended, over, finish.astype(jnp.int8))

    def _play(self, state: Exchange, request: Array, action: Text, ended: Array) -> tuple[Transition, Array]:
        """What actions lead to and whether that is sound, where they have ended; elsewhere the same state."""
        number = self.requests.id[jnp.minimum(request, self.requests.count - 1)]

        def step() -> Transition:
            keys = row_keys(jax.random.fold_in(self.key, _STEPS), number, state.turn)
            found = jax.vmap(self.environment.step)(state.state, action, keys)
            kept = jax.tree.map(lambda new, old: _choose(ended, new, old), found.state, state.state)
            observation = Text(found.observation.tokens.astype(jnp.int32), found.observation.length.astype(jnp.int32))
            return Transition(kept, observation, found.reward.astype(jnp.float32), ended & (found.done != 0))

        def wait() -> Transition:
            no = jnp.zeros_like(ended)
            return Transition(state.state, state.observation, no.astype(jnp.float32), no)

        # Most steps end no action, and then the environment costs nothing.
        played = jax.lax.cond(jnp.any(ended), step, wait)
        length = played.observation.length
        sound = jnp.isfinite(played.reward) & (length >= 0) & (length <= self.environment.max_observation)
        return played, sound

    def _fingerprint(self, state: PyTree, like: Array) -> Array:
        if self.environment.fingerprint is None:
            return jnp.zeros_like(like)
        return jax.vmap(self.environment.fingerprint)(state).astype(jnp.int32)


def _choose(where: Array, new: Array, old: Array) -> Array:
    return jnp.where(where.reshape(where.shape + (1,) * (old.ndim - 1)), new, old)


def generate_turns(
    policy: Policy,
    params: Params,
    environment: Environment,
    tasks: Array,
    key: Array,
    *,
    sampling: SamplingParams = PLAIN,
    max_turns: int,
    max_turn_tokens: int,
    max_new_tokens: int | None = None,
    group_size: int = 1,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
    slots: int | None = None,
    refill: int | None = None,
    cache_pages: int | None = None,
    alternatives: int = 0,
    id: Array | None = None,
) -> Rollouts:
    """Sample `group_size` episodes of each task, in one program: nobody waits for another, nor for the host.

    The policy speaks until something that stops (`sampling.stop_tokens`, `stop_sequences`, `stop_strings`, which belong
    to the action), or until `max_turn_tokens`. The environment plays the action, and its observation is fed to the
    policy token by token, while others speak. Every turn adds to one transcript, of which nothing is read twice.

    An episode ends with `FINISH_STOP` when the environment says so; with `FINISH_LENGTH` after `max_turns`, or when the
    observation and a first token of an action behind it would not fit in `max_new_tokens`; with `FINISH_ABORT`, not
    `valid`, when logits hold NaN or no token may be drawn, and when the environment gives a reward that is not finite
    or an observation that is too long. The observation behind the last action is not part of the transcript. An action
    that `max_new_tokens` cuts is played as it is.

    Tokens are drawn from the streams of `generate`, `fold_in(fold_in(key, id), position)`, and the environment's keys
    are of task, id and turn: an episode is the same alone, in any batch and with any number of `slots`.

    Args:
        policy: the model.
        params: its parameters.
        environment: static; see `environments.Environment` for its contract.
        tasks: `[P]` int, which `environment.reset` is given; they become `prompt_id`.
        key: a typed key or a raw one.
        sampling: as in `generate`; `presence_penalty` and `frequency_penalty` count what the policy has said,
            `repetition_penalty` the prompt too, and none an observation. `min_tokens` does not apply.
        max_turns: actions of an episode; static.
        max_turn_tokens: `A`, tokens of an action; static.
        max_new_tokens: `N`, tokens behind a prompt, of actions and observations, at least `A`; static. None for all
            that `max_turns` may need.
        group_size: `G`; static.
        version: recorded for every sampled token.
        cache_dtype: of the key-value cache; the model's own choice if None.
        slots: as in `generate`.
        refill: as in `generate`.
        cache_pages: as in `generate`, for what is said and fed; an episode that starts over is played again as it was.
        alternatives: as in `generate`; 0 in the places of observations.
        id: `[P, G]` uint32, of the sequences; `arange(P * G)` if None.

    Returns:
        `Rollouts` with `T = max_prompt + N`. `mask` is 1 on what the policy said, and there `step` is the turn from 0;
        observations have `mask` and `logp` 0 and `step` and `version` -1, and count in `length`.
        `rewards["environment"]` `[B, T]` is on the last token of each action, `reward` its sum. In `extras`, beside
        those of `generate`: `turns` `[P, G]` int32, actions played; `state` `[B, T]` int32, if the environment has
        a fingerprint, that of the state in which a turn was begun, on its first token.

    Raises:
        ValueError: for sizes that are too small, wrong shapes, sampling that does not apply or is out of range, and an
            environment that breaks its contract.

    Example:
        >>> import functools
        >>> from jaxrl_post import models
        >>> from jaxrl_post.rollout import environments
        >>> characters = "0123456789udlr>?AG#./"
        >>> world = environments.gridworld(size=3, vocabulary={c: i for i, c in enumerate(characters)})
        >>> policy = models.decoder(vocab_size=21, width=8, layers=1, heads=2)
        >>> play = functools.partial(generate_turns, policy, environment=world, max_turns=4, max_turn_tokens=1)
        >>> tasks, key = jnp.arange(2), jax.random.key(1)
        >>> params = jax.eval_shape(policy.init, key)
        >>> out = jax.eval_shape(functools.partial(play, group_size=3), params, tasks=tasks, key=key)
        >>> out.reward.shape, out.tokens.shape, sorted(out.extras)  # 12 of the prompt, 4 actions, 3 answers of 3
        ((2, 3), (6, 25), ['entropy', 'state', 'turns'])

    Reference: Group-in-Group Policy Optimization for LLM Agent Training (arXiv 2505.10978), for the states.
    """
    check(sampling)
    if not is_off("min_tokens", sampling.min_tokens):
        raise ValueError(
            "sampling.min_tokens does not apply to turns, which end wherever they end; leave it out (where sampling is "
            "an argument of a compiled function, give it only what changes, e.g. the temperature)"
        )
    most = _check_sizes(environment, max_turns, max_turn_tokens, max_new_tokens)
    tasks, key = _check_tasks(tasks), typed_key(key)
    _check_contract(environment, max_turn_tokens)
    of_tasks = jax.vmap(lambda task: jax.random.fold_in(jax.random.fold_in(key, _RESETS), task))(tasks)
    states, prompt = jax.vmap(environment.reset)(tasks, of_tasks)
    prompts = Prompts(prompt.tokens.astype(jnp.int32), prompt.length.astype(jnp.int32), tasks, id)
    requests = check_requests(prompts, most, group_size)
    drawn, finish = launch(
        policy,
        params,
        requests,
        key,
        sampling=sampling,
        max_new_tokens=most,
        slots=slots,
        refill=refill,
        cache_dtype=cache_dtype,
        cache_pages=cache_pages,
        alternatives=alternatives,
        turns=Conversation(environment, states, key, requests, max_turns, max_turn_tokens),
    )
    marks = drawn.marks
    out = assemble(requests, drawn, finish, sampling=sampling, version=version, prompt_id=tasks, turn=marks["turn"])
    behind, _ = behind_prompts(requests, drawn)
    reward, turns = (jnp.sum(marks[name], axis=1).reshape(out.reward.shape) for name in ("reward", "played"))
    extras = {**out.extras, "turns": turns}
    if environment.fingerprint is not None:
        extras["state"] = behind(marks["state"])
    return out.replace(reward=reward, rewards={REWARD: behind(marks["reward"])}, extras=extras)


def _check_sizes(environment: Environment, max_turns: int, max_turn_tokens: int, max_new_tokens: int | None) -> int:
    """The most tokens behind a prompt."""
    if max_turns < 1 or max_turn_tokens < 1:
        raise ValueError(f"max_turns and max_turn_tokens must be at least 1, got {max_turns} and {max_turn_tokens}")
    if environment.max_prompt < 1 or environment.max_observation < 1:
        raise ValueError(
            "environment.max_prompt and max_observation must be at least 1, got "
            f"{environment.max_prompt} and {environment.max_observation}"
        )
    needed = max_turns * max_turn_tokens + (max_turns - 1) * environment.max_observation
    if max_new_tokens is not None and max_new_tokens < max_turn_tokens:
        raise ValueError(
            f"max_new_tokens must have room for an action of max_turn_tokens={max_turn_tokens}, got {max_new_tokens}; "
            f"all {max_turns} turns need at most {needed}"
        )
    return needed if max_new_tokens is None else max_new_tokens


def _check_tasks(tasks: Array) -> Array:
    known = np.asarray(tasks) if is_known(tasks) else None
    tasks = jnp.asarray(tasks)
    if tasks.ndim != 1 or not jnp.issubdtype(tasks.dtype, jnp.integer):
        raise ValueError(f"tasks must be [P] integers, got {tasks.dtype} of shape {tasks.shape}")
    if known is not None and known.size and not -(2**31) <= int(known.min()) <= int(known.max()) < 2**31:
        raise ValueError(f"tasks must be 32-bit integers, got {known.min()} to {known.max()}")
    return tasks.astype(jnp.int32)


def _check_contract(environment: Environment, max_turn_tokens: int) -> None:
    """Raise ValueError where the environment's functions give other shapes than `Environment` says."""

    def described(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)

    def shapes(*arrays: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(x.shape for x in arrays)

    def compare(name: str, found: PyTree, expected: PyTree) -> None:
        if found != expected:
            raise ValueError(f"environment.{name} must have {expected}, got {found}; shapes and dtypes are fixed")

    number, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    action = jax.eval_shape(lambda: Text(jnp.zeros(max_turn_tokens, jnp.int32), jnp.ones((), jnp.int32)))
    state, prompt = jax.eval_shape(environment.reset, number, key)
    found = jax.eval_shape(environment.step, state, action, key)
    compare("reset's prompt", shapes(*prompt), ((environment.max_prompt,), ()))
    compare("step's observation", shapes(*found.observation), ((environment.max_observation,), ()))
    compare("step's reward and done", shapes(found.reward, found.done), ((), ()))
    compare("step's state", described(found.state), described(state))
    if environment.fingerprint is not None:
        compare("fingerprint", shapes(jax.eval_shape(environment.fingerprint, state)), ((),))

"""Claims about rewards of steps, words and what an agent is told, beside a reward of the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, methods, rewards
from tests.claims import lab


def _digits(vocab, length):
    return np.arange(vocab**length)[:, None] // vocab ** np.arange(length - 1, -1, -1) % vocab


def test_a_potential_does_not_make_an_agent_hover_before_a_risky_last_step():
    """A chain whose last step succeeds half of the time and otherwise ends in failure, planned exactly.

    The baseline is paid the change of progress alone, so that the last step costs it half of what it has.
    """
    count, gamma = 8, 0.95

    def outcome(shaped, key):
        """Discounted chance of success, from the start, of the policy that is best for the rewards."""
        noise = 0.03 * jax.random.normal(key, (count,))
        progress = jnp.clip(jnp.arange(count) / count + noise, 0.01, 0.99)
        hops = rewards.hop(jnp.pad(progress[:-1], (1, 0)), progress)
        progress = rewards.progress_from_hops(hops[None])[0]

        def paid(before, after, ends):
            """Of a step: the last has the goal's reward half of the time."""
            plain = jnp.where(ends, 0.5, after) - before
            reward = jnp.stack([jnp.where(ends, 0.5, 0.0), jnp.where(ends, 0.0, after)])
            potential = rewards.potential_shaping(reward[:1][None], before[None, None], gamma=gamma)[0, 0]
            return jnp.where(shaped, potential + gamma * reward[1], plain)

        places = jnp.arange(count)
        ahead = jnp.append(progress[1:], 0.0)
        forward = jax.vmap(paid)(progress, ahead, places == count - 1)
        stay = jax.vmap(paid)(progress, progress, jnp.zeros(count, bool))

        def improve(value, _):
            go = forward + gamma * jnp.append(value[1:], 0.0)
            wait = stay + gamma * value
            return jnp.maximum(go, wait), go > wait

        _, choices = jax.lax.scan(improve, jnp.zeros(count), None, length=400)
        return jnp.where(jnp.all(choices[-1]), 0.5 * gamma ** (count - 1), 0.0)

    lab.check("robo-dopamine", outcome, method=1.0, baseline=0.0, margin=0.2)


def test_a_judge_of_progress_leads_to_an_end_that_is_hardly_ever_reached():
    """Six steps forward or back; a judge is asked at every second one and is wrong one time in ten."""
    length = 6

    def judge(rollouts, key):
        moves = 2 * rollouts.tokens[:, 1:] - 1
        place = jnp.cumsum(moves, axis=1)
        done = (place >= length).astype(jnp.float32)
        called = jnp.broadcast_to(jnp.arange(length) % 2 == 1, moves.shape)
        before = jnp.pad(place, ((0, 0), (2, 0)))[:, :-2]
        closer = jnp.sign(place - before)
        wrong = jax.random.bernoulli(key, 0.1, moves.shape)
        closer = jnp.where(wrong, -closer, closer)
        said = jnp.where(wrong, 1 - done, done)
        mixed = rewards.progress_mix(closer, jnp.clip((place + length) / (2 * length), 0, 1), said)
        parts = {"mixed": rewards.held_between_calls(mixed, called), "done": rewards.held_between_calls(said, called)}
        totals = {name: jnp.mean(x, axis=1).reshape(rollouts.reward.shape) for name, x in parts.items()}
        return rollouts.replace(rewards=totals)

    task = lab.Task(1, 2, length, judge, initial=jnp.array([0.7, 0.0]))

    def outcome(method, key):
        """Chance of the end."""
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, length)[0, -1]

    mixed, done = (
        methods.policy_gradient(advantage=lambda s, name=name: advantages.grpo(s.component(name), s.valid))
        for name in ("mixed", "done")
    )
    lab.check("large-reward-models", outcome, method=mixed, baseline=done, margin=0.1)


def test_a_little_diversity_varies_right_answers_and_leaves_them_right():
    """Four words of three kinds; an answer is right where it begins with the right word."""
    words = _digits(3, 4)
    right = (words[:, 0] == 0).astype(np.float32)
    varied = np.array([np.mean(list(rewards.token_diversity([row[:2], row[2:]]).values())) for row in words.tolist()])

    def outcome(share, key):
        """Diversity of an answer that is right, 0 of one that is not."""
        table = jnp.asarray((1 - share) * right + share * varied, jnp.float32)
        task = lab.Task(1, 3, 4, lab.by_sequence(table), initial=jnp.array([1.0, 0.0, 0.0]))
        trained = lab.train(task, methods.grpo(beta=0.0), key, steps=80, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 4)[0] @ jnp.asarray(right * varied, jnp.float32)

    lab.check("multirole-r1", outcome, method=0.1, baseline=0.0, margin=0.05)


def test_spans_of_a_critique_teach_sooner_than_their_sum():
    """Six words: one kind is called good, one poor."""
    length = 6
    texts = ["fine", "plain", "foul"]

    def scores():
        found = [rewards.span_scores(text, ["fine"], ["foul"]) for text in texts]
        return jnp.array([score for (score,) in found], jnp.float32)

    table = scores()
    total = jnp.sum(table[_digits(3, length)], axis=1)

    def judge(rollouts, key):
        del key
        earned = jnp.where(rollouts.mask > 0, table[rollouts.tokens], 0.0)
        whole = jnp.sum(earned, axis=1).reshape(rollouts.reward.shape)
        return rollouts.replace(reward=whole, rewards={"spans": earned})

    def by_token(s):
        returns = jnp.cumsum(s.rollouts.rewards["spans"][:, ::-1], axis=1)[:, ::-1]
        return (returns - jnp.mean(returns, axis=0)) * s.mask

    task = lab.Task(1, 3, length, judge)

    def outcome(method, key):
        """Good words less poor ones."""
        trained = lab.train(task, method, key, steps=30, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, length)[0] @ total

    dense, whole = (methods.policy_gradient(advantage=a) for a in (by_token, "dr_grpo"))
    lab.check("text2grad", outcome, method=dense, baseline=whole, margin=0.1)


# A door behind four steps: the right action at each is told, and waiting repeats what was told last.
WAY = (1, 2, 1, 2, 2)


def _captions(tokens):
    """The number of steps that were done before each action `[N, T]` and after it, and the caption of each."""
    done, told, captions = jnp.zeros(len(tokens), jnp.int32), jnp.zeros(len(tokens), jnp.int32), []
    for place in range(tokens.shape[1]):
        right = tokens[:, place] == jnp.array(WAY)[jnp.minimum(done, len(WAY) - 1)]
        done = done + right
        told = jnp.where(right, done, jnp.where(tokens[:, place] == 0, told, 0))
        captions.append(told)
    return done, jnp.stack(captions, axis=1)


def _labelled(exponent):
    def judge(rollouts, key):
        del key
        done, captions = _captions(rollouts.tokens[:, 1:])
        opened = (done == len(WAY)).astype(jnp.float32)
        # Every caption of progress was labelled helpful, none of the others.
        helpful = (captions > 0).astype(jnp.float32)
        at_end = jnp.zeros_like(helpful).at[:, -1].set(opened)
        counts = rewards.episode_counts(captions, captions > 0)
        earned = rewards.with_intrinsic(
            at_end, helpful, counts, external_weight=10.0, intrinsic_weight=0.4, exponent=exponent
        )
        shape = rollouts.reward.shape
        return rollouts.replace(reward=jnp.sum(earned, axis=1).reshape(shape), rewards={"door": opened.reshape(shape)})

    return judge


def _opened(exponent):
    task = lab.Task(1, 3, len(WAY), _labelled(exponent), initial=jnp.array([0.5, 0.0, 0.0]))
    opened = (_captions(jnp.asarray(_digits(3, len(WAY))))[0] == len(WAY)).astype(jnp.float32)

    def outcome(method, key):
        """Chance that the door opens."""
        trained = lab.train(task, method, key, steps=100, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, len(WAY))[0] @ opened

    return outcome


def test_labels_of_what_an_agent_is_told_open_a_door_that_it_would_not_find():
    door = methods.policy_gradient(advantage=lambda s: advantages.grpo(s.component("door"), s.valid))
    lab.check("oni", _opened(3.0), method=methods.policy_gradient(), baseline=door, margin=0.2)


@pytest.mark.nightly
def test_labels_that_pay_the_same_every_time_are_farmed():
    """The agent waits, and is told again what it was told."""
    farmed, _ = lab.compare(_opened(0.0), methods.policy_gradient(), methods.reinforce(), 16)
    discounted, _ = lab.compare(_opened(3.0), methods.policy_gradient(), methods.reinforce(), 16)
    assert discounted.method.mean() > farmed.method.mean() + 0.2

"""Claims of methods that give each step of a trajectory its own credit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import advantages, methods
from tests.claims import lab


def _unit_steps(size):
    return optax.chain(optax.normalize_by_update_norm(), optax.sgd(size))


def _expected(params, rewards, length):
    return jnp.mean(jnp.sum(lab.probabilities(params, length) * rewards, axis=-1))


def _steps(rollouts):
    """Every token is a step."""
    length = rollouts.tokens.shape[1] - 1
    return jnp.where(rollouts.mask > 0, jnp.arange(-1, length), -1)


def test_step_rewards_compared_in_random_blocks_learn_where_no_state_is_met_twice():
    # The right action of each of four steps is another one in every state, and all must be right.
    vocab, length, prompts = 3, 4, 4
    nodes = sum(vocab**level for level in range(length))
    right = np.random.default_rng(0).integers(0, vocab, (prompts, nodes))
    digits = np.array(np.unravel_index(np.arange(vocab**length), (vocab,) * length)).T
    node = np.zeros((vocab**length, length), int)
    for level in range(1, length):
        node[:, level] = node[:, level - 1] * vocab + digits[:, level - 1] + 1
    correct = jnp.asarray(digits[None] == right[:, node])  # [P, sequences, L]
    solved = jnp.all(correct, axis=2)

    def judge(rollouts, key):
        del key
        index = lab.sequence_index(rollouts, vocab)
        prompt = rollouts.prompt_id[:, None]
        earned = correct[prompt, index].reshape(-1, length).astype(jnp.float32)
        return rollouts.replace(
            step=_steps(rollouts),
            reward=solved[prompt, index].astype(jnp.float32),
            rewards={"step": jnp.pad(earned, ((0, 0), (1, 0)))},
        )

    task = lab.Task(prompts, vocab, length, judge)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=30, group_size=8, optimizer=_unit_steps(1.0))
        return _expected(trained.params, solved, length)

    method = methods.srgpo(block_size=16, max_steps=length + 1)
    lab.check("srgpo", outcome, method=method, baseline=methods.grpo(beta=0.0))


LENGTH, KEY, DOOR = 6, 1, 4


def _key_and_door(noise):
    """Six steps: the key must be taken at one, with it the door opens at another, the others are of no account.

    The policy sees the whole history, the state is the number of the step and whether there is a key.
    """

    def judge(rollouts, key):
        right = rollouts.tokens[:, 1:] == 1
        step = _steps(rollouts)
        state = jnp.maximum(2 * step, 0) + right[:, KEY : KEY + 1] * (step > KEY)
        solved = (right[:, KEY] & right[:, DOOR]).reshape(rollouts.reward.shape)
        reward = jnp.where(jax.random.bernoulli(key, noise, solved.shape), ~solved, solved)
        return rollouts.replace(step=step, extras={"state": state}, reward=reward.astype(jnp.float32))

    return judge


def test_steps_shared_by_good_and_bad_trajectories_made_neutral_solve_long_tasks_sooner():
    task = lab.Task(4, 2, LENGTH, _key_and_door(0.1))
    index = jnp.arange(2**LENGTH)
    solved = ((index >> (LENGTH - 1 - KEY)) & (index >> (LENGTH - 1 - DOOR)) & 1).astype(jnp.float32)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=20, group_size=8, optimizer=_unit_steps(1.0))
        return _expected(trained.params, solved, LENGTH)

    method = methods.salt(max_steps=LENGTH)
    lab.check("salt", outcome, method=method, baseline=methods.grpo(beta=0.0))


def test_the_sign_of_a_merged_steps_advantage_agrees_better_with_that_of_the_true_one():
    task = lab.Task(16, 2, LENGTH, _key_and_door(0.0))
    shape = (task.prompts, 8, LENGTH)

    def agreement(merge, key):
        rollouts = lab.sample(task, task.params(), key, shape[1])
        action = rollouts.tokens[:, 1:].reshape(shape)
        place = jnp.arange(LENGTH)
        # Only taking the key, and opening the door with it, has another value than the other action.
        matters = (place == KEY) | ((place == DOOR) & (action[:, :, KEY, None] == 1))
        whole = advantages.grpo(rollouts.reward)
        found = jnp.broadcast_to(whole[:, :, None], shape)
        if merge:
            state = rollouts.extras["state"][:, 1:].reshape(shape)
            found = advantages.salt(whole, state, action, jnp.ones(shape))
        counts = matters & jnp.any(whole != 0, axis=1)[:, None, None]
        return jnp.sum(counts * (jnp.sign(found) == 2 * action - 1)) / jnp.sum(counts)

    found = lab.compare(agreement, True, False, 32)[0]
    assert found.method.mean() > 0.95
    assert found.baseline.mean() < 0.9


def _tied(task, normalize):
    """Gradients of all prefixes of a length are added up (and brought to length 1): the state is the step's number."""
    level = np.concatenate([np.full(task.vocab**n, n) for n in range(task.length)])

    def update(gradients, state, params=None):
        del params
        total = jax.vmap(lambda g: jax.ops.segment_sum(g, level, task.length))(gradients)
        total = total / (optax.tree.norm(total) + 1e-8) if normalize else total
        return total[:, level], state

    return optax.GradientTransformation(lambda params: (), update)


CHAIN, DECISIVE = 8, 5


def chain_task(noise):
    """Eight steps, one of which decides; at the start its right action has a chance of a tenth. Outcomes are noisy."""
    level = np.concatenate([np.full(2**n, n) for n in range(CHAIN)])
    initial = np.zeros((1, 2**CHAIN - 1, 2))
    initial[:, level == DECISIVE, 0] = np.log(9)

    def judge(rollouts, key):
        won = (rollouts.tokens[:, DECISIVE + 1] == 1).reshape(rollouts.reward.shape)
        reward = jnp.where(jax.random.bernoulli(key, noise, won.shape), ~won, won)
        return rollouts.replace(step=_steps(rollouts), reward=reward.astype(jnp.float32))

    return lab.Task(1, 2, CHAIN, judge, initial)


def chain_optimizers(task):
    """Small steps of one length for the policy, plain descent for the reward model."""
    policy = optax.chain(_tied(task, normalize=True), optax.sgd(0.3))
    return {"policy": policy, "prm": optax.chain(_tied(task, normalize=False), optax.sgd(40.0))}


def test_a_reward_model_learned_from_outcomes_finds_the_decisive_step_in_fewer_episodes():
    task = chain_task(0.3)
    solved = (jnp.arange(2**CHAIN) >> (CHAIN - 1 - DECISIVE)) & 1
    optimizers = chain_optimizers(task)

    def given(method):
        return optimizers if "prm" in method.trains else optimizers["policy"]

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=24, group_size=8, optimizer=given)
        return _expected(trained.params, solved, CHAIN)

    lab.check("oprl-istar", outcome, method=methods.oprl(max_steps=CHAIN), baseline=methods.grpo(beta=0.0))


def test_centred_process_scores_keep_success_where_a_judge_likes_useless_steps():
    # Token 0 answers and ends the episode, token 1 is a step that the judge likes and that makes success less likely.
    length = 4
    chance = jnp.array([0.9, 0.4, 0.2, 0.1, 0.0])  # of success, by the number of useless steps; the last never answers

    def judge(rollouts, key):
        useless = rollouts.tokens[:, 1:] == 1
        before = jnp.pad(jnp.cumprod(useless, axis=1), ((0, 0), (1, 0)), constant_values=1)
        number = jnp.sum(before[:, 1:], axis=1)
        solved = jax.random.bernoulli(key, chance[number])
        score = jnp.pad(jnp.where(useless, 1.0, 0.5), ((0, 0), (1, 0)))
        made = rollouts.replace(
            mask=rollouts.mask.at[:, 1:].multiply(before[:, :-1]),
            reward=solved.reshape(rollouts.reward.shape).astype(jnp.float32),
            rewards={"judge": score, "additive": score + 1},  # what ReNorm takes off is added before
        )
        return made.replace(step=_steps(made))

    task = lab.Task(4, 2, length, judge)
    digits = (jnp.arange(2**length)[:, None] >> jnp.arange(length - 1, -1, -1)) & 1
    success = chance[jnp.sum(jnp.cumprod(digits, axis=1), axis=1)]

    def outcome(method, key):
        critic = {"logits": task.params(), "value": jnp.zeros(task.params().shape[:2])}
        trained = lab.train(
            task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05), roles=lambda _: {"critic": critic}
        )
        return _expected(trained.params, success, length)

    centred, additive = (methods.ppr_renorm(process=name, max_steps=length) for name in ("judge", "additive"))
    lab.check("ppr-renorm", outcome, method=centred, baseline=additive)

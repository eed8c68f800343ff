"""Claims of methods that pay steps for what they add to the chance of the right answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import methods
from jaxrl_post.types import FINISH_LENGTH, TokenStats
from tests.claims import lab


def _in_turns(judge):
    """A judge of rollouts in which every token is a turn, there is no stop token, and the answer is one token."""

    def judged(rollouts, key):
        turn = jnp.cumsum(rollouts.mask, axis=1).astype(jnp.int32) - 1
        rollouts = rollouts.replace(
            extras={"answer_tokens": jnp.zeros((rollouts.num_prompts, 1), jnp.int32)},
            step=jnp.where(rollouts.mask > 0, turn, -1),
            finish=jnp.full_like(rollouts.finish, FINISH_LENGTH),
        )
        return judge(rollouts, key)

    return judged


def _probing(task, belief):
    """A `Score` that answers a probe with `belief(params, prompt, tokens, how many of them count)`."""

    def score(params, rollouts, fields, key):
        if rollouts.tokens.shape[1] == task.length + 1:
            return lab.score(params, rollouts, fields, key)
        place = jnp.argmax(rollouts.mask, axis=1)
        prompt = jnp.repeat(rollouts.prompt_id, rollouts.group_size)
        found = jnp.log(jnp.maximum(belief(params, prompt, rollouts.tokens[:, 1:], place - 1), 1e-30))
        return TokenStats(logp=rollouts.mask * found[:, None])

    return score


# Search: two turns open one of `BOXES` boxes each, the third answers. The answer is known once both facts are found.
BOXES, EMPTY, FACTS, GOLD = 8, 0, (3, 5), 6


def _search():
    first, second = np.meshgrid(np.arange(BOXES), np.arange(BOXES), indexing="ij")
    found = np.sum([(first == fact) | (second == fact) for fact in FACTS], axis=0)
    logits = np.zeros((1 + BOXES + BOXES**2, BOXES))
    # An assistant that was trained to read: it answers right with 1%, 5% or 80%.
    sure = np.array([0.01, 0.05, 0.8])[found.reshape(-1)]
    logits[1 + BOXES :, GOLD] = np.log(sure / (1 - sure) * (BOXES - 1))
    reward = np.zeros((BOXES, BOXES, BOXES))
    reward[..., GOLD] = 1.0
    task = lab.Task(1, BOXES, 3, _in_turns(lab.by_sequence(reward.reshape(-1))), initial=logits)

    def belief(params, prompt, tokens, count):
        # Asked now: the answer of one who opens an empty box in each turn that is left.
        opened = [jnp.where(count > turn, tokens[:, turn], EMPTY) for turn in range(2)]
        node = 1 + BOXES + opened[0] * BOXES + opened[1]
        return jax.nn.softmax(params[prompt, node])[:, GOLD]

    return task, _probing(task, belief), jnp.asarray(reward.reshape(-1))


def test_igpo_learns_to_search_where_all_outcomes_of_a_group_are_mostly_equal():
    task, score, reward = _search()

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=40, group_size=4, optimizer=2.0, score=score)
        return lab.probabilities(trained.params, 3)[0] @ reward

    method = methods.igpo(num_steps=3, beta=0.0)
    lab.check("igpo", outcome, method=method, baseline=methods.grpo(beta=0.0))


def _rates(params, success):
    """`[P, nodes]`: the policy's success rate in every node of the tree, sequences last, by enumeration."""
    vocab, length = params.shape[-1], round(np.log(success.size) / np.log(params.shape[-1]))
    rates = [jnp.broadcast_to(success, (params.shape[0], success.size))]
    for level in reversed(range(length)):
        first = (vocab**level - 1) // (vocab - 1)
        p = jax.nn.softmax(params[:, first : first + vocab**level])
        rates.insert(0, jnp.sum(p * rates[0].reshape(*p.shape), axis=-1))
    return jnp.concatenate(rates, axis=1)


def _rate_after(success):
    """Belief that is the exact success rate of whoever is asked, from the tokens so far."""

    def belief(params, prompt, tokens, count):
        vocab = params.shape[-1]
        code, node = jnp.zeros_like(count), jnp.zeros_like(count)
        for level in range(round(np.log(success.size) / np.log(vocab))):
            there = count > level
            code = jnp.where(there, code * vocab + tokens[:, level], code)
            node = jnp.where(there, (vocab ** (level + 1) - 1) // (vocab - 1) + code, node)
        return _rates(params, success)[prompt, node]

    return belief


def _updates_until(share, task, success, method, key, steps, **options):
    """The number of updates after which the exact success rate has been `share` or more for good."""
    trained = lab.train(
        task, method, key, steps=steps, observe=lambda p: lab.probabilities(p, task.length)[0] @ success, **options
    )
    below = jnp.where(trained.trace < share, jnp.arange(1, steps + 1), 0)
    return jnp.max(below) + 1


KEYS, CHAIN = (1, 4), 6


def _chain():
    """Six tokens, two of which decide: both must be 1, which the policy chooses with 27% at first."""
    tokens = np.array(np.unravel_index(np.arange(2**CHAIN), (2,) * CHAIN)).T
    success = jnp.asarray(tokens[:, KEYS].all(axis=1), jnp.float32)
    logits = np.zeros((2**CHAIN - 1, 2))
    for key in KEYS:
        logits[2**key - 1 : 2 ** (key + 1) - 1, 0] = 1.0
    task = lab.Task(1, 2, CHAIN, _in_turns(lab.by_sequence(success)), initial=logits)
    return task, _probing(task, _rate_after(success)), success


def _same_length(step):
    """Updates of one length, so that a larger advantage is not a larger learning rate."""
    return optax.chain(optax.normalize_by_update_norm(), optax.sgd(step))


def test_vps_reaches_ninety_percent_in_fewer_updates_than_grpo():
    task, score, success = _chain()
    options = {"steps": 120, "group_size": 8, "optimizer": _same_length(0.4), "score": score}

    def outcome(method, key):
        return -_updates_until(0.9, task, success, method, key, **options)

    method = methods.grpo_vps(steps="turns", num_steps=CHAIN, beta=0.0)
    lab.check("grpo-vps", outcome, method=method, baseline=methods.grpo(beta=0.0))


def test_vps_pays_fillers_of_right_answers_less_than_keys_and_grpo_pays_all_tokens_alike():
    task, score, _ = _chain()

    def paid(method, key):
        """`[CHAIN]`: the mean advantage of each token of right answers."""
        rollouts = lab.sample(task, task.params(), key, 64)
        fields = frozenset({"logp"})
        stats = {"policy": lab.score(task.params(), rollouts, fields, key)}
        for name, (texts, _) in (method.probes(rollouts) if method.probes else {}).items():
            stats[f"probe/{name}"] = score(task.params(), texts, fields, key)
        found, _ = method.targets((), rollouts, stats, key)
        right = rollouts.reward.reshape(-1, 1)
        return jnp.sum(found.advantages * right, axis=0)[1:] / jnp.sum(right)

    keys = jax.random.split(jax.random.key(0), 16)
    vps, plain = (
        np.asarray(jnp.mean(jax.jit(jax.vmap(functools.partial(paid, method)))(keys), axis=0))
        for method in (methods.grpo_vps(steps="turns", num_steps=CHAIN, beta=0.0), methods.grpo(beta=0.0))
    )
    fillers = [t for t in range(CHAIN) if t not in KEYS]
    np.testing.assert_allclose(plain, plain[0], rtol=1e-5)
    np.testing.assert_allclose(vps[fillers] - plain[fillers], 0, atol=1e-4)
    assert np.all(vps[list(KEYS)] - plain[list(KEYS)] > 0.15)


PLANTED, TRIES = (0, 1, 2, 1, 0), 6


def test_progress_under_the_best_of_four_needs_less_than_half_the_samples_of_the_outcome_alone():
    # The policy has to write a sequence of five tokens somewhere among six; by chance it does in two of 243 answers.
    tokens = np.array(np.unravel_index(np.arange(3**TRIES), (3,) * TRIES)).T
    windows = [tokens[:, i : i + len(PLANTED)] for i in range(TRIES - len(PLANTED) + 1)]
    success = jnp.asarray(np.any([(window == PLANTED).all(axis=1) for window in windows], axis=0), jnp.float32)
    task = lab.Task(1, 3, TRIES, _in_turns(lab.by_sequence(success)))
    score = _probing(task, _rate_after(success))
    options = {"steps": 150, "group_size": 8, "optimizer": _same_length(0.8), "score": score}

    def outcome(method, key):
        return -jnp.log2(_updates_until(0.8, task, success, method, key, **options))

    method = methods.pav(alpha=5.0, k=4, steps="turns", num_steps=TRIES)
    lab.check("pav", outcome, method=method, baseline=methods.reinforce(baseline="leave_one_out"), margin=1.0)

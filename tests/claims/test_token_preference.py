"""Claims about credit for tokens from pairs and demonstrations."""

import jax
import jax.numpy as jnp

from jaxrl_post import losses, methods
from tests.claims import lab
from tests.claims.offline import answers, learned


def _chosen_first(pairs, score, key):
    """Pairs `[N, 2, T]` in the order of Bradley and Terry's labels of scores `[N, 2]`."""
    first = jax.random.uniform(key, score.shape[:1]) < jax.nn.sigmoid(score[:, 0] - score[:, 1])
    return jnp.where(first[:, None, None], pairs, pairs[:, ::-1])


def _tokens_that_matter(method, key):
    """Probability of the right token at the two of eight places that matter, and the KL at the others."""
    matters, beta = jnp.array([2, 5]), 0.1
    first, second, label = jax.random.split(key, 3)
    start = 0.3 * jax.random.normal(first, (8, 2))
    drawn = (jax.random.uniform(second, (200, 2, 8)) < jax.nn.sigmoid(start[:, 1] - start[:, 0])).astype(jnp.int32)
    rollouts = answers(_chosen_first(drawn, 2.0 * jnp.sum(drawn[..., matters], -1), label))
    place, tokens = jnp.arange(8), rollouts.tokens[:, 1:]

    def logp(table):
        return jnp.pad(jax.nn.log_softmax(table)[place, tokens], ((0, 0), (1, 0)))

    def learn(method, steps, **roles):
        return learned(method, logp, start, rollouts, steps=steps, learning_rate=0.05, roles=roles)

    guide = learn(methods.dpo(beta=beta), 100)
    table = jax.nn.log_softmax(lab.pick(method, lambda one: learn(one, 20, guide=guide)))
    drift = jnp.sum(jnp.exp(table) * (table - jax.nn.log_softmax(start)), axis=1)
    return jnp.mean(jnp.exp(table)[matters, 1]), jnp.sum(drift.at[matters].set(0.0))


def test_tokens_that_a_guide_has_moved_are_learned_sooner():
    method, dpo = methods.tgdpo(beta=0.1, alpha=0.5), methods.dpo(beta=0.1)
    lab.check("tgdpo", lambda *given: _tokens_that_matter(*given)[0], method=method, baseline=dpo, seeds=16)
    drift, _ = lab.compare(lambda *given: _tokens_that_matter(*given)[1], method, dpo, 16)
    assert drift.interval[0] > 0.1  # the other half of the claim does not come out: places without meaning move further


def _segments(method, key, *, number=2000, beta=0.5):
    """Minus the KL from the optimal policy of a chain of six states, learned from pairs of three steps each."""
    states, gamma, steps = 6, 0.9, 3
    after = jnp.stack([jnp.maximum(jnp.arange(states) - 1, 0), jnp.minimum(jnp.arange(states) + 1, states - 1)], axis=1)
    reward = (after == states - 1).astype(jnp.float32)

    def backup(value, _):
        return beta * jax.nn.logsumexp((reward + gamma * value[after]) / beta, axis=1), None

    value, _ = jax.lax.scan(backup, jnp.zeros(states), None, length=200)
    best = jax.nn.log_softmax((reward + gamma * value[after]) / beta)  # advantage / beta
    start_key, walk_key, label_key = jax.random.split(key, 3)
    done = jax.random.bernoulli(walk_key, 0.5, (number, 2, steps)).astype(jnp.int32)
    place = [jnp.broadcast_to(jax.random.randint(start_key, (number, 1), 0, states), (number, 2))]
    for t in range(steps):
        place.append(after[place[-1], done[..., t]])
    both = jnp.stack(place[:-1], axis=-1) * 2 + done
    both = _chosen_first(both, beta * jnp.sum(best.reshape(-1)[both], -1), label_key)
    rollouts = answers(both)

    def logp(table):
        return jnp.pad(jax.nn.log_softmax(table).reshape(-1)[rollouts.tokens[:, 1:]], ((0, 0), (1, 0)))

    def learn(one):
        given = rollouts
        if one.learns_from == "completions":
            given = rollouts.replace(mask=rollouts.mask.at[1::2].set(0.0))
        return learned(one, logp, jnp.zeros((states, 2)), given, steps=200, learning_rate=0.05)

    found = jax.nn.log_softmax(lab.pick(method, learn))
    return -jnp.mean(jnp.sum(jnp.exp(best) * (best - found), axis=1))


def test_preferences_by_regret_give_the_optimal_policy_without_a_reward():
    """The baseline imitates the preferred segments."""
    found = lab.check(
        "cpl", _segments, method=methods.cpl(beta=0.5, bias=1.0), baseline=methods.sft(), seeds=8, margin=0.2
    )
    assert found.method.mean() > -0.01


def _after_demonstrations(method, key, *, number=8, rate=0.1):
    """What the best answer earns more than a policy that was tuned on two others and then by DPO; KL of the first."""
    keys = jax.random.split(key, 4)
    reward, start = 2 * jax.random.normal(keys[0], (number,)), jax.random.normal(keys[1], (number,))
    shown = answers(jnp.argsort(-reward)[1:3, None, None])  # the second and the third best

    def learn(method, params, rollouts, steps):
        def logp(logits):
            return jnp.pad(jax.nn.log_softmax(logits)[rollouts.tokens[:, 1:]], ((0, 0), (1, 0)))

        return learned(method, logp, params, rollouts, steps=steps, learning_rate=rate)

    tuned = lab.pick(method, lambda one: learn(one, start, shown, 400))
    drawn = jax.random.categorical(keys[2], tuned, shape=(200, 2, 1))
    pairs = answers(_chosen_first(drawn, reward[drawn[..., 0]], keys[3]))
    final = jax.nn.softmax(learn(methods.dpo(), tuned, pairs, 60))
    kl = jnp.sum(jax.nn.softmax(tuned) * (jax.nn.log_softmax(tuned) - jax.nn.log_softmax(start)))
    return jnp.sum(final * reward) - jnp.max(reward), -kl


def test_demonstrations_that_hold_to_the_reference_leave_dpo_more_to_choose_from():
    method, sft = methods.f_sft(generator="chi2", beta=2.0), methods.sft()
    found = lab.check(
        "implicit-reward-bridge", lambda *given: _after_demonstrations(*given)[0], method=method, baseline=sft
    )
    kl, _ = lab.compare(lambda *given: _after_demonstrations(*given)[1], method, sft, 16)
    assert kl.interval[0] > 0.5
    assert found.effect > 0.1


def _token_tree(key, *, beta, vocab, length):
    """Of every prefix, `[S, V]`: a reward, log-probs of a reference, and the optimal soft advantage, in nats."""
    prefixes = sum(vocab**level for level in range(length))
    reward, start = jax.random.normal(key, (2, prefixes, vocab))
    reference, value, end, found = jax.nn.log_softmax(start), jnp.zeros(vocab**length), prefixes, []
    for level in reversed(range(length)):
        at = slice(end - vocab**level, end)
        q = (reward[at] + value.reshape(-1, vocab)) / beta
        value = jax.nn.logsumexp(reference[at] + q, axis=1)
        found.insert(0, q - value[:, None])
        value, end = beta * value, at.start
    return reward, reference, jnp.concatenate(found)


def _errors_found(judge, key, *, beta=0.5, vocab=3, length=3, pairs=2000):
    """How often the least credit is that of the one token of a best answer that was replaced by the worst choice."""
    tree, draw, label = jax.random.split(key, 3)
    reward, reference, advantage = _token_tree(tree, beta=beta, vocab=vocab, length=length)
    task = lab.Task(1, vocab, length, lab.by_sequence(jnp.zeros(vocab**length)))
    drawn = lab.sample(task, reference[None], draw, 2 * pairs).tokens[:, 1:]
    score = jnp.sum(reward[lab.prefix_rows(drawn, vocab), drawn], axis=1)
    rollouts = answers(_chosen_first(drawn.reshape(pairs, 2, length), score.reshape(pairs, 2), label))
    tokens = rollouts.tokens[:, 1:]
    rows = lab.prefix_rows(tokens, vocab)

    def logp(table):
        return jnp.pad(jax.nn.log_softmax(table)[rows, tokens], ((0, 0), (1, 0)))

    table = learned(methods.dpo(beta=beta), logp, reference, rollouts, steps=60, learning_rate=0.1)
    credit = lab.pick(judge, lambda one: one(jax.nn.log_softmax(table), reference))
    right = []
    for wrong in range(length):
        answer, credits = jnp.zeros((1, length), jnp.int32), []
        for t in range(length):
            at = lab.prefix_rows(answer, vocab)[0, t]
            token = jnp.where(t == wrong, jnp.argmin(advantage[at]), jnp.argmax(advantage[at]))
            credits.append(credit[at, token])
            answer = answer.at[0, t].set(token.astype(jnp.int32))
        right.append(jnp.argmin(jnp.stack(credits)) == wrong)
    return jnp.mean(jnp.stack(right).astype(jnp.float32))


def test_the_credit_of_tokens_that_dpo_implies_finds_the_token_that_was_wrong():
    """One token of a best answer is replaced by the worst one; the reference names the token that it finds unlikely."""

    def credit(policy, reference):
        return losses.implicit_reward(policy, reference, beta=0.5)

    def likelihood(policy, reference):
        return reference + 0 * policy

    found = lab.check("dpo-token-q", _errors_found, method=credit, baseline=likelihood, seeds=16, margin=0.05)
    assert found.method.mean() > 0.9

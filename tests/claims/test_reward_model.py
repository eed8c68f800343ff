"""Claims about reward models: how they are trained, and what becomes of a policy that is trained on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import advantages, losses, masked, methods, rewards
from tests.claims import lab


def fit(loss, params, *, steps, learning_rate):
    """Parameters after some steps of Adam."""
    optimizer = optax.adam(learning_rate)

    def step(carry, number):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, number), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


def test_ties_among_what_passed_take_the_shortcut_out_of_a_reward_model():
    # A shortcut that a tenth of what passed has, and nothing that failed. A policy can have three times as much of it,
    # without the quality.
    arms = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])

    def reward_model(tie_weight, key):
        keys = jax.random.split(key, 3)
        passed = jax.random.bernoulli(keys[0], 0.5, (40,))
        quality = passed + 0.5 * jax.random.normal(keys[1], (40,))
        shortcut = passed & jax.random.bernoulli(keys[2], 0.1, (40,))
        features = jnp.stack([quality, shortcut.astype(jnp.float32)], axis=1)
        label, pairs = losses.pass_pairs(passed)
        weight = pairs * jnp.where(label == 0.5, tie_weight, 1.0)

        def loss(w, _):
            r = features @ w
            return masked.mean(losses.bradley_terry(*jnp.broadcast_arrays(r[:, None], r[None, :]), label), weight)

        w = fit(loss, jnp.zeros(2), steps=150, learning_rate=0.1)
        scores = features @ w
        accuracy = masked.mean(scores[:, None] > scores[None, :], pairs & (label == 1))
        return w, accuracy, masked.std(scores, passed) / masked.std(scores, jnp.ones(40))

    def quality_after_training(tie_weight, key):
        w, *_ = reward_model(tie_weight, key)
        task = lab.Task(1, 4, 1, lab.by_sequence(arms @ w))
        trained = lab.train(task, methods.grpo(beta=0.0), key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 1)[0] @ arms[:, 0]

    lab.check("solireward", quality_after_training, method=1.0, baseline=0.0, seeds=16, margin=0.1)

    of_seeds = jax.jit(jax.vmap(reward_model, (None, 0)))
    keys = jax.random.split(jax.random.key(0), 16)
    (_, accuracy, spread), (_, plain_accuracy, plain_spread) = (of_seeds(weight, keys) for weight in (1.0, 0.0))
    assert np.mean(accuracy - plain_accuracy) > -0.02
    assert np.mean(spread) < 0.97 * np.mean(plain_spread)


def test_win_probabilities_against_an_anchor_make_progress_on_every_prompt():
    # Scores of answers to a prompt are known up to a constant of the prompt, which Bradley-Terry never sees; and
    # prompts differ in how much their answers do. The judge of pairs likes the first place.
    prompts, arms, bias = 8, 6, 1.0
    scale = jnp.exp(jnp.linspace(-1.0, 1.0, prompts))[:, None]

    def worst_progress(anchored, key):
        of_scores, of_prompts, of_training = jax.random.split(key, 3)
        scores = scale * jax.random.normal(of_scores, (prompts, arms))
        pointwise = scores + 3 * jax.random.normal(of_prompts, (prompts, 1))
        lead = scores - jnp.median(scores, axis=1, keepdims=True)
        shown = (jnp.stack([x + bias, jnp.zeros_like(x)], axis=-1) for x in (lead, -lead))
        table = jnp.where(anchored > 0, rewards.symmetric_win_probability(*shown), pointwise)
        task, method = lab.Task(prompts, arms, 1, lab.by_sequence(table)), methods.reinforce_plus_plus(beta=0.0)
        trained = lab.train(task, method, of_training, steps=60, group_size=4, optimizer=8.0)
        reached = jnp.sum(lab.probabilities(trained.params, 1) * scores, axis=1)
        start = jnp.mean(scores, axis=1)
        return jnp.min((reached - start) / (jnp.max(scores, axis=1) - start))

    lab.check("pairwise-rl", worst_progress, method=1.0, baseline=0.0, seeds=16, margin=0.2)


def test_discriminating_between_other_policies_makes_a_better_reward_model_of_few_preferences():
    # Policies are Markov chains, and a scorer is a bilinear form of the transitions of reference and candidate.
    vocab, length, pool, drawn = 3, 6, 8, 32
    sequences = np.array(np.unravel_index(np.arange(vocab**length), (vocab,) * length)).T
    counts = np.zeros((vocab**length, vocab**2), np.float32)
    for t in range(length - 1):
        np.add.at(counts, (np.arange(vocab**length), sequences[:, t] * vocab + sequences[:, t + 1]), 1)
    moves = jnp.asarray(counts)

    def nearer_to_the_target(pretrained, key):
        of_chains, of_answers, of_batches, of_start = jax.random.split(key, 4)
        chains = jax.nn.log_softmax(2.5 * jax.random.normal(of_chains, (pool + 2, vocab, vocab)))
        logp = chains.reshape(pool + 2, -1) @ moves.T - jnp.log(vocab)  # [chains, sequences]
        answers = moves[jax.random.categorical(of_answers, logp[:, None], shape=(pool + 2, drawn))]
        source = jnp.repeat(jnp.arange(pool), 2)

        def discrimination(form, number):
            two = jax.random.randint(jax.random.fold_in(of_batches, number), (pool, 2), 0, drawn)
            batch = answers[jnp.arange(pool)[:, None], two].reshape(2 * pool, -1)
            return losses.policy_discrimination((batch @ form @ batch.T)[None], source[None])[0]

        # Eight preferences for the target's answers over another policy's; the reference is the target's too.
        def preference(form, number):
            del number
            reference, better, worse = answers[-1, :8], answers[-1, 8:16], answers[-2, :8]
            score = lambda candidate: jnp.sum((reference @ form) * candidate, axis=1)  # noqa: E731
            return jnp.mean(losses.bradley_terry(score(better), score(worse)))

        form = 0.01 * jax.random.normal(of_start, (vocab**2, vocab**2))
        form = jnp.where(pretrained > 0, fit(discrimination, form, steps=150, learning_rate=0.02), form)
        form = fit(preference, form, steps=50, learning_rate=0.02)
        # Where training on the reward less the KL to the first policy ends, exactly.
        reached = jax.nn.log_softmax(jnp.mean(answers[-1, :8] @ form @ moves.T, axis=0))
        kl = jnp.sum(jnp.exp(reached) * (reached - logp[-1]))
        return jnp.mean(-jnp.log(vocab**length) - logp[-1]) - kl

    found = lab.check("polar", nearer_to_the_target, method=1.0, baseline=0.0, seeds=16)
    assert found.method.mean() > 2  # nats by which the policy comes nearer


def test_a_reward_model_that_learns_from_corrupted_right_answers_is_not_hacked():
    # One of six answers is right; a phrase that two wrong ones have is worth more to the reward model than being right.
    right, phrase = jnp.eye(6)[0], jnp.array([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    prompts, group = 4, 8
    rows = jnp.arange(prompts)[:, None]

    def accuracy(rate, key):
        def step(carry, key):
            logits, weights = carry
            of_answers, of_pairs, of_phrase = jax.random.split(key, 3)
            answers = jax.random.categorical(of_answers, logits[:, None], shape=(prompts, group))
            features = jnp.stack([right, phrase], axis=1)[answers]
            credit = advantages.grpo(jax.nn.sigmoid(features @ weights))
            gain = jax.grad(lambda x: jnp.mean(credit * jax.nn.log_softmax(x)[rows, answers]))(logits)

            # The other model writes a wrong answer, with the phrase in half of the cases.
            chosen, mask = losses.cooper_pairs(of_pairs, features[..., 0], jnp.ones(prompts))
            better = features[jnp.arange(prompts), chosen]
            worse = jnp.stack([jnp.zeros(prompts), jax.random.bernoulli(of_phrase, 0.5, (prompts,))], axis=1)
            loss = lambda w: masked.mean(losses.bradley_terry(better @ w, worse @ w), mask)  # noqa: E731
            return (logits + 2 * gain, weights - rate * jax.grad(loss)(weights)), None

        start = jnp.zeros((prompts, 6)), jnp.array([1.0, 1.5])
        (logits, _), _ = jax.lax.scan(step, start, jax.random.split(key, 100))
        return jnp.mean(jax.nn.softmax(logits) @ right)

    found = lab.check("cooper", accuracy, method=0.5, baseline=0.0, seeds=32, margin=0.3)
    assert found.baseline.mean() < 1 / 6  # of the first policy: the frozen model's reward went up, the accuracy down


def test_a_latent_inferred_from_eight_comparisons_tells_users_with_opposite_tastes_apart():
    # Users agree on one feature of an answer, and half of them like of another one what the others dislike.
    users, comparisons, size, hidden = 32, 16, 2, 16

    def data(key):
        of_taste, of_answers, of_labels = jax.random.split(key, 3)
        taste = jnp.where(jnp.arange(users) % 2 == 0, 1.0, -1.0) * jax.random.choice(of_taste, jnp.array([-1.0, 1.0]))
        answers = jax.random.normal(of_answers, (2, users, comparisons, 2))
        lead = answers[0] - answers[1]
        won = jax.random.bernoulli(of_labels, jax.nn.sigmoid(2 * lead[..., 0] + 4 * taste[:, None] * lead[..., 1]))
        return jnp.where(won[..., None], answers, answers[::-1]), taste

    def encode(params, pairs):
        own = jnp.tanh(jnp.concatenate(list(pairs[:, :, :8]), axis=-1) @ params["read"]) @ params["to_latent"]
        return jnp.split(jnp.clip(jnp.mean(own, axis=1), -1.0, 1.0), 2, axis=1)

    def scores(params, answers, latent):
        weights = params["all"] + latent @ params["of_latent"]
        return jnp.sum(answers * weights[:, None], axis=-1)

    def accuracy(personal, key):
        of_params, of_training, of_test = jax.random.split(key, 3)
        shapes = {"read": (4, hidden), "to_latent": (hidden, 2 * size), "of_latent": (size, 2)}
        keys = jax.random.split(of_params, len(shapes))
        params = {name: jax.random.normal(k, shapes[name]) / 2 for k, name in zip(keys, shapes, strict=True)}
        params["all"] = jnp.zeros(2)

        def loss(params, number):
            of_data, of_latent = jax.random.split(jax.random.fold_in(of_training, number))
            pairs, _ = data(of_data)
            mean, log_variance = encode(params, pairs)
            latent = personal * losses.draw_latent(of_latent, mean, log_variance)
            better, worse = (scores(params, answers[:, 8:], latent) for answers in pairs)
            weight = 1e-2 * losses.cyclical_annealing(number, period=50)
            return jnp.mean(losses.vpl(better, worse, mean, log_variance, kl_weight=weight))

        params = fit(loss, params, steps=150, learning_rate=0.03)
        pairs, taste = data(of_test)
        latent = personal * encode(params, pairs)[0]
        # New answers of equal merit but for the feature on which tastes differ.
        liked = jnp.zeros((users, 1, 2)).at[:, 0, 1].set(taste)
        return jnp.mean(scores(params, liked, latent) > scores(params, -liked, latent))

    found = lab.check("vpl", accuracy, method=1.0, baseline=0.0, seeds=16, margin=0.3)
    assert found.method.mean() > 0.9


def test_a_judge_that_saw_openers_as_wrong_answers_does_not_make_the_policy_collapse_to_them():
    # What a logistic judge sees: noisy overlap with the true answer, whether there is an opener, and the length. An
    # answer with an opener is more often right. The policy chooses a right answer, a wrong one, or an opener alone.
    def seen(key, right, with_opener, alone):
        of_overlap, of_length = jax.random.split(key)
        overlap = right + jax.random.normal(of_overlap, right.shape)
        length = 1 + 0.3 * jax.random.normal(of_length, right.shape)
        own, constant = (~alone).astype(jnp.float32), jnp.ones(right.shape)
        return jnp.stack([own * overlap, with_opener | alone, own * length, constant], axis=-1)

    def natural(key, size):
        of_right, of_opener, of_rest = jax.random.split(key, 3)
        right = jax.random.bernoulli(of_right, 0.5, (size,))
        with_opener = jax.random.uniform(of_opener, (size,)) < jnp.where(right, 0.9, 0.3)
        return seen(of_rest, right, with_opener, jnp.zeros(size, bool)), right

    def judge_weights(augmented, key):
        of_data, of_openers = jax.random.split(key)
        features, right = natural(of_data, 256)
        nothing = jnp.zeros(32, bool)
        features = jnp.concatenate([features, seen(of_openers, nothing, nothing, ~nothing)])
        labels = jnp.concatenate([right, nothing]).astype(jnp.float32)
        counts = jnp.concatenate([jnp.ones(256), augmented * jnp.ones(32)])
        loss = lambda w, _: masked.mean(losses.success_bce(features @ w, labels), counts)  # noqa: E731
        return fit(loss, jnp.zeros(4), steps=150, learning_rate=0.1)

    initial = jnp.log(jnp.array([0.1, 0.8, 0.1]))[None, None]

    def accuracy(augmented, key):
        weights = judge_weights(augmented, key)

        def judge(rollouts, key):
            chosen = rollouts.tokens[:, 1].reshape(rollouts.reward.shape)
            of_opener, of_rest = jax.random.split(key)
            right = chosen == 0
            with_opener = jax.random.uniform(of_opener, right.shape) < jnp.where(right, 0.9, 0.3)
            verdict = seen(of_rest, right, with_opener, chosen == 2) @ weights > 0
            return rollouts.replace(reward=verdict.astype(jnp.float32))

        task = lab.Task(4, 3, 1, judge, initial)
        trained = lab.train(task, methods.grpo(beta=0.0), key, steps=60, group_size=8, optimizer=1.0)
        return jnp.mean(lab.probabilities(trained.params, 1)[:, 0])

    lab.check("master-rm", accuracy, method=1.0, baseline=0.0, seeds=16, margin=0.3)

    def judged(augmented, key):
        weights = judge_weights(augmented, key)
        features, right = natural(jax.random.fold_in(key, 1), 1000)
        alone = jnp.array([0.0, 1.0, 0.0, 1.0])
        return alone @ weights > 0, rewards.cohen_kappa(features @ weights > 0, right)

    of_seeds = jax.jit(jax.vmap(judged, (None, 0)))
    keys = jax.random.split(jax.random.key(0), 16)
    (fooled, kappa), (plain_fooled, plain_kappa) = (of_seeds(augmented, keys) for augmented in (1.0, 0.0))
    assert np.mean(plain_fooled) > 0.8
    assert np.mean(fooled) < 0.1
    assert np.mean(kappa - plain_kappa) > -0.03


def test_a_judge_trained_with_the_listwise_reward_follows_principles_that_it_never_saw():
    # Answers have three properties, and a principle is what each of them is worth. The judge's scores have noise, which
    # it learns by, as from sampled replies.
    size, answers, lists, samples = 3, 4, 16, 8

    def data(key, principles):
        properties = jax.random.normal(key, (lists, answers, size))
        merit = jnp.einsum("lad,ld->la", properties, principles)
        return properties, jnp.clip(jnp.round(3 + merit), 1, 5)

    def tau(reads_principle, key):
        of_seen, of_new, of_training = jax.random.split(key, 3)
        seen = jax.random.normal(of_seen, (lists, size))

        def mean_scores(params, properties, principles):
            weights = params["all"] + reads_principle * principles @ params["by_principle"]
            return 3 + jnp.einsum("lad,ld->la", properties, weights)

        def loss(params, number):
            of_data, of_noise = jax.random.split(jax.random.fold_in(of_training, number))
            properties, consensus = data(of_data, seen)
            mean = mean_scores(params, properties, seen)[:, None]
            replies = jax.lax.stop_gradient(mean + 0.5 * jax.random.normal(of_noise, (lists, samples, answers)))
            scores, true = jnp.clip(replies, 1, 5), jnp.broadcast_to(consensus[:, None], replies.shape)
            reward = (rewards.order_accuracy(scores, true) + rewards.score_accuracy(scores, true)) / 2
            logp = -jnp.sum(jnp.square((replies - mean) / 0.5), axis=2) / 2
            return -jnp.mean(advantages.grpo(reward) * logp)

        params = {"all": jnp.zeros(size), "by_principle": jnp.zeros((size, size))}
        params = fit(loss, params, steps=150, learning_rate=0.03)
        of_principles, of_data = jax.random.split(of_new)
        new = jax.random.normal(of_principles, (lists, size))
        properties, consensus = data(of_data, new)
        return jnp.mean(rewards.kendall_tau(mean_scores(params, properties, new), consensus))

    lab.check("rewardanything", tau, method=1.0, baseline=0.0, seeds=16, margin=0.3)


def test_implicit_rewards_of_tokens_find_the_decisive_token_in_fewer_samples_than_the_outcome():
    # One of eight tokens decides. The implicit reward model has a table like the policy's and sees the same outcomes.
    prompts, group, length, vocab, beta, steps = 4, 4, 8, 4, 0.5, 80
    mask, reference = jnp.ones((prompts * group, length)), jnp.full((prompts * group, length), -jnp.log(vocab))

    def learned(with_process, key):
        def step(carry, key):
            policy, implicit = carry
            tokens = jax.random.categorical(key, policy[:, None], shape=(prompts, group, length))
            outcome = (tokens[..., 1] == 0).astype(jnp.float32)

            def logp(logits):
                rows = jnp.arange(prompts)[:, None, None]
                return jax.nn.log_softmax(logits)[rows, jnp.arange(length), tokens].reshape(-1, length)

            def cross_entropy(logits):
                return jnp.sum(
                    losses.implicit_outcome_bce(logp(logits), reference, outcome.reshape(-1), mask, beta=beta)
                )

            implicit = implicit - 0.2 * jax.grad(cross_entropy)(implicit)
            process = losses.implicit_reward(logp(implicit), reference, beta=beta)
            credit = advantages.prime(process, outcome, mask, process_weight=with_process)
            gain = jax.grad(lambda logits: jnp.sum(credit * logp(logits)))(policy)
            policy = policy + 0.3 * gain / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(gain))), 1e-8)
            return (policy, implicit), jnp.mean(jax.nn.softmax(policy[:, 1])[:, 0])

        start = jnp.zeros((2, prompts, length, vocab))
        (_, implicit), solved = jax.lax.scan(step, tuple(start), jax.random.split(key, steps))
        return solved, beta * (jax.nn.log_softmax(implicit) + jnp.log(vocab))

    def speed(with_process, key):
        solved, _ = learned(with_process, key)
        return -jnp.where(jnp.any(solved > 0.9), jnp.argmax(solved > 0.9), steps).astype(jnp.float32)

    lab.check("prime-implicit", speed, method=1.0, baseline=0.0, seeds=16, margin=2.0)

    _, rewards_of_tokens = jax.jit(jax.vmap(learned, (None, 0)))(1.0, jax.random.split(jax.random.key(0), 16))
    rewards_of_tokens = np.asarray(rewards_of_tokens)  # [seeds, prompts, length, vocab]
    assert rewards_of_tokens[:, :, 1, 0].min() > 0.1
    assert np.mean(rewards_of_tokens[:, :, 1, 0]) > 4 * np.mean(np.abs(np.delete(rewards_of_tokens, 1, axis=2)))


def test_a_baseline_description_takes_the_background_out_of_a_zero_shot_reward():
    # Four moves, of which those to the left lead to the goal. An encoder sees the place, and of every path also much
    # that has nothing to do with it, in directions of which the descriptions name one.
    vocab, length, size = 3, 4, 8
    moves = np.array(np.unravel_index(np.arange(vocab**length), (vocab,) * length)).T
    progress = jnp.asarray((moves == 0).mean(axis=1))
    place, scene = jnp.eye(size)[0], jnp.eye(size)[1]

    def reward_table(alpha, key):
        background = 1.5 * jax.random.normal(key, (vocab**length, size)).at[:, 0].set(0.0)
        seen = (2 * progress - 1)[:, None] * place + background
        return rewards.goal_similarity(seen, (place + scene)[None], (scene - place)[None], alpha=alpha)

    def success(alpha, key):
        of_table, of_training = jax.random.split(key)
        task = lab.Task(1, vocab, length, lab.by_sequence(reward_table(alpha, of_table)))
        method = methods.grpo(beta=0.0)
        trained = lab.train(task, method, of_training, steps=60, group_size=8, optimizer=2.0)
        return lab.probabilities(trained.params, length)[0] @ progress

    lab.check("vlm-rm", success, method=0.5, baseline=0.0, seeds=16, margin=0.05)

    keys = jax.random.split(jax.random.key(0), 16)
    tables = jax.jit(jax.vmap(reward_table, (None, 0)))
    distance = jax.jit(jax.vmap(lambda table: rewards.pearson_distance(table, progress)))
    far, near, nearest = (np.mean(distance(tables(alpha, keys))) for alpha in (0.0, 0.5, 1.0))
    assert nearest < near < far - 0.05


def test_a_reward_model_that_goes_on_learning_from_references_keeps_the_policy_near_them():
    # The policy is a Gaussian in the plane with a mean to learn, and references are of another one. A linear head first
    # learns to tell them from the first policy; frozen then, it is a reward that grows on and on in one direction.
    spread, target, warm_up, steps = 0.5, jnp.array([1.0, 0.5]), 50, 450

    def nearness(updates, key):
        def step(carry, given):
            mean, head = carry
            number, key = given
            of_references, of_samples = jax.random.split(key)
            real = target + spread * jax.random.normal(of_references, (64, 2))
            made = mean + spread * jax.random.normal(of_samples, (64, 2))

            def score(head, points):
                return points @ head[:2] + head[2]

            def loss(head):
                decay = 0.01 * jnp.sum(jnp.square(head))
                return losses.discriminator_hinge(score(head, real), score(head, made)) + decay

            its_turn = (number < warm_up) | losses.discriminators_turn(number, updates=updates)
            head = head - its_turn * 0.3 * jax.grad(loss)(head)
            credit = advantages.grpo(score(head, made).reshape(4, 16)).reshape(-1, 1)
            gain = jnp.mean(credit * (made - mean), axis=0) / spread**2
            policys_turn = (number >= warm_up) & (number % 2 == 1)
            return (mean + policys_turn * 0.02 * gain, head), jnp.linalg.norm(mean - target)

        start = jnp.zeros(2), jnp.zeros(3)
        _, distance = jax.lax.scan(step, start, (jnp.arange(steps), jax.random.split(key, steps)))
        return -jnp.mean(distance[-100:])

    found = lab.check("adv-grpo", nearness, method=1, baseline=0, seeds=16, margin=1.0)
    assert found.method.mean() > -0.5 * jnp.linalg.norm(target)  # of where it began


def test_traces_chosen_by_a_judge_of_thoughts_make_better_demonstrations_than_by_a_judge_of_responses():
    # A step of thought is one of twelve kinds, each of its own worth; half of the kinds are explorations, and thoughts
    # have a tone of their own that no response has. What is worthless in a thought is not found in the response.
    kinds, size, length, train, pool = 12, 8, 6, 64, 400

    def worth_of_demonstrations(aware, key):
        of_kinds, of_tone, of_worth, of_training, of_pool = jax.random.split(key, 5)
        kind = jax.random.normal(of_kinds, (kinds, size))
        kind = kind / jnp.linalg.norm(kind, axis=1, keepdims=True)
        tone = jax.random.normal(of_tone, (size,)) / size**0.5
        worth = jax.random.uniform(of_worth, (kinds,))

        def traces(key, number):
            of_steps, of_noise, of_rest, of_judge, of_success = jax.random.split(key, 5)
            steps = jax.random.randint(of_steps, (number, length), 0, kinds)
            noise, rest = (jax.random.normal(k, (number, length, size)) / size**0.5 for k in (of_noise, of_rest))
            thought = kind[steps] + (steps % 2)[..., None] * tone + 0.5 * noise
            good = worth[steps]
            response = good[..., None] * kind[steps] + (1 - good[..., None]) * rest
            quality = jnp.clip(good + 0.3 * jax.random.normal(of_judge, good.shape), 0, 1)
            success = jnp.mean(jax.random.bernoulli(of_success, jnp.mean(good, axis=1), (4, number)), axis=0)
            return steps, thought, response, quality, success

        _, thought, response, quality, success = traces(of_training, train)
        alignment, coherence = (
            rewards.step_alignment(thought, response),
            rewards.step_coherence(thought, thought[:8, 0]),
        )
        mixed = rewards.mixed_step_score(alignment, quality, coherence)
        seen = jnp.where(aware > 0, thought, response)
        targets = jnp.where(aware > 0, mixed, success[:, None])

        def judged(params, steps):
            return steps @ params["step"] + params["of_step"], jnp.mean(steps @ params["trace"], 1) + params["of_trace"]

        def loss(params, _):
            of_steps, of_traces = judged(params, seen)
            error = losses.trace_loss(of_steps, targets, jnp.ones(targets.shape), of_traces, success)
            return jnp.mean(error) + 1e-3 * sum(jnp.sum(jnp.square(x)) for x in params.values())

        start = {"step": jnp.zeros(size), "trace": jnp.zeros(size), "of_step": jnp.zeros(()), "of_trace": jnp.zeros(())}
        params = fit(loss, start, steps=150, learning_rate=0.03)
        steps, thought, *_ = traces(of_pool, pool)
        of_steps, of_traces = judged(params, thought)
        chosen = jnp.argsort(-rewards.trace_score(of_steps, jnp.ones(of_steps.shape), of_traces))[: pool // 10]
        # The likeliest policy of these demonstrations takes each kind of step as often as they do.
        return jnp.mean(worth[steps[chosen]])

    lab.check("reasonflux-prm", worth_of_demonstrations, method=1.0, baseline=0.0, seeds=32)


def test_an_ensemble_less_its_variance_finds_better_answers_than_one_model_in_best_of_512():
    # The truth is a random network; five smaller ones learn from the same 300 comparisons, a quarter of them flipped.
    size, comparisons, models, hidden = 16, 300, 5, 32

    def gold_of_the_best(ensemble, key):
        of_truth, of_data, of_flips, of_models, of_samples = jax.random.split(key, 5)
        of_first, of_last = jax.random.split(of_truth)
        first, last = jax.random.normal(of_first, (size, 32)), jax.random.normal(of_last, (32,))

        def gold(x):
            return jnp.tanh(x @ first * 2 / size**0.5) @ last

        x = jax.random.normal(of_data, (2, comparisons, size))
        won = jax.random.bernoulli(of_flips, 0.75, (comparisons,)) == (gold(x[0]) > gold(x[1]))
        better, worse = jnp.where(won[:, None], x, x[::-1])

        def score(params, x):
            return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]

        def learn(key):
            one, two = jax.random.split(key)
            start = {"in": jax.random.normal(one, (size, hidden)) / size**0.5, "bias": jnp.zeros(hidden)}
            start["out"] = jax.random.normal(two, (hidden,)) / hidden**0.5
            loss = lambda p, _: jnp.mean(losses.bradley_terry(score(p, better), score(p, worse)))  # noqa: E731
            params = fit(loss, start, steps=60, learning_rate=0.05)
            return params, score(params, x[0])

        params, usual = jax.vmap(learn)(jax.random.split(of_models, models))
        samples = jax.random.normal(of_samples, (1024, size))
        scores = jax.vmap(score, (0, None))(params, samples) - jnp.mean(usual, axis=1, keepdims=True)
        scores = scores / jnp.std(usual, axis=1, keepdims=True)
        reached = gold(samples)
        reached = (reached - jnp.mean(reached)) / jnp.std(reached)
        # Of the single models, what they reach on average.
        proxies = jnp.where(ensemble > 0, rewards.ensemble_reward(scores, combine="uncertainty"), scores)
        return jnp.mean(jax.vmap(lambda proxy: rewards.expected_best_of_n(proxy, reached, 512))(proxies))

    lab.check("rm-ensemble-wco-uwo", gold_of_the_best, method=1.0, baseline=0.0, seeds=12)


def test_a_density_ratio_ranks_the_better_the_further_its_models_are_apart_in_alignment():
    # Models of five degrees of alignment with a utility of answers, each with errors of its own; all share the habits
    # of their base, which the ratio takes out.
    answers, prompts = 16, 8

    def accuracy(weak, key):
        of_utility, of_base, of_errors = jax.random.split(key, 3)
        utility = jax.random.normal(of_utility, (prompts, answers))
        base = 3 * jax.random.normal(of_base, (prompts, answers))
        errors = jax.random.normal(of_errors, (5, prompts, answers))
        logp = jax.nn.log_softmax(base + jnp.arange(5)[:, None, None] * utility + errors)
        strong, weak = logp[4].reshape(-1, 1), logp[weak].reshape(-1, 1)
        ratio = rewards.density_ratio_reward(strong, weak, jnp.ones(strong.shape)).reshape(prompts, answers)
        first, second = jnp.triu_indices(answers, k=1)
        right = utility[:, first] > utility[:, second]
        one, other = ratio[:, first], ratio[:, second]
        better, worse = jnp.where(right, one, other), jnp.where(right, other, one)
        return rewards.pair_accuracy(better.reshape(-1), worse.reshape(-1))

    found = lab.check("cdr", accuracy, method=jnp.array(0), baseline=jnp.array(3), seeds=32, margin=0.1)
    key = jax.random.key(0)
    by_gap = [float(accuracy(weak, key)) for weak in (4, 3, 2, 1, 0)]
    assert by_gap[0] == 0.5
    assert by_gap == sorted(by_gap)
    assert found.method.mean() > 0.8

"""Random inputs of the fixtures, by seed; numpy alone, so that a later numpy or torch draws the same ones."""

import numpy as np

SEEDS = (0, 1)
P, G, T = 4, 3, 14


def inputs(seed):
    """Arrays of one case by name."""
    rng = np.random.default_rng(seed)
    rows = P * G
    lengths = rng.integers(5, T + 1, rows)
    lengths[0] = T
    mask = (np.arange(T) < lengths[:, None]).astype(np.float64)
    for row in range(0, rows, 2):
        start = rng.integers(1, lengths[row] - 2)
        mask[row, start : start + 2] = 0
    if seed == 1:
        mask[5] = 0
    logp = -rng.gamma(1.2, 0.8, (rows, T)) - 0.01
    old = np.minimum(logp + 0.25 * rng.standard_normal((rows, T)), -1e-3)
    far = rng.random((rows, T)) < 0.12
    old = np.where(far, np.minimum(logp + 1.5 * rng.standard_normal((rows, T)), -1e-3), old)
    # A ratio above 3 in a row whose reward, and hence whose advantage, is the lower one: verl's dual clip acts there.
    old[8] = np.where(np.arange(T) == np.argmax(mask[8] > 0), logp[8] - 1.5, old[8])
    sampler = np.minimum(old + 0.1 * rng.standard_normal((rows, T)), -1e-3)
    sampler = np.where(rng.random((rows, T)) < 0.08, np.minimum(old + rng.standard_normal((rows, T)), -1e-3), sampler)
    ref = np.minimum(logp + 0.3 * rng.standard_normal((rows, T)), -1e-3)
    rewards = rng.standard_normal((P, G))
    rewards[1] = 0.5
    rewards[2] = np.eye(G)[seed % G]
    rewards = np.where(mask.any(1).reshape(P, G), rewards, 0.0)  # a row without tokens has nowhere to put a reward
    second = rng.uniform(0, 1, (P, G))
    second[0] = 0.25
    valid = np.ones((P, G), bool)
    valid[-1, 1:] = False
    last = mask * (np.cumsum(mask[:, ::-1], 1)[:, ::-1] == 1)
    return {
        "mask": mask,
        "valid": valid,
        "rewards": rewards,
        "second_rewards": second,
        "greedy_rewards": rng.standard_normal(P),
        "outcome": last * rewards.reshape(-1, 1),
        "dense": np.where(mask > 0, 0.3 * rng.standard_normal((rows, T)), 0.0),
        "values": rng.standard_normal((rows, T)),
        "new_values": rng.standard_normal((rows, T)),
        "returns": rng.standard_normal((rows, T)),
        "logp": logp,
        "old": old,
        "sampler": sampler,
        "ref": ref,
        # Representable in float32, in which TRL compares entropies with their quantile.
        "entropy": rng.uniform(0.05, 3.0, (rows, T)).astype(np.float32).astype(np.float64),
        "sum_p_squared": np.exp(2 * old) + rng.uniform(0, 1, (rows, T)) * (1 - np.exp(old)) ** 2,
        # Advantages of tokens, so that losses are tested apart from where advantages come from.
        "advantages": mask * rng.standard_normal((rows, 1)),
        "token_advantages": mask * rng.standard_normal((rows, T)),
    }

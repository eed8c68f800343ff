"""Which losses a chunk of tokens may be given to, and which are refused."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_post import losses, masked
from jaxrl_post.kernels.token_logprob.independence import check_independent
from jaxrl_post.kernels.token_logprob.reference import TokenLogprob


def own_row(stats, aux):
    chosen = jnp.take_along_axis(aux["weights"], (aux["step"][:, None] > 0).astype(int), axis=1)[:, 0]
    return chosen * stats.logp + jax.nn.softplus(aux["weights"]).sum(-1) + jnp.cumsum(aux["weights"], 1)[:, -1]


def by_projection(stats, aux):
    return jax.nn.relu(aux["weights"] @ jnp.array([[1.0], [2.0]]))[:, 0] * stats.logp + jnp.sort(aux["weights"])[:, 0]


def with_branches(stats, aux):
    loss = jax.lax.cond(True, lambda: stats.logp**2, lambda: stats.logp)
    loop = jax.lax.fori_loop(0, 3, lambda i, x: x + i * aux["old"], loss)
    return jax.checkpoint(jnp.exp)(jnp.concatenate([loop[:, None], aux["weights"]], axis=1).mean(axis=1))


def table_lookup_and_custom_rule(stats, aux):
    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    return straight(stats.logp) * jax.lax.stop_gradient(aux["old"]) * jnp.array([1.0, 2.0, 3.0])[aux["step"]]


def stacked(stats, aux):
    return jax.nn.logsumexp(jnp.stack([stats.logp, aux["old"]]), axis=0) + jnp.select([aux["old"] > 0], [stats.logp])


INDEPENDENT = (own_row, by_projection, with_branches, table_lookup_and_custom_rule, stacked)


def of_this_library(stats, aux):
    policy = losses.ppo(stats.logp, aux["old"], aux["advantages"], dual_clip=3.0)
    reinforce = losses.reinforce(stats.logp, aux["advantages"]) + losses.nll(stats.logp)
    return policy + reinforce + sum(losses.kl(stats.logp, aux["old"], name) for name in ("k1", "k2", "k3", "abs"))


def check(function):
    def row(*rest, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, *rest), dtype)

    stats = TokenLogprob(logp=row(), entropy=row())
    aux = {"old": row(), "advantages": row(), "weights": row(2), "step": row(dtype=jnp.int32)}
    check_independent(function, (stats, aux), "loss_fn")


@pytest.mark.parametrize("function", [*INDEPENDENT, of_this_library])
def test_a_loss_of_each_token_by_itself_passes(function):
    check(function)


def test_the_size_of_another_axis_is_not_taken_for_that_of_the_tokens():
    wide = jax.ShapeDtypeStruct((1, 1009, 1013), jnp.float32)
    check_independent(lambda x: x.sum((1, 2)) + jnp.sort(x, axis=1)[:, 0, 0], (wide,), "loss_fn")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, a: s.logp * jnp.sum(s.logp), "mixes tokens: its `reduce_sum`"),
        (lambda s, a: s.logp - masked.mean(s.logp, jnp.ones_like(s.logp)), "mixes tokens: its `reduce_sum`"),
        (lambda s, a: masked.whiten(a["advantages"], a["old"]) * s.logp, "mixes tokens"),
        (lambda s, a: s.logp / jnp.max(a["old"]), "mixes tokens: its `reduce_max`"),
        (lambda s, a: jax.nn.softmax(s.logp), "mixes tokens: its `reduce_max`"),
        (lambda s, a: jnp.cumsum(s.logp), "mixes tokens: its `cumsum`"),
        (lambda s, a: jnp.roll(s.logp, 1), "mixes tokens"),
        (lambda s, a: jnp.sort(s.logp), "mixes tokens: its `sort`"),
        (lambda s, a: s.logp[::-1], "mixes tokens: its `rev`"),
        (lambda s, a: s.logp[a["step"]], "mixes tokens: its `gather`"),
        (lambda s, a: s.logp.at[0].set(0.0), "mixes tokens"),
        (lambda s, a: jnp.concatenate([s.logp[1:], s.logp[:1]]), "mixes tokens: its `slice`"),
        (lambda s, a: jnp.pad(s.logp[:-1], (1, 0)), "mixes tokens: its `slice`"),
        (lambda s, a: s.logp * (a["old"] @ a["advantages"]), "mixes tokens: its `dot_general`"),
        (lambda s, a: (s.logp[:, None] * a["old"]).sum(1), "mixes tokens"),
        (lambda s, a: s.logp * jnp.arange(s.logp.shape[0]), "mixes tokens: its `iota`"),
        (lambda s, a: a["weights"].reshape(2, -1)[0] * s.logp, "mixes tokens: its `reshape`"),
        (lambda s, a: jax.jit(lambda x: x - x.mean())(s.logp), "mixes tokens: its `reduce_sum`"),
        (lambda s, a: jax.lax.cond(True, jnp.cumsum, jnp.exp, s.logp), "mixes tokens: its `cumsum`"),
        (lambda s, a: jax.lax.scan(lambda c, x: (c + x, c), 0.0, s.logp)[1], "mixes tokens: its `scan`"),
        (lambda s, a: jax.random.normal(jax.random.key(0), s.logp.shape) * s.logp, "mixes tokens"),
        (lambda s, a: jnp.sum(s.logp), r"must return the losses \[n\] of n tokens, one float array, got .*shape=\(\)"),
        (lambda s, a: a["weights"], r"must return the losses \[n\].*shape=\(n, 2\)"),
        (lambda s, a: a["step"], r"must return the losses \[n\].*int32"),
        (lambda s, a: (s.logp, s.logp), r"must return the losses \[n\]"),
    ],
)
def test_a_loss_that_needs_more_than_the_token_itself_is_refused(function, message):
    with pytest.raises(ValueError, match=message) as raised:
        check(function)
    assert "take token_logprob" in str(raised.value)

import jax
import jax.numpy as jnp
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.supervised import positive_mask
from tests.advantages.compiled import all_compiled, compiled

losses = all_compiled(losses)
positive_mask = compiled(positive_mask)


def test_nll_is_the_negated_log_prob_in_float32_or_wider():
    assert losses.nll(jnp.array([[-1.5, 0.0]])).tolist() == [[1.5, 0.0]]
    assert losses.nll(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert losses.nll(jnp.ones((1, 2), jnp.float64)).dtype == jnp.float64
    with pytest.raises(ValueError, match="logp must be"):
        losses.nll(jnp.zeros(()))


def test_positive_nll_is_the_mean_over_the_tokens_of_right_sequences():
    # Rows of 2, 3 and 1 tokens; the first and last are right: (1 + 2 + 6) / 3.
    logp = -jnp.array([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0], [6.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    positive = positive_mask(jnp.array([1.0, 0.0, 0.5]), mask)
    assert positive.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert float(losses.aggregate(losses.nll(logp), positive, "token_mean")) == 3.0


def test_a_batch_without_right_sequences_has_no_positive_nll_and_no_gradient():
    logp, mask = -jnp.ones((2, 2)), jnp.ones((2, 2))

    def loss(logp, rewards):
        return losses.aggregate(losses.nll(logp), positive_mask(rewards, mask), "token_mean")

    value, gradient = jax.jit(jax.value_and_grad(loss))(logp, jnp.array([[0.0, -1.0]]))
    assert float(value) == 0
    assert gradient.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_positive_mask_wants_one_reward_per_row():
    assert positive_mask(jnp.array([[1.0, 2.0]]), jnp.ones((2, 1)), threshold=1.0).tolist() == [[0.0], [1.0]]
    with pytest.raises(ValueError, match="rewards must have one number per row of mask, 3"):
        positive_mask(jnp.ones((1, 2)), jnp.ones((3, 1)))

"""The Optax chain: what it keeps, and in which precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post.training.optimizers import make_optimizer

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}


def moved(updates=20, **options):
    """Parameters after updates by the same gradients, and the optimiser's state."""
    optimizer = make_optimizer(1e-2, max_grad_norm=None, **options)
    params, state = PARAMS, optimizer.init(PARAMS)
    for number in range(updates):
        one_sided = 1 + 0.5 * jnp.cos(number + jnp.arange(6.0))
        gradients = {"w": one_sided.reshape(3, 2), "b": one_sided[:2]}
        changes, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, changes)
    return params, state


@pytest.mark.parametrize(
    "options", [{"name": "adamw", "weight_decay": 0.1}, {"name": "adam"}, {"name": "sgd"}], ids=str
)
def test_a_mean_of_gradients_in_bfloat16_halves_its_memory_and_hardly_moves_the_parameters(options):
    wide, wide_state = moved(**options)
    narrow, narrow_state = moved(**options, mu_dtype="bfloat16")
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    kept = [sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) for state in (wide_state, narrow_state)]
    assert kept[0] - kept[1] == 2 * size
    # The mean of squares stays wide: it moves by a thousandth of the gradient's square.
    kinds = {x.dtype for x in jax.tree.leaves(narrow_state) if x.ndim}
    assert kinds == ({jnp.dtype("bfloat16")} if options["name"] == "sgd" else {jnp.dtype("bfloat16"), jnp.dtype("f4")})
    # An update rounds by at most 2**-9 of what is kept, and a mean with b1 = 0.9 forgets all but ten of them.
    for old, new in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_allclose(new, old, atol=10 * 2**-9 * float(jnp.max(jnp.abs(old))))


def test_a_type_for_a_momentum_that_is_not_kept_is_refused():
    with pytest.raises(ValueError, match="mu_dtype=bfloat16 does not apply to 'sgd' with b1=0"):
        make_optimizer(1e-2, name="sgd", b1=0.0, mu_dtype="bfloat16")

"""Agreement of chunks of actions, against numbers that were computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_tokens_agree_place_by_place_over_the_longer_chunk():
    tokens = jnp.array([[5, 7, 9, -1], [5, 7, 9, 2], [-1, -1, -1, -1], [1, 2, -1, -1]])
    reference = jnp.array([[5, 8, 9, 2], [5, 7, 9, 2], [-1, -1, -1, -1], [1, 2, -1, -1]])
    assert rewards.token_agreement(tokens, reference).tolist() == [0.5, 1.0, 0.0, 1.0]
    assert rewards.token_agreement(tokens[:1, :3], reference[:1]).tolist() == [0.5]
    with pytest.raises(ValueError, match="reference"):
        rewards.token_agreement(tokens, reference[:2])


def test_poses_and_grippers_agree_in_part_and_the_whole_is_the_papers():
    pose = jnp.array([[[0.1, 0.1], [0.5, 0.1]]])
    gripper = jnp.array([[1, 0]])
    found = rewards.trajectory_agreement(
        pose, jnp.zeros_like(pose), gripper, jnp.ones_like(gripper), alpha=2.0, beta=0.8
    )
    np.testing.assert_allclose(found, [0.64702], atol=1e-5)
    whole = rewards.chunk_reward(jnp.array([0.5, 0.5]), jnp.tile(found, 2), jnp.array([1, 0]))
    np.testing.assert_allclose(whole, [0.64410, 0.0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"), [({"alpha": -1.0, "beta": 0.5}, "alpha"), ({"alpha": 1.0, "beta": 2.0}, "beta")]
)
def test_numbers_out_of_range_are_refused(options, message):
    pose, gripper = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=message):
        rewards.trajectory_agreement(pose, pose, gripper, gripper, **options)
    with pytest.raises(ValueError, match="gripper"):
        rewards.trajectory_agreement(pose, pose, gripper[:, :1], gripper, alpha=1.0, beta=0.5)
    with pytest.raises(ValueError, match="token_weight"):
        rewards.chunk_reward(jnp.ones(1), jnp.ones(1), jnp.ones(1), token_weight=2.0)

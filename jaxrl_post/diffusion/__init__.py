"""Diffusion and flow policies: samplers whose steps have log-probs, credit of steps, and losses on noised samples."""

from jaxrl_post.diffusion.credit import calibrate_level, noise_weights, step_gains, turning_point_rewards
from jaxrl_post.diffusion.flow import flow_times, gaussian_logp, ode_step, sde_step
from jaxrl_post.diffusion.forward_process import flow_matching, gdro, nft, noised, optimality, reward_weights
from jaxrl_post.diffusion.policy import generate, score
from jaxrl_post.diffusion.preference import d3po, seppo
from jaxrl_post.diffusion.reward_difference import prdp
from jaxrl_post.diffusion.reward_direction import guided_reward
from jaxrl_post.diffusion.steering import best_candidate, edited, guided_mean

__all__ = [
    "best_candidate",
    "calibrate_level",
    "d3po",
    "edited",
    "flow_matching",
    "flow_times",
    "gaussian_logp",
    "gdro",
    "generate",
    "guided_mean",
    "guided_reward",
    "nft",
    "noise_weights",
    "noised",
    "ode_step",
    "optimality",
    "prdp",
    "reward_weights",
    "score",
    "sde_step",
    "seppo",
    "step_gains",
    "turning_point_rewards",
]

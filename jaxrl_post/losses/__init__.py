"""What to minimise: losses with one number per token, sequence or prompt, and the one function that reduces them."""

from jaxrl_post.losses.adversarial import discriminator_hinge, discriminators_turn, patch_reward, scorer_is_fooled
from jaxrl_post.losses.aggregation import aggregate, denominator
from jaxrl_post.losses.answer_preference import aot, apo_down, apo_zero, bco, kto, kto_anchor, nca, sppo
from jaxrl_post.losses.consistency import a2po, copg, flowrl, gvpo, opmd, optimal_value
from jaxrl_post.losses.constrained import barrier_weights, log_barrier, ratio_barrier
from jaxrl_post.losses.covariance import (
    EntropyLaw,
    clip_cov,
    clip_cov_tokens,
    entropy_change,
    fit_entropy_law,
    kl_cov,
    kl_cov_tokens,
    token_covariance,
)
from jaxrl_post.losses.decoupled_reward import drpo, length_weights
from jaxrl_post.losses.differential_information import differential_entropy, differential_information, optimal_rejected
from jaxrl_post.losses.discriminative import disco, kl_hinge, likelihood_ratio_score, log_likelihood_score
from jaxrl_post.losses.divergence_policy_gradient import divergence_reward, f_dpg, log_partition, running_log_partition
from jaxrl_post.losses.entropy import (
    adaptive_entropy_coefficient,
    entropy_change_by_percentile,
    entropy_overlap,
    top_entropy_mask,
)
from jaxrl_post.losses.first_token import first_token_weights
from jaxrl_post.losses.forward_kl import forward_kl, reweighted_logp
from jaxrl_post.losses.kl import KLEstimator, adaptive_kl_coefficient, kl
from jaxrl_post.losses.label_uncertainty import SmoothingRule, certainty, information_gain, uncertain_smoothing
from jaxrl_post.losses.latent_preference import cyclical_annealing, draw_latent, expected_win, gaussian_kl, vpl
from jaxrl_post.losses.mismatch import (
    effective_sample_size,
    importance_weights,
    mismatch_metrics,
    off_policy_sequence_mask,
    rejection_mask,
)
from jaxrl_post.losses.off_policy import dro, rec, rec_mask, topr
from jaxrl_post.losses.pairwise import p3o_joint, p3o_separate, ppg
from jaxrl_post.losses.policy import (
    clipped_high,
    clipped_low,
    clipped_region,
    importance_ratio,
    log_ratio,
    ppo,
    reinforce,
)
from jaxrl_post.losses.position_weights import position_weights
from jaxrl_post.losses.preference import discopop, dpo, exo, hinge, implicit_reward, ipo, robust_dpo
from jaxrl_post.losses.process import implicit_outcome_bce, success_bce, trace_loss
from jaxrl_post.losses.reference_free import cpo, log_odds, orpo, simpo
from jaxrl_post.losses.reward_model import (
    bradley_terry,
    cooper_pairs,
    pass_pairs,
    policy_discrimination,
    ranked_bradley_terry,
)
from jaxrl_post.losses.segments import cpl, cpl_ranked, segment_logp
from jaxrl_post.losses.self_play import dno, inpo, listwise
from jaxrl_post.losses.sequence_ratio import (
    gmpo,
    gspo,
    sequence_log_ratio,
    step_log_ratio,
    step_ppo,
    vespo,
    vespo_weight,
)
from jaxrl_post.losses.sparse_teacher import densify, sparse_kl, sparsify
from jaxrl_post.losses.supervised import Generator, f_sft, nll, positive_mask
from jaxrl_post.losses.surrogates import cispo, divergence_mask, dppo, sapo
from jaxrl_post.losses.token_guidance import token_guidance
from jaxrl_post.losses.token_regularization import t_reg, token_regularization, token_reward
from jaxrl_post.losses.trajectory_dpo import preference_pairs, trajectory_dpo
from jaxrl_post.losses.trust import decoupled_ppo, proximal_logp, second_moment_mask
from jaxrl_post.losses.value import value, value_clip_fraction
from jaxrl_post.losses.value_consistency import rover, rover_target, soft_q_multi_step, soft_q_single_step

__all__ = [
    "EntropyLaw",
    "Generator",
    "KLEstimator",
    "SmoothingRule",
    "a2po",
    "adaptive_entropy_coefficient",
    "adaptive_kl_coefficient",
    "aggregate",
    "aot",
    "apo_down",
    "apo_zero",
    "barrier_weights",
    "bco",
    "bradley_terry",
    "certainty",
    "cispo",
    "clip_cov",
    "clip_cov_tokens",
    "clipped_high",
    "clipped_low",
    "clipped_region",
    "cooper_pairs",
    "copg",
    "cpl",
    "cpl_ranked",
    "cpo",
    "cyclical_annealing",
    "decoupled_ppo",
    "denominator",
    "densify",
    "differential_entropy",
    "differential_information",
    "disco",
    "discopop",
    "discriminator_hinge",
    "discriminators_turn",
    "divergence_mask",
    "divergence_reward",
    "dno",
    "dpo",
    "dppo",
    "draw_latent",
    "dro",
    "drpo",
    "effective_sample_size",
    "entropy_change",
    "entropy_change_by_percentile",
    "entropy_overlap",
    "exo",
    "expected_win",
    "f_dpg",
    "f_sft",
    "first_token_weights",
    "fit_entropy_law",
    "flowrl",
    "forward_kl",
    "gaussian_kl",
    "gmpo",
    "gspo",
    "gvpo",
    "hinge",
    "implicit_outcome_bce",
    "implicit_reward",
    "importance_ratio",
    "importance_weights",
    "information_gain",
    "inpo",
    "ipo",
    "kl",
    "kl_cov",
    "kl_cov_tokens",
    "kl_hinge",
    "kto",
    "kto_anchor",
    "length_weights",
    "likelihood_ratio_score",
    "listwise",
    "log_barrier",
    "log_likelihood_score",
    "log_odds",
    "log_partition",
    "log_ratio",
    "mismatch_metrics",
    "nca",
    "nll",
    "off_policy_sequence_mask",
    "opmd",
    "optimal_rejected",
    "optimal_value",
    "orpo",
    "p3o_joint",
    "p3o_separate",
    "pass_pairs",
    "patch_reward",
    "policy_discrimination",
    "position_weights",
    "positive_mask",
    "ppg",
    "ppo",
    "preference_pairs",
    "proximal_logp",
    "ranked_bradley_terry",
    "ratio_barrier",
    "rec",
    "rec_mask",
    "reinforce",
    "rejection_mask",
    "reweighted_logp",
    "robust_dpo",
    "rover",
    "rover_target",
    "running_log_partition",
    "sapo",
    "scorer_is_fooled",
    "second_moment_mask",
    "segment_logp",
    "sequence_log_ratio",
    "simpo",
    "soft_q_multi_step",
    "soft_q_single_step",
    "sparse_kl",
    "sparsify",
    "sppo",
    "step_log_ratio",
    "step_ppo",
    "success_bce",
    "t_reg",
    "token_covariance",
    "token_guidance",
    "token_regularization",
    "token_reward",
    "top_entropy_mask",
    "topr",
    "trace_loss",
    "trajectory_dpo",
    "uncertain_smoothing",
    "value",
    "value_clip_fraction",
    "vespo",
    "vespo_weight",
    "vpl",
]

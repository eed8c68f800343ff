"""Methods by name: each function returns a `Method`, as `optax.adamw(...)` returns a transformation."""

from jaxrl_post.methods.actor_critic import ppo
from jaxrl_post.methods.agents import dr_mas, gigpo, hierarchical_grpo, rae
from jaxrl_post.methods.answer_preference import kto
from jaxrl_post.methods.chaining import chain
from jaxrl_post.methods.component_rewards import (
    base_and_bonus,
    fapo,
    gated_rewards,
    longrlvr,
    sweet_spot,
    trust_grpo,
    verified_score,
)
from jaxrl_post.methods.consistency import a2po, copg, flowrl, gvpo, kimi, p3o
from jaxrl_post.methods.constrained import c_morl
from jaxrl_post.methods.credit import Advantage, Credit, Signals
from jaxrl_post.methods.curated import observe_r1, pf_ppo, prof, reinforce_ada
from jaxrl_post.methods.distillation import kdrl, opd
from jaxrl_post.methods.divergence import disco, f_dpg
from jaxrl_post.methods.exploration import clip_cov, egpo, high_entropy_tokens, kl_cov, rapo
from jaxrl_post.methods.exploration_bonus import novelty_bonus
from jaxrl_post.methods.grounding import gui_g1
from jaxrl_post.methods.group_methods import (
    dr_grpo,
    gpg,
    maxrl,
    opo,
    pass_at_k,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)
from jaxrl_post.methods.improvement import pipo, policy_improvement
from jaxrl_post.methods.length_control import asymmetric_po, curriculum_grpo, drpo, hapo
from jaxrl_post.methods.multi_objective import gradient_weighting, hypervolume_weighting
from jaxrl_post.methods.multi_reward import bnpo, copo, gdpo, paco_grpo, riskpo
from jaxrl_post.methods.off_policy import nsr, rec, stable_reinforce, topr
from jaxrl_post.methods.online_preference import inpo, nash_md, online_dpo, spo
from jaxrl_post.methods.policy_gradient import grpo, mc_grpo, policy_gradient, reinforce
from jaxrl_post.methods.preference import cpo, dpo, orpo, rpo, simpo
from jaxrl_post.methods.progress import grpo_vps, igpo, pav
from jaxrl_post.methods.records import Record, catalog
from jaxrl_post.methods.self_critical import scst, subpo
from jaxrl_post.methods.shaped_rewards import grpo_care, harmo, par, verpo
from jaxrl_post.methods.soft_q import rlprompt, rover
from jaxrl_post.methods.steps import oprl, ppr_renorm, salt, srgpo, trajectory_preference
from jaxrl_post.methods.subgroups import hbpo, s_grpo
from jaxrl_post.methods.supervised import f_sft, sft
from jaxrl_post.methods.surrogates import cispo, dapo, decoupled_ppo, dppo, dro, gmpo, gspo, luspo, m2po, sapo, vespo
from jaxrl_post.methods.token_methods import otb, vapo
from jaxrl_post.methods.token_preference import cpl, tgdpo
from jaxrl_post.methods.token_rewards import comam, rto, t_reg, tw_grpo
from jaxrl_post.methods.truncated import t_ppo
from jaxrl_post.methods.uncertain_preference import upo
from jaxrl_post.methods.unverified import likelihood_reward, pr_clip_delta
from jaxrl_post.types import Method

__all__ = [
    "Advantage",
    "Credit",
    "Method",
    "Record",
    "Signals",
    "a2po",
    "asymmetric_po",
    "base_and_bonus",
    "bnpo",
    "c_morl",
    "catalog",
    "chain",
    "cispo",
    "clip_cov",
    "comam",
    "copg",
    "copo",
    "cpl",
    "cpo",
    "curriculum_grpo",
    "dapo",
    "decoupled_ppo",
    "disco",
    "dpo",
    "dppo",
    "dr_grpo",
    "dr_mas",
    "dro",
    "drpo",
    "egpo",
    "f_dpg",
    "f_sft",
    "fapo",
    "flowrl",
    "gated_rewards",
    "gdpo",
    "gigpo",
    "gmpo",
    "gpg",
    "gradient_weighting",
    "grpo",
    "grpo_care",
    "grpo_vps",
    "gspo",
    "gui_g1",
    "gvpo",
    "hapo",
    "harmo",
    "hbpo",
    "hierarchical_grpo",
    "high_entropy_tokens",
    "hypervolume_weighting",
    "igpo",
    "inpo",
    "kdrl",
    "kimi",
    "kl_cov",
    "kto",
    "likelihood_reward",
    "longrlvr",
    "luspo",
    "m2po",
    "maxrl",
    "mc_grpo",
    "nash_md",
    "novelty_bonus",
    "nsr",
    "observe_r1",
    "online_dpo",
    "opd",
    "opo",
    "oprl",
    "orpo",
    "otb",
    "p3o",
    "paco_grpo",
    "par",
    "pass_at_k",
    "pav",
    "pf_ppo",
    "pipo",
    "policy_gradient",
    "policy_improvement",
    "ppo",
    "ppr_renorm",
    "pr_clip_delta",
    "prof",
    "rae",
    "rapo",
    "rec",
    "reinforce",
    "reinforce_ada",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "riskpo",
    "rloo",
    "rlprompt",
    "rover",
    "rpo",
    "rto",
    "s_grpo",
    "salt",
    "sapo",
    "scst",
    "sft",
    "simpo",
    "spo",
    "srgpo",
    "stable_reinforce",
    "subpo",
    "sweet_spot",
    "t_ppo",
    "t_reg",
    "tgdpo",
    "topr",
    "trajectory_preference",
    "trust_grpo",
    "tw_grpo",
    "upo",
    "vapo",
    "verified_score",
    "verpo",
    "vespo",
]

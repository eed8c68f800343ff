"""Numbers of verl, out of its released code; see `make_fixtures`."""

import functools

import numpy as np
import torch
from drawn import SEEDS, G, P, inputs

VERL_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum")
VERL_CORRECTIONS = {
    # name: (rollout_is, rollout_is_threshold, rollout_is_batch_normalize, rollout_rs, rollout_rs_threshold)
    "token_tis": ("token", 1.5, False, None, None),
    "token_icepop": ("token", "0.7_1.4", False, None, None),
    "token_tis_normalized": ("token", 1.5, True, None, None),
    "sequence_tis": ("sequence", 1.5, False, None, None),
    "sequence_icepop": ("sequence", "0.7_1.4", False, None, None),
    "sequence_tis_normalized": ("sequence", 1.5, True, None, None),
    "token_k1": (None, 2.0, False, "token_k1", "0.8_1.3"),
    "token_k2": (None, 2.0, False, "token_k2", "0.02"),
    "token_k3": (None, 2.0, False, "token_k3", "0.02"),
    "seq_sum_k1": (None, 2.0, False, "seq_sum_k1", "0.8_1.3"),
    "seq_sum_k2": (None, 2.0, False, "seq_sum_k2", "0.2"),
    "seq_sum_k3": (None, 2.0, False, "seq_sum_k3", "0.2"),
    "seq_mean_k1": (None, 2.0, False, "seq_mean_k1", "0.95_1.04"),
    "seq_mean_k2": (None, 2.0, False, "seq_mean_k2", "0.02"),
    "seq_mean_k3": (None, 2.0, False, "seq_mean_k3", "0.02"),
    "seq_max_k2": (None, 2.0, False, "seq_max_k2", "0.2"),
    "seq_max_k3": (None, 2.0, False, "seq_max_k3", "0.2"),
    "tis_and_two_rejections": ("token", 1.5, False, "token_k1,seq_mean_k3", "0.6_1.6,0.04"),
}
# name: (loss_mode, loss_agg_mode, advantages, options of ActorConfig, options of PolicyLossConfig)
VERL_LOSSES = {
    **{f"vanilla_{mode}": ("vanilla", mode, "token_advantages", {}, {}) for mode in VERL_MODES},
    "vanilla_clips": (
        "vanilla",
        "token-mean",
        "advantages",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
        {},
    ),
    "dppo_tv": (
        "dppo_tv",
        "token-mean",
        "token_advantages",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 2.0},
        {},
    ),
    "dppo_kl": (
        "dppo_kl",
        "token-mean",
        "token_advantages",
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05, "clip_ratio_c": 2.0},
        {},
    ),
    "gspo": (
        "gspo",
        "seq-mean-token-mean",
        "advantages",
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04},
        {},
    ),
    "gspo_token_advantages": (
        "gspo",
        "seq-mean-token-mean",
        "token_advantages",
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04},
        {},
    ),
    "sapo": ("sapo", "seq-mean-token-mean", "token_advantages", {}, {}),
    "gpg": ("gpg", "token-mean", "token_advantages", {}, {}),
    "clip_cov": (
        "clip_cov",
        "token-mean",
        "token_advantages",
        {},
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 1.5},
    ),
    "kl_cov": ("kl_cov", "token-mean", "token_advantages", {}, {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.1}),
    "geo_mean": ("geo_mean", "token-mean", "advantages", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, {}),
    "dro": ("dro", "token-mean", "token_advantages", {}, {"dro_beta": 0.3}),
    "cispo": ("cispo", "token-mean", "token_advantages", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}, {}),
}
# What the whole actor loss adds: name: (entropy_coeff, kl_loss_coef, kl_loss_type)
VERL_ACTORS = {"plain": (0.0, 0.0, "low_var_kl"), "entropy_and_kl": (0.01, 0.05, "low_var_kl"), "k2": (0.0, 0.1, "k2")}
VERL_BYPASS = {
    "bypass_reinforce": {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.5},
    "bypass_ppo": {"loss_type": "ppo_clip", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.6"},
}


def tensor(x):
    """As a tensor of its own."""
    return torch.tensor(np.asarray(x))


class Case:
    """One case as verl sees it, without the rows that are not valid, and what is found of it by key."""

    def __init__(self, seed, rows, found):
        x = inputs(seed)
        self.rows = x["valid"].reshape(-1) if rows is None else rows
        self.x = {name: tensor(array[self.rows]) for name, array in x.items() if len(array) == P * G}
        self.x["greedy_rewards"] = tensor(np.repeat(x["greedy_rewards"], G)[self.rows])
        self.groups = {"response_mask": self.x["mask"], "index": np.repeat(np.arange(P), G)[self.rows]}
        self.seed, self.found = seed, found

    def keep(self, name, result):
        """Store rows in their places among those that were left out."""
        full = np.zeros((P * G, *result.shape[1:]))
        full[self.rows] = result.detach().numpy()
        self.found[f"{self.seed}/{name}"] = full

    def keep_number(self, name, number):
        self.found[f"{self.seed}/{name}"] = np.asarray(number)

    def keep_loss(self, name, function, at="logp"):
        """Store value and gradient of a function of log-probs."""
        at = self.x[at].clone().requires_grad_()
        value = function(at)
        value = value[0] if isinstance(value, tuple) else value
        self.keep_number(f"{name}/value", value.detach())
        self.keep(f"{name}/grad", torch.autograd.grad(value, at)[0])


def run():
    """All numbers of verl by key."""
    from verl.trainer.ppo import core_algos

    found = {}
    for seed in SEEDS:
        case = Case(seed, None, found)
        # Without the group of one: pass@k refuses it, and what whitens the batch would spread its raw score to all.
        several = Case(seed, np.repeat(inputs(seed)["valid"].sum(1) > 1, G), found)
        outcome_advantages(case, several)
        token_advantages(case)
        losses(case)
        corrections(case)
        actor_losses(several)
    controller = core_algos.AdaptiveKLController(0.1, 0.05, 1000)
    coefficients = []
    for kl, steps in ((0.2, 64), (0.05, 64), (0.055, 10), (0.0, 128), (-1.0, 128)):
        controller.update(kl, steps)
        coefficients.append(controller.value)
    found["adaptive_kl/coefficients"] = np.array(coefficients)
    return found


def outcome_advantages(case, several):
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn as estimator

    def keep(of, name, **options):
        function = estimator(name.removesuffix("_no_std"))
        result, _ = function(token_level_rewards=of.x["outcome"].clone(), **of.groups, **options)
        of.keep(f"advantage/{name}", result)

    for name in ("grpo", "rloo", "rloo_vectorized", "opo", "gpg"):
        keep(case, name)
    keep(case, "grpo_no_std", norm_adv_by_std_in_grpo=False)
    keep(case, "remax", reward_baselines=case.x["greedy_rewards"])
    for name in ("grpo_passk", "grpo_passk_no_std", "gdpo", "reinforce_plus_plus_baseline"):
        keep(several, name, config=AlgoConfig(norm_adv_by_std_in_grpo=not name.endswith("_no_std")))


def token_advantages(case):
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn as estimator

    x = case.x
    for name, gamma in {"reinforce_plus_plus": 1.0, "reinforce_plus_plus_discounted": 0.9}.items():
        config = AlgoConfig(gamma=gamma)
        result, _ = estimator("reinforce_plus_plus")(
            token_level_rewards=x["dense"], response_mask=x["mask"], config=config
        )
        case.keep(f"advantage/{name}", result)
    for name, gamma, lam in (("gae", 1.0, 1.0), ("gae_discounted", 0.97, 0.9)):
        advantages, returns = estimator("gae")(x["dense"], x["values"], x["mask"], gamma, lam)
        case.keep(f"advantage/{name}", advantages)
        case.keep(f"advantage/{name}_returns", returns)
    for tail in (True, False):
        for weights in (None, importance_weights(x)):
            result, _ = estimator("tir_optimal_token_baseline")(
                token_level_rewards=x["dense"],
                **case.groups,
                old_log_probs=x["old"],
                sum_pi_squared=x["sum_p_squared"],
                rollout_is_weights=weights,
                handle_zero_tail=tail,
                epsilon=1e-30,  # added to the sum of the energies; 1e-8 by default
            )
            name = f"otb{'_tail' if tail else ''}{'' if weights is None else '_weights'}"
            case.keep(f"advantage/{name}", result)


def importance_weights(x):
    return torch.exp(x["old"] - x["sampler"]).clamp(max=2.0)


def actor_config(policy_loss=None, **options):
    from verl.workers.config import ActorConfig, PolicyLossConfig

    policy_loss = PolicyLossConfig(**(policy_loss or {}))
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **options)


def losses(case):
    from verl.trainer.ppo import core_algos

    x = case.x

    def keep(name, mode, aggregation, advantages, config, weights=None):
        function = core_algos.get_policy_loss_fn(mode)
        given = {"loss_agg_mode": aggregation, "config": config, "rollout_is_weights": weights}
        case.keep_loss(f"loss/{name}", lambda logp: function(x["old"], logp, x[advantages], x["mask"], **given))

    for name, (mode, aggregation, advantages, options, policy) in VERL_LOSSES.items():
        keep(name, mode, aggregation, advantages, actor_config(policy, **options))
    keep("vanilla_weights", "vanilla", "token-mean", "token_advantages", actor_config(), importance_weights(x))
    config = actor_config()
    config.global_batch_info["loss_scale_factor"] = 40
    keep("vanilla_horizon", "vanilla", "seq-mean-token-sum-norm", "token_advantages", config)
    for name, correction in VERL_BYPASS.items():
        config = actor_config({"rollout_correction": correction})
        keep(name, "bypass_mode", "token-mean", "token_advantages", config)

    def mean_kl(kind, logp):
        return core_algos.agg_loss(core_algos.kl_penalty(logp, x["ref"], kind), x["mask"], "token-mean")

    for kind in ("k1", "abs", "k2", "k3", "k1+", "k3+", "abs+"):
        case.keep_loss(f"loss/kl_{kind}", functools.partial(mean_kl, kind))

    def value_loss(clip, values):
        return core_algos.compute_value_loss(values, x["returns"], x["values"], x["mask"], clip)

    for clip in (0.5, 0.2):
        case.keep_loss(f"value_loss/{clip}", functools.partial(value_loss, clip), at="new_values")
        case.keep_number(f"value_loss/{clip}/clip_fraction", value_loss(clip, x["new_values"])[1])


def corrections(case):
    from verl.trainer.ppo import rollout_corr_helper

    old, sampler, mask = (case.x[name] for name in ("old", "sampler", "mask"))
    for name, options in VERL_CORRECTIONS.items():
        proto, kept, _ = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(old, sampler, mask, *options)
        if proto is not None:
            case.keep(f"correction/{name}/weights", proto.batch["rollout_is_weights"])
        if "k" in name.split("_")[-1] or "rejections" in name:
            case.keep(f"correction/{name}/mask", kept)
    for name, number in rollout_corr_helper.compute_offpolicy_metrics(old, sampler, mask).items():
        case.keep_number(f"diagnostic/{name}", number)


def actor_losses(case):
    """`ppo_loss`, as the actor calls it: the policy's loss with entropy and KL, of GRPO's advantages."""
    from tensordict import TensorDict
    from verl.trainer.ppo import core_algos
    from verl.workers.utils import losses

    losses.no_padding_2_padding = lambda values, data: values
    x = case.x
    advantages, _ = core_algos.get_adv_estimator_fn("grpo")(token_level_rewards=x["outcome"], **case.groups)
    tensors = {
        "response_mask": x["mask"],
        "old_log_probs": x["old"],
        "advantages": advantages,
        "ref_log_prob": x["ref"],
    }

    class Data(TensorDict):  # a TensorDict holds tensors only; verl's also hold these
        def __getitem__(self, key):
            scalars = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
            return scalars[key] if key in scalars else super().__getitem__(key)

    def actor_loss(config, logp):
        given = {"log_probs": logp, "entropy": x["entropy"]}
        return losses.ppo_loss(config, given, Data(tensors, batch_size=len(logp)))

    for name, (entropy_coeff, kl_coef, kl_type) in VERL_ACTORS.items():
        config = actor_config(
            entropy_coeff=entropy_coeff, use_kl_loss=kl_coef > 0, kl_loss_coef=kl_coef, kl_loss_type=kl_type
        )
        case.keep_loss(f"actor/{name}", functools.partial(actor_loss, config))

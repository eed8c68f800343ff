"""Numbers of TRL, out of its released code; see `make_fixtures`."""

import types
from unittest.mock import MagicMock

import numpy as np
import torch
from drawn import SEEDS, G, P, T, inputs

TRL_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
MAX_COMPLETION_LENGTH = 20
# name: options of GRPOConfig beyond its defaults
TRL_LOSSES = {
    **{kind: {"loss_type": kind} for kind in TRL_TYPES},
    **{
        f"{kind}_sequence": {"loss_type": kind, "importance_sampling_level": "sequence", "epsilon": 0.03}
        for kind in ("grpo", "dapo", "luspo", "cispo", "sapo")
    },
    "two_bounds": {"epsilon": 0.1, "epsilon_high": 0.28},
    "delta": {"delta": 1.5},
    "cispo_high": {"loss_type": "cispo", "epsilon_high": 5.0},
    "cispo_one": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo_temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.6},
    "vespo_shapes": {
        "loss_type": "vespo",
        "vespo_k_pos": 1.5,
        "vespo_lambda_pos": 1.0,
        "vespo_k_neg": 2.5,
        "vespo_lambda_neg": 1.2,
    },
    "beta": {"beta": 0.05},
    "beta_plain": {"beta": 0.05, "use_bias_correction_kl": False},
    "beta_sequence": {"beta": 0.05, "importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.03},
    "beta_grpo": {"beta": 0.04, "loss_type": "grpo", "use_bias_correction_kl": False},
    "beta_luspo": {"beta": 0.05, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    "opsm": {"off_policy_mask_threshold": 0.02},
    "top_entropy": {"top_entropy_quantile": 0.2},
    "entropy_bonus": {"entropy_coef": 0.01},
    "entropy_bonus_of_top": {"entropy_coef": 0.01, "top_entropy_quantile": 0.4},
    **{
        f"vllm_{mode}": {
            "use_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.5,
        }
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
    "vllm_everything": {
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 1.4,
        "vllm_importance_sampling_clip_min": 0.7,
        "off_policy_mask_threshold": 0.02,
        "top_entropy_quantile": 0.5,
        "beta": 0.05,
    },
    "vllm_vespo_token_truncate": {
        "use_vllm": True,
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.5,
    },
    "vllm_vespo_token_mask": {
        "use_vllm": True,
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 1.5,
    },
}
# The same, from rewards to loss, with every row valid.
TRL_WHOLE = {
    "defaults": {},
    "grpo_beta": {"loss_type": "grpo", "beta": 0.04},
    "batch_std": {"scale_rewards": "batch", "epsilon_high": 0.28},
    "dr_grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.03},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "delta": {"delta": 1.5},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
    "top_entropy": {"top_entropy_quantile": 0.2},
    "entropy_bonus": {"entropy_coef": 0.01},
    "opsm": {"off_policy_mask_threshold": 0.02},
    "vllm": {"use_vllm": True},
    "vllm_token": {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
}
TRL_ADVANTAGES = {
    **{f"scale_{scale}": {"scale_rewards": scale} for scale in ("group", "batch", "none")},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
}
REWARD_WEIGHTS = (1.0, 0.5)
TRL_RLOO = {"plain": {"beta": 0.0}, "beta": {"beta": 0.05}, "normalized": {"beta": 0.0, "normalize_advantages": True}}


def tensor(x):
    """As a tensor of its own."""
    return torch.tensor(np.asarray(x))


def trainer(cls, config, x, options):
    """A stand-in for a TRL trainer: the attributes that its methods read, with the arrays of a case for a model."""
    from accelerate import Accelerator

    defaults = {field.name: field.default for field in config.__dataclass_fields__.values()}
    options = {**defaults, **options, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    self = types.SimpleNamespace(**options)
    self.args = types.SimpleNamespace(**options)
    self.num_iterations = 2  # above 1 the trainer computes the log-probs of the start of the step, which `old` is
    self.num_generations, self.max_completion_length = G, MAX_COMPLETION_LENGTH
    self.current_gradient_accumulation_steps = 1
    self.epsilon_low = options["epsilon"]
    self.epsilon_high = options["epsilon" if options["epsilon_high"] is None else "epsilon_high"]
    self._entropy_bonus_enabled = options.get("entropy_coef", 0.0) != 0.0
    self.aux_loss_enabled = self._is_vlm = self.log_multimodal = False
    self.use_vllm = options.get("use_vllm", False)
    self.environment_factories = self.environments = self.pad_to_multiple_of = None
    self.tools = []
    self.accelerator = Accelerator(cpu=True)
    self._tokenizer = types.SimpleNamespace(pad_token_id=0)
    self.processing_class = self._tokenizer
    self._metrics, self._logs = MagicMock(), MagicMock()
    self._pending_extra_logs, self._pending_metrics = {}, {}
    self.reward_weights = tensor(REWARD_WEIGHTS)
    self.reward_funcs = self.reward_func_names = ["first", "second"]
    self._calculate_rewards = lambda *a: rewards_per_function(x)
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(self, name, getattr(cls, name, None))
    if hasattr(cls, "get_high_entropy_mask"):
        self.get_high_entropy_mask = types.MethodType(cls.get_high_entropy_mask, self)

    lengths = lengths_of(x["mask"])
    rows, width = len(lengths), lengths.max()

    def up_to_last(array):
        return [row[:length].tolist() for row, length in zip(array, lengths, strict=True)]

    prompts, ids, texts = [[1]] * rows, [[1] * length for length in lengths], [""] * rows
    sampled = up_to_last(x["sampler"]) if self.use_vllm else None
    generated = prompts, ids, up_to_last(x["mask"]), texts, sampled, {}, None, []
    self._generate = lambda _: generated if cls.__name__ != "RLOOTrainer" else (prompts, ids, texts)
    self.model, self.ref_model = types.SimpleNamespace(training=True, is_gradient_checkpointing=False), "reference"
    self.trained = tensor(x["logp"][:, :width]).requires_grad_()

    def log_probs(model, *a, compute_entropy=False, **k):
        if compute_entropy:  # only the loss asks for it
            return self.trained, tensor(x["entropy"][:, :width]), None
        return tensor(x["ref" if model == "reference" else "old"][:, :width]), None, None

    self._get_per_token_logps_and_entropies = log_probs
    return self


def rewards_per_function(x):
    """`[B, 2]`; NaN where a row is not valid, and once where one of the functions alone could not score."""
    found = np.stack([x["rewards"].reshape(-1), x["second_rewards"].reshape(-1)], 1)
    found[~x["valid"].reshape(-1)] = np.nan
    found[1, 1] = np.nan
    return tensor(found)


def lengths_of(mask):
    """Tokens up to the last trained one; one for an empty row."""
    return np.where(mask.any(1), T - np.argmax(mask[:, ::-1] > 0, 1), 1)


def padded(array):
    """`[B, T]`: TRL cuts what is padding in every row."""
    return np.pad(array, ((0, 0), (0, T - array.shape[1])))


def scored(cls, config, x, options):
    """The stand-in after it scored its completions, and the batch that it hands to its loss."""
    self = trainer(cls, config, x, options)
    method = cls._generate_and_score_completions
    return self, getattr(method, "__wrapped__", method)(self, [{"prompt": ""}] * (P * G))


def loss(cls, self, batch):
    value = cls._compute_loss(self, self.model, batch)
    grad = torch.autograd.grad(value, self.trained)[0]
    return {"value": value.detach().numpy(), "grad": padded(grad.numpy())}


def run():
    """All numbers of TRL by key."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    found = {}

    def keep(key, numbers):
        found.update({f"{key}/{part}": array for part, array in numbers.items()})

    for seed in SEEDS:
        x = inputs(seed)
        everything = {**x, "valid": np.ones((P, G), bool)}
        for name, options in TRL_ADVANTAGES.items():
            _, batch = scored(GRPOTrainer, GRPOConfig, x, options)
            found[f"{seed}/advantage/{name}"] = batch["advantages"].numpy()
        for name, options in TRL_LOSSES.items():
            self, batch = scored(GRPOTrainer, GRPOConfig, x, options)
            keep(f"{seed}/loss/{name}", loss(GRPOTrainer, self, batch))
            if "importance_sampling_ratio" in batch:
                ratio = batch["importance_sampling_ratio"].expand_as(self.trained)
                found[f"{seed}/correction/{name}"] = padded(ratio.numpy())
        for name, options in {"gmpo": {}, "gmpo_beta": {"beta": 0.05}}.items():
            self, batch = scored(GMPOTrainer, GMPOConfig, x, {"epsilon": 0.4, **options})
            keep(f"{seed}/loss/{name}", loss(GMPOTrainer, self, batch))
        for name, options in TRL_WHOLE.items():
            self, batch = scored(GRPOTrainer, GRPOConfig, everything, options)
            keep(f"{seed}/whole/{name}", loss(GRPOTrainer, self, batch))
        # This trainer knows no tool tokens: its mask has no holes.
        whole_rows = (np.arange(T) < lengths_of(x["mask"])[:, None]).astype(np.float64)
        found[f"{seed}/rloo/mask"] = whole_rows
        for name, options in TRL_RLOO.items():
            self, batch = scored(RLOOTrainer, RLOOConfig, {**x, "mask": whole_rows}, options)
            keep(f"{seed}/rloo/{name}", {"advantages": batch["advantages"].numpy(), **loss(RLOOTrainer, self, batch)})
    return found

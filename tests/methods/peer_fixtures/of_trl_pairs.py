"""Losses on pairs of TRL, out of its released code; see `make_fixtures`.

A pair is two neighbouring rows of the case, the first one chosen. What is stored of a loss is its mean over pairs and
the gradient with respect to the log-probs of the tokens.
"""

import types
from collections import defaultdict
from unittest.mock import MagicMock

import numpy as np
import torch
from constants import BETA, LABEL_SMOOTHING
from drawn import SEEDS, inputs

NAMES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


def tensor(x):
    """As a tensor of its own."""
    return torch.tensor(np.asarray(x))


def dpo(x, names, weights):
    """The weighted sum of losses of `DPOTrainer`."""
    from accelerate import Accelerator
    from trl import DPOTrainer

    order = np.r_[0 : len(x["mask"]) : 2, 1 : len(x["mask"]) : 2]  # TRL has all chosen ones first
    mask = x["mask"][order]
    logp = tensor(x["logp"] * x["mask"])[order].requires_grad_()

    def outputs(log_probs):
        nothing = torch.zeros_like(log_probs)
        return types.SimpleNamespace(
            **dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), nothing),
            log_probs=log_probs,
            is_top1=nothing.bool(),
        )

    model = MagicMock(training=True, return_value=outputs(logp * tensor(mask)))
    self = types.SimpleNamespace(
        model=model,
        ref_model=MagicMock(return_value=outputs(tensor(x["ref"][order] * mask))),
        accelerator=Accelerator(cpu=True),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        beta=BETA,
        label_smoothing=LABEL_SMOOTHING,
        loss_types=names,
        loss_weights=weights,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    with_prompt = np.pad(mask, ((0, 0), (1, 0)))  # whose log-probs TRL leaves out
    batch = {
        "completion_mask": tensor(with_prompt).long(),
        "input_ids": torch.ones(with_prompt.shape, dtype=torch.long),
        "attention_mask": torch.ones(with_prompt.shape, dtype=torch.long),
    }
    value = DPOTrainer._compute_loss(self, model, batch, False)
    grad = np.zeros(mask.shape)
    grad[order] = torch.autograd.grad(value, logp)[0].numpy()
    return {"value": value.detach().numpy(), "grad": grad}


def without_reference(x):
    """CPO and the odds ratio of ORPO, of sequences' log-probs, `[B / 2]`; ORPO's are means."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    accelerator = types.SimpleNamespace(device="cpu")
    total = (x["logp"] * x["mask"]).sum(1)
    mean = total / np.maximum(x["mask"].sum(1), 1)
    common = {"beta": BETA, "label_smoothing": LABEL_SMOOTHING, "alpha": 0.0, "accelerator": accelerator}
    cpo = types.SimpleNamespace(**common, loss_type="sigmoid")
    simpo = types.SimpleNamespace(**common, loss_type="simpo", simpo_gamma=0.5)
    simpo.label_smoothing = 0.0
    return {
        "cpo": CPOTrainer.cpo_loss(cpo, tensor(total[::2]), tensor(total[1::2]))[0].numpy(),
        "simpo": CPOTrainer.cpo_loss(simpo, tensor(mean[::2]), tensor(mean[1::2]))[0].numpy(),
        # In float32, whatever it is given.
        "orpo_odds": ORPOTrainer.odds_ratio_loss(cpo, tensor(mean[::2]), tensor(mean[1::2]))[0].numpy(),
    }


def run():
    """All numbers of TRL by key."""
    found = {}
    for seed in SEEDS:
        x = inputs(seed)
        for name in NAMES:
            found.update({f"{seed}/{name}/{part}": array for part, array in dpo(x, [name], [1.0]).items()})
        several = dpo(x, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
        found.update({f"{seed}/several/{part}": array for part, array in several.items()})
        found.update({f"{seed}/{name}": array for name, array in without_reference(x).items()})
    return found

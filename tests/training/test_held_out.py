"""The loss on held-out completions and pairs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, losses, models
from jaxrl_post.training import config as configs
from jaxrl_post.training import inference, loop, setup
from jaxrl_post.training.held_out import HeldOutLoss
from tests.training.test_setup import SMALL

TRAIN = [{"prompt": f"q{n}", "answer": "ab", "chosen": "a", "rejected": "b"} for n in range(8)]
HELD_OUT = [{"prompt": f"z{n}", "answer": "b" * n, "chosen": "a" * n, "rejected": "ba"} for n in range(5)]


def values(tmp_path, method, **sections):
    files = {}
    for name, rows in (("files", TRAIN), ("eval_files", HELD_OUT)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = [str(path)]
    kind = {"kind": "prompt"} if method == "sft" else {}
    return {
        "run_dir": str(tmp_path / "run"),
        "data": {"max_prompt_length": 3, "alphabet": "abqz0123456789", **files, **kind},
        "rewards": [],
        "rollout": {"max_new_tokens": 6},
        "model": {**SMALL, "init_std": 0.3},
        "method": {"name": method},
        # Five problems in batches of two: one place of the last does not count.
        "training": {"steps": 1, "batch_size": 4, "micro_batches": 2, "optimizer": {"learning_rate": 1e-3}},
        **sections,
    }


def given(parts, *names):
    """All held-out problems at once, and the score of the model."""
    problems = parts.problems.held_out_given
    rollouts = data.to_rollouts(
        [data.encode_prompt(parts.tokenizer, problem) for problem in problems],
        [[data.encode_completion(parts.tokenizer, problem, name) for name in names] for problem in problems],
        length=9,
    )
    score = models.score(parts.policy)
    return rollouts, lambda params: score(params, rollouts, frozenset({"logp"}), jax.random.key(0)).logp


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}], ids=["one device", "four devices"])
def test_the_loss_of_pairs_is_that_of_all_of_them_at_once(mesh, tmp_path):
    parts = setup.build(configs.from_dict(values(tmp_path, "dpo", mesh=mesh)))
    params = {role: parts.policy.init(jax.random.key(n)) for n, role in enumerate(("policy", "reference"))}
    found = HeldOutLoss(parts, parts.stages[0])(params, ())
    rollouts, logp = given(parts, "chosen", "rejected")
    sums = [jnp.sum(logp(params[role]) * rollouts.mask, axis=1).reshape(5, 2) for role in ("policy", "reference")]
    margin = 0.1 * jnp.diff(sums[1] - sums[0], axis=1)[:, 0]
    np.testing.assert_allclose(found["eval/loss"], jnp.mean(jax.nn.softplus(-margin)), rtol=1e-5)
    np.testing.assert_allclose(found["eval/rewards/margins"], jnp.mean(margin), rtol=1e-4, atol=1e-6)
    assert found["eval/rewards/accuracies"] == pytest.approx(float(jnp.mean(margin > 0)))


def test_the_loss_of_completions_counts_every_token_once(tmp_path):
    config = configs.from_dict(values(tmp_path, "sft"))
    parts = setup.build(config)
    params = parts.policy.init(jax.random.key(0))
    rollouts, logp = given(parts, "answer")
    expected = losses.aggregate(-logp(params), rollouts.mask, "token_mean")
    assert HeldOutLoss(parts, parts.stages[0])({"policy": params}, ())["eval/loss"] == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_trained_run_is_evaluated_to_the_loss_that_it_logged(method, tmp_path):
    loop.run(configs.from_dict(values(tmp_path, method)))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name: pytest.approx(value, rel=1e-6) for name, value in row.items() if name.startswith("eval/")}
    assert "eval/loss" in logged
    (tmp_path / "files.jsonl").unlink()  # what it was trained on need not be there
    assert inference.evaluate_run(tmp_path / "run") == logged


def test_what_is_sampled_has_no_held_out_loss(tmp_path):
    config = values(tmp_path, "grpo", rewards=[{"name": "exact_match"}])
    config["training"].pop("batch_size")
    parts = setup.build(configs.from_dict(config))
    assert HeldOutLoss(parts, parts.stages[-1])({}, ()) == {}

"""Runs whose completions an inference server samples: one that answers with the policy that it was given last."""

import contextlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.cli.main import main
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.training import config as configs
from jaxrl_post.training import loop, setup
from jaxrl_post.types import FINISH_STOP
from tests.servers import running
from tests.training import runs

LONGEST, NEW, G = 5, 3, 4
ROLLOUT = {"group_size": G, "prompts": 4, "max_new_tokens": NEW}
METHOD = {"name": "grpo", "old_logp": "recompute", "correction": "tis"}
ALONE = {"warm_start": None, "eval": {"problems": 0}}


class Stand:
    """What vLLM does of what is asked of it: sample `n` completions of a prompt, and read weights."""

    def __init__(self, stop):
        self.stop, self.loaded, self.lock = stop, None, threading.Lock()

    def read(self, directory):
        self.loaded = models.from_pretrained(directory)
        policy = self.loaded.policy

        @jax.jit
        def sample(params, tokens, length, seed):
            sampling = SamplingParams(stop_tokens=(self.stop,))
            prompt = Prompts(tokens[None], length[None])
            return generate(
                policy, params, prompt, jax.random.key(seed), sampling=sampling, max_new_tokens=NEW, group_size=G
            )

        self.sample = sample

    def __call__(self, number, path, body):
        with self.lock:
            if path == "/collective_rpc":
                self.read(body["kwargs"]["weights_path"])
                return {"results": [None]}
            if path == "/reset_prefix_cache":
                return 200, b""
            assert path == "/v1/completions"
            prompt = body["prompt"]
            padded = jnp.asarray(np.pad(prompt, (0, LONGEST - len(prompt))))
            out = self.sample(self.loaded.params, padded, jnp.asarray(len(prompt)), body["seed"])
            return {"choices": [self.choice(out, g, len(prompt)) for g in range(body["n"])]}

    def choice(self, out, g, begin):
        places = slice(begin, int(out.length[0, g]))
        ended = int(out.finish[0, g]) == FINISH_STOP
        logp = {"token_logprobs": np.asarray(out.logp[g, places]).tolist()}
        reason = "stop" if ended else "length"
        return {"index": g, "finish_reason": reason, "token_ids": out.tokens[g, places].tolist(), "logprobs": logp}


@contextlib.contextmanager
def run_of(tmp_path, server=None, rollout=None, **changes):
    """A configuration whose server is running, and what that is asked."""
    changes = {"method": METHOD, **changes}
    parts = setup.build(configs.load(runs.tiny_run(tmp_path, **changes)))
    stand = Stand(parts.stop_tokens[0])
    with running(stand) as (url, log):
        options = {"url": f"{url}/v1", "weights": str(tmp_path / "weights"), **(server or {})}
        yield runs.tiny_run(tmp_path, rollout={**ROLLOUT, "server": options, **(rollout or {})}, **changes), log


def asked(log, path):
    return [one for one in log if one["path"] == path]


def test_a_server_samples_with_the_policy_of_each_step_and_a_run_that_was_cut_goes_on(tmp_path):
    with run_of(tmp_path, warm_start=None) as (path, log):
        loop.run(configs.load(path, ["training.steps=2"]))
        assert len(asked(log, "/v1/completions")) == 2 * 4
        assert len(asked(log, "/collective_rpc")) == 2
        loop.run(configs.load(path, ["training.steps=4"]))
        assert len(asked(log, "/v1/completions")) == 4 * 4
        assert len(asked(log, "/collective_rpc")) == 4
    rows = [row for row in runs.lines(tmp_path / "run") if row.get("stage") == "grpo" and "reward" in row]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    for row in rows:
        # What it says of a token is what the trained model says: it has that model, in the same precision.
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["completions/stale_ratio"] == 0.0
        assert "entropy" not in row
    assert any("eval/accuracy" in row for row in runs.lines(tmp_path / "run"))  # measured here, not there


def test_with_updates_now_and_then_tokens_are_of_older_policies_and_are_known_as_such(tmp_path):
    with run_of(tmp_path, {"every": 3}, **ALONE) as (path, log):
        loop.run(configs.load(path, ["training.steps=4"]))
        assert len(asked(log, "/collective_rpc")) == 2
    rows = runs.lines(tmp_path / "run")
    assert [row["completions/stale_ratio"] for row in rows] == [0.0, 1.0, 1.0, 0.0]
    differences = [row["sampling/sampling_logp_difference/max"] for row in rows]
    assert differences[0] < 1e-4
    assert differences[2] > 1e-3  # two updates at a learning rate of 0.01


def test_budgets_give_the_members_of_a_group_prompts_of_their_own(tmp_path):
    budgets = {"budgets": [2, None], "budget_prompt": "{budget}"}
    with run_of(tmp_path, rollout=budgets, **ALONE) as (path, log):
        loop.run(configs.load(path, [f"data.max_prompt_length={LONGEST}", "training.steps=1"]))
    bodies = [one["body"] for one in asked(log, "/v1/completions")]
    assert sorted(len(body["prompt"]) for body in bodies) == [3] * 4 + [4] * 4
    assert {body["n"] for body in bodies} == {2}


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"server": {"url": "localhost:8000"}}, "rollout.server: .* must begin with http:// or https://"),
        ({"server": {"url": "http://x/v1", "log_probs": "tempered"}}, "of kind 'vllm' must be one of raw, processed"),
        ({"server": {"url": "http://x/v1"}, "ahead": True}, "rollout.ahead.* rollout.server samples whole completions"),
        ({"server": {"url": "http://x/v1"}, "tokens_per_step": 2}, "rollout.tokens_per_step.* rollout.server"),
        ({"server": {"url": "http://x/v1", "every": 2}}, "rollout.server.every.* keeps its weights"),
        (
            {"server": {"url": "http://x/v1"}, "sampling": {"temperature": 0.7}},
            "raw log-probs are those at temperature 1, .* --logprobs-mode processed_logprobs",
        ),
        ({"server": {"url": "http://x/v1", "api_key": "NO_SUCH_KEY"}}, "environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_what_a_server_cannot_do_is_said_before_anything_is_sampled(tmp_path, rollout, message, capsys):
    path = runs.tiny_run(tmp_path, rollout={**ROLLOUT, **rollout}, warm_start=None)
    assert main(["train", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_server_that_refuses_new_weights_stops_the_run_and_says_how_to_start_it(tmp_path, capsys):
    with running(lambda number, path, body: (404, b'{"detail": "Not Found"}')) as (url, _):
        server = {"url": f"{url}/v1", "weights": str(tmp_path / "weights")}
        path = runs.tiny_run(tmp_path, rollout={**ROLLOUT, "server": server}, **ALONE)
        assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"collective_rpc refused .* 404.*VLLM_SERVER_DEV_MODE=1", said)
    assert "Traceback" not in said

"""Time and memory of log-probs of tokens and of a policy-gradient loss on them, beside other ways to get them.

    python -m tests.benchmarks.token_logprob [--tokens N] [--width D] [--vocabulary V] [--dtype bfloat16] [--rounds R]

Contenders take turns, so that what else the machine does falls on all of them; medians are printed, and their ratio to
the plain form: all logits at once, differentiated by JAX. Memory is the compiler's count of temporary bytes, and on an
accelerator that reports it the peak while running. Runs on whatever device JAX has.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_post.kernels import token_logprob, token_loss
from jaxrl_post.losses import ppo

Contender = Callable[..., Any]


def all_logits(hidden, unembedding, targets):
    """What Optax offers: cross-entropy of logits that are all there."""
    logits = jnp.einsum("nd,vd->nv", hidden, unembedding, preferred_element_type=jnp.float32)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def scan_over_tokens(hidden, unembedding, targets, chunk: int = 256):
    """The structure of Tunix's chunked log-probs: a scan over tokens, rematerialised, differentiated by JAX."""

    @jax.checkpoint
    def body(_, some):
        return None, all_logits(some[0], unembedding, some[1])

    pieces = (hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk))
    return jax.lax.scan(body, None, pieces)[1].reshape(-1)


def ours(hidden, unembedding, targets, implementation=None):
    return token_logprob(hidden, unembedding, targets, implementation=implementation).logp


def contenders() -> dict[str, dict[str, Contender]]:
    """By task, then by name; the first of each task is what the others are compared with."""
    logps = {
        "plain": functools.partial(ours, implementation="reference"),
        "optax, all logits": all_logits,
        "scan over tokens with remat": scan_over_tokens,
        "token_logprob chunked": functools.partial(ours, implementation="chunked"),
    }
    if jax.default_backend() == "tpu":
        logps["token_logprob pallas_tpu"] = functools.partial(ours, implementation="pallas_tpu")

    def objective(logp, hidden, unembedding, targets, old_logp, advantages):
        return jnp.mean(ppo(logp(hidden, unembedding, targets), old_logp, advantages))

    def in_one_pass(hidden, unembedding, targets, old_logp, advantages):
        total, _ = token_loss(
            hidden,
            unembedding,
            targets,
            (old_logp, advantages),
            lambda stats, aux: ppo(stats.logp, *aux),
        )
        return total / targets.shape[0]

    training = {name: functools.partial(objective, logp) for name, logp in logps.items()}
    training["token_loss"] = in_one_pass
    return {
        "forward": {name: lambda h, w, y, old, a, f=logp: f(h, w, y) for name, logp in logps.items()},
        "forward and backward": {name: jax.value_and_grad(loss, argnums=(0, 1)) for name, loss in training.items()},
    }


def arguments(tokens: int, width: int, vocabulary: int, dtype: str) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (tokens, width), dtype),
        (jax.random.normal(keys[1], (vocabulary, width)) / width**0.5).astype(dtype),
        jax.random.randint(keys[2], (tokens,), 0, vocabulary),
        -5.0 + jax.random.normal(keys[3], (tokens,)),
        jax.random.normal(keys[4], (tokens,)),
    )


def run(tokens: int, width: int, vocabulary: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """One record for each task and contender."""
    device = jax.devices()[0]
    given = arguments(tokens, width, vocabulary, dtype)
    records = []
    for task, named in contenders().items():
        programs = {name: jax.jit(function).lower(*given).compile() for name, function in named.items()}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(rounds + 1):  # the first is not counted
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*given))
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
        temporary = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
        plain = next(iter(programs))
        for name in programs:
            records.append(
                {
                    "device": device.device_kind,
                    "task": task,
                    "contender": name,
                    "milliseconds": 1e3 * medians[name],
                    "time_ratio": medians[name] / medians[plain],
                    "temporary_mib": temporary[name] / 2**20,
                    "memory_ratio": temporary[name] / temporary[plain],
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one record a line")
    chosen = vars(parser.parse_args())
    as_json = chosen.pop("json")
    for r in run(**chosen):
        if as_json:
            print(json.dumps(r))
        else:
            print(
                f"{r['task']:21s} {r['contender']:28s} {r['milliseconds']:8.0f} ms ({r['time_ratio']:.2f})"
                f" {r['temporary_mib']:7.0f} MiB ({r['memory_ratio']:.3f})"
            )


if __name__ == "__main__":
    main()

"""Seconds of a GRPO step as a user waits for it: sampling, rewards, reference log-probs, update, metrics.

    python -m tests.benchmarks.train_step [--steps N] [--tunix PYTHON] [--trl PYTHON] [--json FILE]

The same step by three systems' own training loops, each with its defaults where they leave a choice: ours from a
configuration, Tunix's `GRPOLearner` and TRL's `GRPOTrainer`. 8 prompts of 32 tokens, 8 completions of 64, all 64
sequences in one AdamW update, beta 0.04 with a reference model, float32; a model of 5.25 million parameters shaped as
Qwen3, read from one checkpoint by all of them. Rewards are computed from texts by the same function.

Each system runs in a process of its own, with the Python that has it installed, and holds its loop before every step
until told to go on, so that one step of each is taken in turns and what else the machine does falls on all of them. The
first step, which compiles, is not counted, and neither is the end of a run. `generation` is the part of a step that
ends with completions as texts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROMPTS, GROUP, PROMPT, NEW = 8, 8, 32, 64
VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD, MLP = 8192, 256, 4, 4, 2, 64, 768
LEARNING_RATE, BETA = 1e-6, 0.04

PACKAGES = {"ours": "jaxrl-post", "ours, shared prompts": "jaxrl-post", "tunix": "google-tunix", "trl": "trl"}


class Turns:
    """Holds a training loop before each step until the process at the other end of the pipe says go.

    Attributes:
        spent: seconds in functions that `timed` wraps, since the step began.
        completions: that got a reward, since then.
        compilations: programs that JAX has compiled, since then.
    """

    def __init__(self) -> None:
        self.spent, self.completions, self.compilations = 0.0, 0, 0
        self._began: float | None = None
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the systems print is not for the pipe

    def next(self, settle: Callable[[], Any] = lambda: None) -> None:
        """End a step, if one is under way, and wait for the word to begin another.

        Args:
            settle: waits for what the step has left running.
        """
        said: dict[str, Any] = {"ready": True}
        if self._began is not None:
            settle()
            said = {
                "seconds": time.perf_counter() - self._began,
                "generation": self.spent,
                "completions": self.completions,
                "compilations": self.compilations,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            }
        print(json.dumps(said), file=self._answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # from wherever in its loop the system is
        self.spent, self.completions, self.compilations = 0.0, 0, 0
        self._began = time.perf_counter()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as generation."""

        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - start

        return run

    def count_compilations(self) -> None:
        """Listen to JAX."""
        import jax

        def heard(event: str, *_, **__) -> None:
            self.compilations += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(heard)


turns: Turns | None = None
"""Of this process, if it is a worker."""


def share_of_even(completions: list[str], **_) -> list[float]:
    """The reward: the share of numbers in a completion that are even."""
    if turns is not None:
        turns.completions += len(completions)
    every = [[int(word) for word in text.split() if word.isdigit()] for text in completions]  # some decode <pad> too
    return [sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1) for numbers in every]


def write_checkpoint(directory: Path) -> None:
    """A random Qwen3 with a tokenizer of whole numbers."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,)}
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        shapes |= {layer + "input_layernorm": (WIDTH,), layer + "post_attention_layernorm": (WIDTH,)}
        shapes |= {layer + "self_attn.q_norm": (HEAD,), layer + "self_attn.k_norm": (HEAD,)}
        shapes |= {layer + "self_attn.q_proj": (HEADS * HEAD, WIDTH), layer + "self_attn.o_proj": (WIDTH, HEADS * HEAD)}
        shapes |= {layer + f"self_attn.{name}_proj": (KV_HEADS * HEAD, WIDTH) for name in "kv"}
        shapes |= {layer + f"mlp.{name}_proj": (MLP, WIDTH) for name in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj": (WIDTH, MLP)}
    weights = {
        name + ".weight": (np.ones(shape) if len(shape) == 1 else draw.normal(0, 0.02, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    ids = {name: i for i, name in enumerate(["<pad>", "<unk>", "<end>", *map(str, range(3, VOCAB))])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained(directory)


def prompts(steps: int) -> list[str]:
    """Texts of `PROMPT` tokens, enough for so many steps."""
    draw = random.Random(0)
    return [" ".join(str(draw.randrange(3, VOCAB)) for _ in range(PROMPT)) for _ in range(steps * PROMPTS)]


def run_ours(turns: Turns, directory: Path, texts: list[str], shared: bool = False) -> None:
    """`jaxrl-post train` with a configuration."""
    from jaxrl_post.training import batches, config, loop

    class InTurns(batches.Batches):
        def next(self, state, cursor):
            turns.next()
            return super().next(state, cursor)

    turns.count_compilations()
    loop.Batches = InTurns  # type: ignore[misc]
    for name in ("begin", "score"):
        setattr(batches.Sampler, name, turns.timed(getattr(batches.Sampler, name)))
    files, run_dir = directory / "problems.jsonl", tempfile.mkdtemp(dir=directory)
    files.write_text("".join(json.dumps({"question": text, "answer": ""}) + "\n" for text in texts))
    values = {
        "run_dir": run_dir,
        "model": {"path": str(directory / "checkpoint")},
        "data": {"files": [str(files)], "max_prompt_length": PROMPT},
        "rewards": [{"path": "__main__:share_of_even"}],
        "rollout": {"group_size": GROUP, "prompts": PROMPTS, "max_new_tokens": NEW},
        "method": {"name": "grpo", "beta": BETA},
        "training": {
            "steps": len(texts) // PROMPTS,
            "optimizer": {"learning_rate": LEARNING_RATE},
            "checkpoint_every": 10**6,
            "share_prompts": shared,
        },
        "eval": {"problems": 0},
        "logging": {"progress": False},
    }
    loop.run(config.from_dict(values))


def run_tunix(turns: Turns, directory: Path, texts: list[str]) -> None:
    """Tunix's `GRPOLearner` on one device, with its own sampler and a cache of just the length that is needed."""
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from transformers import AutoTokenizer
    from tunix.models.qwen3 import model, params
    from tunix.rl import rl_cluster as clusters
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    turns.count_compilations()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    sizes = model.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HEAD,
        num_kv_heads=KV_HEADS,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    actor, reference = (
        params.create_model_from_safe_tensors(str(directory / "checkpoint"), sizes, mesh) for _ in range(2)
    )
    cluster = clusters.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=AutoTokenizer.from_pretrained(directory / "checkpoint"),
        cluster_config=clusters.ClusterConfig(
            role_to_mesh=dict.fromkeys((clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT), mesh),
            training_config=clusters.RLTrainingConfig(
                actor_optimizer=optax.adamw(LEARNING_RATE), eval_every_n_steps=10**6, max_steps=len(texts) // PROMPTS
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=NEW, max_prompt_length=PROMPT, kv_cache_size=PROMPT + NEW, temperature=1.0
            ),
        ),
    )
    cluster.generate = turns.timed(cluster.generate)
    learner = grpo_learner.GRPOLearner(
        cluster, grpo_learner.GRPOConfig(num_generations=GROUP, beta=BETA), reward_fns=share_of_even
    )

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(texts), PROMPTS):
            turns.next(lambda: jax.block_until_ready(nnx.state(actor)))
            yield {"prompts": np.asarray(texts[start : start + PROMPTS])}

    learner.train(batches())


def run_trl(turns: Turns, directory: Path, texts: list[str]) -> None:
    """TRL's `GRPOTrainer` without gradient checkpointing, which the others do not do either."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class InTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turns.next()

    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=directory),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        temperature=1.0,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=len(texts) // PROMPTS,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=str(directory / "checkpoint"),
        reward_funcs=share_of_even,
        args=options,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(directory / "checkpoint"),
        callbacks=[InTurns()],
    )
    trainer._generate = turns.timed(trainer._generate)
    trainer.train()


def work(system: str, directory: Path, steps: int) -> None:
    """Be the process of one system, to which each line of the standard input is a step."""
    global turns
    turns = Turns()
    texts = prompts(steps + 1)  # one that is never taken: what is done at the end of a run is no part of a step
    if system == "tunix":
        run_tunix(turns, directory, texts)
    elif system == "trl":
        run_trl(turns, directory, texts)
    else:
        run_ours(turns, directory, texts, shared="shared" in system)


class Worker:
    """The process of one system.

    Raises:
        RuntimeError: with the end of what it printed, if it dies.
    """

    def __init__(self, system: str, python: str, directory: Path, steps: int):
        self.system, self._log = system, (directory / f"{system}.log").open("w+")
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if python == sys.executable:  # a checkout that is not installed is found from where it is
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), environment.get("PYTHONPATH"))))
        command = [python, __file__, "--worker", system, "--directory", str(directory), "--steps", str(steps)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._hear()

    def step(self) -> dict[str, Any]:
        """Take one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._hear()

    def stop(self) -> None:
        """Let it end."""
        self._process.communicate()
        self._log.close()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        raise RuntimeError(f"{self.system} ended with status {self._process.wait()}:\n{self._log.read()[-3000:]}")


def version(python: str, package: str) -> str | None:
    """Of a package that a Python has installed; None if it has not."""
    if python == sys.executable:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
        return None
    asked = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(steps: int, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """One record for each system that is installed; says which are not.

    Args:
        steps: counted ones, after the first.
        pythons: by system, the Python that has it.
    """
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        directory = Path(scratch)
        write_checkpoint(directory / "checkpoint")
        workers = {}
        for system, python in pythons.items():
            package = PACKAGES[system]
            found = version(python, package)
            if found is None:
                option = f" and name its Python with --{system}" if system in ("tunix", "trl") else ""
                print(f"{system} is left out: {python} has no {package}; pip install {package}{option}")
                continue
            workers[system] = Worker(system, python, directory, steps + 1)
            held.callback(workers[system].stop)
            records.append({"system": system, "version": found})
        taken = [{system: worker.step() for system, worker in workers.items()} for _ in range(steps + 1)]
    for record in records:
        first, *counted = (turn[record["system"]] for turn in taken)
        if wrong := [step["completions"] for step in (first, *counted) if step["completions"] != PROMPTS * GROUP]:
            raise RuntimeError(f"{record['system']} rewarded {wrong[0]} completions a step, not {PROMPTS * GROUP}")
        whole, generation = ([step[name] for step in counted] for name in ("seconds", "generation"))
        rest = [a - b for a, b in zip(whole, generation, strict=True)]
        record |= {
            "seconds": statistics.median(whole),
            "generation": statistics.median(generation),
            "rest": statistics.median(rest),
            "first_step": first["seconds"],
            "compilations_after_the_first_step": sum(step["compilations"] for step in counted),
            "peak_mib": counted[-1]["peak_mib"],
            "every_step": whole,
        }
    for record in records:
        names = ("seconds", "generation", "rest")
        record["ratio"] = {name: records[0][name] / record[name] for name in names}
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each system")
    parser.add_argument("--tunix", default=sys.executable, help="the Python that has google-tunix")
    parser.add_argument("--trl", default=sys.executable, help="the Python that has trl")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.directory, chosen.steps)
        return
    ours = dict.fromkeys(("ours", "ours, shared prompts"), sys.executable)
    records = run(chosen.steps, {**ours, "tunix": chosen.tunix, "trl": chosen.trl})
    print(
        "                       seconds (ours/its)   generation      rest           first step  compiled later     MiB"
    )
    for r in records:
        parts = "  ".join(f"{r[name]:6.2f} ({r['ratio'][name]:4.2f})" for name in ("seconds", "generation", "rest"))
        print(
            f"{r['system']:20s}   {parts}   {r['first_step']:8.1f} s"
            f"   {r['compilations_after_the_first_step']:9d}   {r['peak_mib']:9.0f}"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tokens per second of three samplers at the same work: ours, Tunix's, and `generate` of Hugging Face's transformers.

    python tests/benchmarks/rollout.py [--tunix PYTHON] [--transformers PYTHON] [--rounds 5] [--json FILE]

Each system has a process of its own, under the interpreter that is named for it, since they need different versions of
the same packages; `-` leaves one out. All read the same weights from a checkpoint, and must agree on greedy tokens.
They take turns, so that what else the machine does falls on all of them, and a run is what a user waits for: from
token ids on the host to token ids on the host. "compile" is what the first run takes beyond the median, in seconds and
in seconds of the processor.

To have Tunix: `python -m venv tunix && tunix/bin/pip install google-tunix`, then `--tunix tunix/bin/python`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Imported by interpreters that have only one of the systems: nothing of them at the top.
Case = dict[str, Any]
VOCABULARY, PROMPT, BATCH = 8192, 32, 64
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 64}
SIZES = {"vocab_size": VOCABULARY, "width": 256, "mlp_width": 768, "tied": True, **HEADS}
# With matrices this small all tokens are about equally likely: 256 stop tokens end one of 32 tokens.
STOPS = tuple(range(VOCABULARY - 256, VOCABULARY))
PLAIN: Case = {"requests": BATCH, "new": 64, "capacity": 96, "top_p": 1.0, "stops": (), "greedy": False}
CASES: dict[str, Case] = {
    "fixed": PLAIN,
    "capacity 1024": {**PLAIN, "capacity": 1024},
    "top-p 0.95": {**PLAIN, "top_p": 0.95},
    "ragged": {**PLAIN, "requests": 256, "new": 256, "capacity": PROMPT + 256, "stops": STOPS},
}
GREEDY: Case = {**PLAIN, "requests": 4, "new": 16, "capacity": 48, "greedy": True}
SYSTEMS = ("ours", "tunix", "transformers")

Run = Callable[[Case, int], list[list[int]]]
"""From a case and a seed to the new tokens of each request."""


def prompts_of(case: Case, seed: int) -> np.ndarray:
    """`[requests, PROMPT]` token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCABULARY - 256, (case["requests"], PROMPT))


def _ours(directory: str) -> Run:
    import jax
    import jax.numpy as jnp

    from jaxrl_post import models
    from jaxrl_post.rollout import Prompts, SamplingParams, generate

    loaded = models.from_pretrained(directory)

    @functools.cache
    def program(new: int, slots: int, greedy: bool, top_p: float, stops: tuple[int, ...]) -> Any:
        sampling = SamplingParams(greedy=greedy, top_p=top_p, stop_tokens=stops)
        return jax.jit(functools.partial(generate, loaded.policy, sampling=sampling, max_new_tokens=new, slots=slots))

    def run(case: Case, seed: int) -> list[list[int]]:
        tokens = prompts_of(case, seed)
        length = np.full(len(tokens), PROMPT, np.int32)
        limit = np.full(len(tokens), case["new"], np.int32)
        prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(length), max_new_tokens=jnp.asarray(limit))
        # The capacity is what the longest completion that is allowed would need.
        longest = max(case["new"], case["capacity"] - PROMPT)
        sample = program(longest, BATCH, case["greedy"], case["top_p"], case["stops"])
        out = sample(loaded.params, prompts, jax.random.key(seed))
        rows, ends = np.asarray(out.tokens), np.asarray(out.length).reshape(-1)
        return [row[PROMPT:end].tolist() for row, end in zip(rows, ends, strict=True)]

    return run


def _tunix(directory: str) -> Run:
    import jax
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen3 import model, params

    config = json.loads((Path(directory) / "config.json").read_text())
    described = model.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        use_tied_embedding=True,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    network = params.create_model_from_safe_tensors(directory, described, mesh)

    class Numbers:
        """A tokenizer of token ids in decimal."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

        def bos_id(self) -> int | None:
            return None

        def eos_id(self) -> int:
            return 2

        def pad_id(self) -> int:
            return 0

    @functools.cache
    def sampler(capacity: int) -> Any:
        sizes = CacheConfig(capacity, described.num_layers, described.num_kv_heads, described.head_dim)
        return Sampler(network, Numbers(), sizes)

    def run(case: Case, seed: int) -> list[list[int]]:
        texts = [" ".join(map(str, row)) for row in prompts_of(case, seed).tolist()]
        how = {} if case["greedy"] else {"temperature": 1.0, "top_p": case["top_p"]}
        found = []
        for start in range(0, len(texts), BATCH):
            out = sampler(case["capacity"])(
                texts[start : start + BATCH],
                max_generation_steps=case["new"],
                max_prompt_length=PROMPT,
                eos_tokens=list(case["stops"]) or [-1],
                seed=seed + start,
                **how,
            )
            # It leaves the stop token out; the others have it.
            ended = [[STOPS[0]] * (bool(case["stops"]) and len(row) < case["new"]) for row in out.tokens]
            found += [np.asarray(row).tolist() + end for row, end in zip(out.tokens, ended, strict=True)]
        return found

    return run


def _transformers(directory: str) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None

    def run(case: Case, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        tokens = torch.from_numpy(prompts_of(case, seed))
        how = {"do_sample": False} if case["greedy"] else {"do_sample": True, "top_k": 0, "top_p": case["top_p"]}
        if case["stops"]:
            how["eos_token_id"] = list(case["stops"])
        found = []
        for some in tokens.split(BATCH):
            with torch.inference_mode():
                out = network.generate(
                    some,
                    attention_mask=torch.ones_like(some),
                    max_new_tokens=case["new"],
                    pad_token_id=0,
                    **how,
                )
            for row in out[:, PROMPT:].tolist():
                end = next((i + 1 for i, token in enumerate(row) if token in case["stops"]), len(row))
                found.append(row[:end])
        return found

    return run


def write_checkpoint(directory: str, layers: int) -> None:
    """The weights that all systems read."""
    import jax

    from jaxrl_post import models

    sizes = {**SIZES, "layers": layers, "qk_norm": "head", "rope_base": 1e6, "init_std": 0.02}
    policy = models.decoder(**sizes)
    config = models.to_config(**sizes) | {"architectures": ["Qwen3ForCausalLM"]}
    params = policy.init(jax.random.key(0))
    # Layers that say little would leave each token the most probable one after itself.
    for part, name in (("attention", "out"), ("mlp", "down")):
        params["layers"][part][name] *= 16.0
    models.save_pretrained(directory, params, config)


def work(system: str) -> None:
    """The loop of a process: one JSON object a line, in and out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between
    if system == "ours":
        sys.path.insert(0, str(Path(__file__).parents[2]))
    load = {"ours": _ours, "tunix": _tunix, "transformers": _transformers}[system]
    run: Run | None = None
    for line in sys.stdin:
        wanted = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if wanted["do"] == "write":
                write_checkpoint(wanted["directory"], wanted["layers"])
            elif wanted["do"] == "load":
                run = load(wanted["directory"])
            elif run is not None:
                case = {**wanted["case"], "stops": tuple(wanted["case"]["stops"])}
                start, used = time.perf_counter(), time.process_time()
                rows = run(case, wanted["seed"])
                answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
                answer["tokens"] = sum(map(len, rows))
                answer |= {"rows": rows} if case["greedy"] else {}
        except Exception as error:  # told to whoever asked, in one line
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A system in its process."""

    def __init__(self, system: str, python: str, log: str):
        self.system, self.python, self.log = system, python, log
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "PYTHONPATH"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [python, __file__, "--work", system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),  # noqa: SIM115 - the process keeps it
            env=environment,
            text=True,
        )

    def ask(self, do: str, **wanted: Any) -> dict[str, Any]:
        """Its answer; RuntimeError if it has none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **wanted}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = Path(self.log).read_text().splitlines()[-1:]
            raise RuntimeError(f"{self.system} under {self.python} died: {' '.join(tail)}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.system} under {self.python}: {answer['error']}")
        return answer


def start_workers(pythons: dict[str, str], directory: Path) -> dict[str, Worker]:
    """A worker for each system that is there, and a line on why another is not."""
    workers = {}
    for system, python in pythons.items():
        if python == "-":
            continue
        worker = Worker(system, python, str(directory / f"{system}.log"))
        try:
            if system == "ours":
                for layers in (4, 28):
                    worker.ask("write", directory=str(directory / str(layers)), layers=layers)
            worker.ask("load", directory=str(directory / "4"))
        except (RuntimeError, OSError) as error:
            if system == "ours":
                raise
            print(f"left out: {error} (see --help for how to have it, or give --{system} - to do without)")
            continue
        workers[system] = worker
    return workers


def measure(workers: dict[str, Worker], cases: dict[str, Case], rounds: int) -> list[dict[str, Any]]:
    """One record for each case and system."""
    records = []
    for name, case in cases.items():
        taken: dict[str, list[dict[str, Any]]] = {system: [] for system in workers}
        for seed in range(rounds + 1):  # the first compiles
            for system, worker in workers.items():
                if system != "transformers" or name != "capacity 1024":  # its cache grows; it has no capacity
                    taken[system].append(worker.ask("run", case=case, seed=seed))
        for system, (first, *others) in ((s, t) for s, t in taken.items() if t):
            seconds = statistics.median(run["seconds"] for run in others)
            used = statistics.median(run["cpu_seconds"] for run in others)
            rate = statistics.median(run["tokens"] / run["seconds"] for run in others)
            records.append(
                {
                    "case": name,
                    "system": system,
                    "seconds": seconds,
                    "cpu_seconds": used,
                    "tokens_per_second": rate,
                    "compile_seconds": first["seconds"] - seconds,
                    "compile_cpu_seconds": first["cpu_seconds"] - used,
                }
            )
            print(
                f"{name:14s} {system:13s} {rate:8.0f} tokens/s {seconds:7.3f} s ({used:.2f} s of the processor), "
                f"compile {first['seconds'] - seconds:5.2f} s ({first['cpu_seconds'] - used:.2f})",
                flush=True,
            )
    return records


def ratios(records: list[dict[str, Any]]) -> dict[str, float]:
    """What is to be known of the records: above 1 is in our favour, but for the two that say otherwise."""
    rate = {(r["case"], r["system"]): r["tokens_per_second"] for r in records}
    compiled = {(r["case"], r["system"]): r["compile_cpu_seconds"] for r in records}
    found = {}
    for case, system in rate:
        if system != "ours":
            found[f"{case}: tokens/s over {system}'s"] = rate[case, "ours"] / rate[case, system]
    for system in {system for _, system in rate}:
        for case in ("capacity 1024", "top-p 0.95"):
            if (case, system) in rate:
                found[f"{case}: {system}, seconds over fixed (lower is better)"] = (
                    rate["fixed", system] / rate[case, system]
                )
    for case in ("fixed", "28 layers"):
        if (case, "tunix") in compiled:
            found[f"{case}: seconds of the processor to compile over tunix's (lower is better)"] = (
                compiled[case, "ours"] / compiled[case, "tunix"]
            )
    if ("28 layers", "ours") in compiled:
        found["28 layers: ours, seconds of the processor to compile over 4 layers' (lower is better)"] = (
            compiled["28 layers", "ours"] / compiled["fixed", "ours"]
        )
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", default=sys.executable, metavar="PYTHON", help="interpreter that has google-tunix")
    parser.add_argument("--transformers", default=sys.executable, metavar="PYTHON", help="one that has torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", choices=[*CASES, "28 layers"], default=[*CASES, "28 layers"])
    parser.add_argument("--json", metavar="FILE", help="also write the records there")
    parser.add_argument("--work", choices=SYSTEMS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.work)
        return
    pythons = {"ours": sys.executable, "tunix": chosen.tunix, "transformers": chosen.transformers}
    with tempfile.TemporaryDirectory() as directory:
        workers = start_workers(pythons, Path(directory))
        greedy = {system: worker.ask("run", case=GREEDY, seed=0)["rows"] for system, worker in workers.items()}
        for system, rows in greedy.items():
            same = np.mean([a == b for a, b in zip(rows, greedy["ours"], strict=True)])
            print(f"{system}: {same:.0%} of greedy completions are ours")
        records = measure(workers, {name: CASES[name] for name in chosen.cases if name in CASES}, chosen.rounds)
        if "28 layers" in chosen.cases:
            for worker in workers.values():
                worker.ask("load", directory=str(Path(directory) / "28"))
            records += measure(workers, {"28 layers": PLAIN}, min(chosen.rounds, 2))
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    for name, ratio in ratios(records).items():
        print(f"{ratio:6.2f}  {name}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"records": records, "ratios": ratios(records)}, indent=1) + "\n")


if __name__ == "__main__":
    main()

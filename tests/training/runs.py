"""A whole run that takes seconds: files of problems, a short warm start, and a method."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

TIMINGS = ("step_time", "tokens_per_second", "time/batch", "time/update", "compilations", "time/compile")


def reward(completions, answer):
    """The fraction of the answer's characters that are right, so that groups differ from the start."""
    return [
        sum(a == b for a, b in zip(text, right, strict=False)) / len(right)
        for text, right in zip(completions, answer, strict=True)
    ]


def write_problems(path: Path, count: int = 24, first: int = 0) -> Path:
    """Copy two digits: `12>` has the answer `12`."""
    rows = [{"question": f"{n % 100:02d}>", "answer": f"{n % 100:02d}"} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training(**changes) -> dict:
    """The loop's section of a tiny run."""
    optimizer = {"learning_rate": 0.01}
    return {"steps": 6, "optimizer": optimizer, "checkpoint_every": 2, "log_completions_every": 2} | changes


def tiny_run(directory: Path, **changes) -> Path:
    """The path of a configuration of a run in `directory/run`; `changes` replace whole sections."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        "run_dir": str(directory / "run"),
        "model": {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16},
        "data": {
            "files": [str(write_problems(directory / "train.jsonl"))],
            "eval_files": [str(write_problems(directory / "eval.jsonl", 8, 60))],
            "alphabet": ">0123456789",
            "max_prompt_length": 3,
        },
        "rewards": [{"path": f"{__file__}:reward"}],
        "rollout": {"group_size": 4, "prompts": 4, "max_new_tokens": 3},
        "method": {"name": "grpo"},
        "warm_start": {"steps": 3, "batch_size": 4, "examples": 8, "optimizer": {"learning_rate": 0.01}},
        "training": training(),
        "eval": {"problems": 8, "samples": 4, "k": 2},  # sampled by the program that samples for training
        "logging": {"progress": False, "tensorboard": False},
    }
    values |= changes
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return path


def lines(run_dir: Path) -> list[dict]:
    """The metrics of a run without what a clock measured."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def final_state(run_dir: Path):
    """Every array of the newest checkpoint, as bytes, and what was saved beside them."""
    import jax

    from jaxrl_post.training import config, setup
    from jaxrl_post.training.checkpoint import Checkpointer

    parts = setup.build(config.load(run_dir / "config.yaml"))
    with Checkpointer(run_dir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(lambda saved: parts.template(parts.stages[saved["stage"]]))
    state = restored.state.replace(key=jax.random.key_data(restored.state.key))
    return restored.step, [x.tobytes() for x in jax.tree.leaves(jax.device_get(state))], restored.run

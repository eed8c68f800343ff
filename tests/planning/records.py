"""The recorded accounts of published models on slices of TPUs; `python -m tests.planning.records [NAME]` renews them.

Without a name all are compiled anew, one at a time; the table in the README is made of the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_post.planning import compiler

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("records.json")
PARTS = ("rollout", "score", "step")
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
GIB = 2**30


class Case(NamedTuple):
    """A run and the slice that it is compiled for."""

    name: str
    title: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    every_commit: bool = False


CASES = {
    case.name: case
    for case in (
        Case("0.6b-v5e-1x1", "Qwen3-0.6B", "qwen3-0.6b-grpo", "v5e:1x1", every_commit=True),
        Case("8b-v5e-4x4", "Qwen3-8B", "qwen3-8b-grpo", "v5e:4x4"),
        Case("8b-v6e-2x4", "Qwen3-8B", "qwen3-8b-grpo", "v6e:2x4", ("mesh.fsdp=8",)),
        Case("llama-8b-lora-v5e-2x4", "Llama-3.1-8B, LoRA", "llama-3.1-8b-lora-grpo", "v5e:2x4"),
        Case("30b-a3b-v5p-4x4x4", "Qwen3-30B-A3B", "qwen3-30b-a3b-grpo", "v5p:4x4x4"),
        Case("32b-v5p-4x4x8", "Qwen3-32B", "qwen3-32b-grpo", "v5p:4x4x8"),
        Case("32b-tpu7x-2x2x2", "Qwen3-32B", "qwen3-32b-grpo", "tpu7x:2x2x2", ("mesh.fsdp=16", "rollout.prompts=16")),
    )
}


def account(case: Case, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """What the compiler says of a case, as the file keeps it."""
    compiler.prepare()
    from jaxrl_post.planning import chips, plans, summary
    from jaxrl_post.training import config as configs

    config = configs.load(ROOT / "configs" / f"{case.config}.yaml", case.overrides, check_files=False)
    wanted = chips.topology(case.topology)
    compiled = plans.compile_run(config, wanted, parts, say=lambda text: print(text, file=sys.stderr, flush=True))
    found = summary.as_json(compiled, wanted, plans.mesh_sizes(config))
    programs = {}
    for one in found["programs"]:
        costs = one["costs"] or {"flops": None, "bytes": None, "collectives": []}
        programs[one["name"]] = {
            "fits": one["fits"],
            "peak_bytes": one["peak_bytes"],
            "memory_bytes": one["memory_bytes"],
            "flops": costs["flops"],
            "bytes": costs["bytes"],
            "collective_bytes": sum(kind["bytes"] for kind in costs["collectives"]),
            "model_flops": one["model_flops"] / found["devices"],
        }
    return {"programs": programs, "step": found["step"], "mesh": found["mesh"], "memory_bytes": wanted.chip.memory}


def recorded() -> dict[str, Any]:
    """The file."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def table(records: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| model | slice | mesh | GiB of a device: sampling, scoring, training | has | collectives of a step, GB | "
        "step, s: roofline, compiler | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        if name not in records:
            continue
        one = records[name]
        peaks = ", ".join(f"{part['peak_bytes'] / GIB:.1f}" for part in one["programs"].values())
        mesh = " ".join(f"{axis} {size}" for axis, size in one["mesh"].items() if size > 1) or "-"
        step = one["step"]
        times = ", ".join(f"{step[f'{source}_seconds'] or float('nan'):.1f}" for source in ("roofline", "compiler"))
        moved = one["programs"]["step"]["collective_bytes"] / 1e9
        room = one["memory_bytes"] / GIB
        lines.append(
            f"| {case.title} | {case.topology} | {mesh} | {peaks} | {room:.1f} | {moved:.1f} | {times} | "
            f"{100 * step['mfu']:.0f}% |"
        )
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Compile, write the file, and put the table into the README."""
    for name in names or list(CASES):
        records = recorded() | {name: account(CASES[name])}
        records = {key: records[key] for key in CASES if key in records}
        FILE.write_text(json.dumps(records, indent=1) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN in text:
        start, rest = text.split(BEGIN)
        readme.write_text(f"{start}{BEGIN}\n{table(recorded())}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])

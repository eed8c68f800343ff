"""The recorded accounts of published models on slices of TPUs; `python -m tests.planning.records [NAME]` renews them.

Without a name all are compiled anew, one at a time; the table in the README is made of the file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_post.planning import compiler

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("records.json")
PARTS = ("rollout", "step")
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
        Case("8b-v6e-2x4", "Qwen3-8B", "qwen3-8b-grpo", "v6e:2x4", ("mesh.fsdp=8", "rollout.mesh.data=1")),
        Case("llama-8b-lora-v5e-2x4", "Llama-3.1-8B, LoRA", "llama-3.1-8b-lora-grpo", "v5e:2x4"),
        Case("30b-a3b-v5p-4x4x4", "Qwen3-30B-A3B", "qwen3-30b-a3b-grpo", "v5p:4x4x4"),
        Case("32b-v5p-4x4x8", "Qwen3-32B", "qwen3-32b-grpo", "v5p:4x4x8", every_commit=True),
        Case(
            "32b-tpu7x-2x2x2",
            "Qwen3-32B",
            "qwen3-32b-grpo",
            "tpu7x:2x2x2",
            ("mesh.data=1", "rollout.prompts=16", "rollout.mesh.data=2"),
        ),
        Case("gemma-4b-v5e-2x4", "Gemma 3 4B", "gemma-3-4b-grpo", "v5e:2x4"),
    )
}


def account(case: Case, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """What the compiler says of a case, as the file keeps it."""
    return entry(case, compiled(case, parts))


def planned(case: Case) -> tuple[Any, Any]:
    """The configuration of a case, and its topology."""
    compiler.prepare()
    from jaxrl_post.planning import chips
    from jaxrl_post.training import config as configs

    config = configs.load(ROOT / "configs" / f"{case.config}.yaml", case.overrides, check_files=False)
    return config, chips.topology(case.topology)


def compiled(case: Case, parts: Sequence[str]) -> list[Any]:
    """The programs of a case."""
    config, wanted = planned(case)
    from jaxrl_post.planning import plans

    return plans.compile_run(config, wanted, parts, say=lambda text: print(text, file=sys.stderr, flush=True))


def entry(case: Case, programs: Sequence[Any]) -> dict[str, Any]:
    """What the file keeps of a case's programs."""
    config, wanted = planned(case)
    from jaxrl_post.planning import plans, summary

    found = summary.as_json(programs, wanted, plans.mesh_sizes(config))
    meshes = [dataclasses.asdict(mesh) for mesh in (config.mesh, config.rollout.mesh) if mesh is not None]
    kept = {}
    for one in found["programs"]:
        costs = one["costs"] or {"flops": None, "bytes": None, "collectives": []}
        kept[one["name"]] = {
            "fits": one["fits"],
            "peak_bytes": one["peak_bytes"],
            "memory_bytes": one["memory_bytes"],
            "flops": costs["flops"],
            "bytes": costs["bytes"],
            "collective_bytes": sum(kind["bytes"] for kind in costs["collectives"]),
            "model_flops": one["model_flops"] / found["devices"],
        }
    return {"programs": kept, "step": found["step"], "meshes": meshes, "memory_bytes": wanted.chip.memory}


def recorded() -> dict[str, Any]:
    """The file."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def table(records: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| model | slice | mesh | GiB of a device: sampling, training | has | collectives of a step, GB | "
        "step, s: roofline, compiler | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        if name not in records:
            continue
        one = records[name]
        peaks = ", ".join(f"{one['programs'][part]['peak_bytes'] / GIB:.1f}" for part in ("rollout", "step"))
        layouts = [" ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) for sizes in one["meshes"]]
        mesh = "; sampling ".join(dict.fromkeys(layouts)) or "-"
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

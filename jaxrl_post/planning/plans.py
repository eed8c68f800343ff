"""From a configuration and a topology to compiled programs; and which layout of the devices to take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxrl_post.planning import compiler, programs, report, summary
from jaxrl_post.planning.chips import GIB, Chip, Topology
from jaxrl_post.planning.programs import PARTS, ModelSizes
from jaxrl_post.planning.report import Compiled
from jaxrl_post.training.config import Config, ConfigError, MeshConfig
from jaxrl_post.training.setup import Setup

__all__ = ["PARTS", "Layout", "compile_run", "describe", "layouts", "mesh_sizes", "suggest"]


def mesh_sizes(config: Config) -> dict[str, int]:
    """Sizes of the mesh's axes by name."""
    return dataclasses.asdict(config.mesh)


def compile_run(
    config: Config, wanted: Topology, parts: Sequence[str] = PARTS, *, say: Callable[[str], None] = lambda text: None
) -> list[Compiled]:
    """Compile the programs of a run for a topology.

    Args:
        config: loaded with `check_files=False`: neither its data nor its weights need be there.
        wanted: the topology.
        parts: which of `PARTS`.
        say: told what is being compiled.

    Raises:
        ConfigError: if the mesh does not fit the topology.
    """
    setup = _plan(config, wanted)
    found = programs.programs(setup, parts)

    compiled = []
    for one in found:
        say(f"compiling {one.name} for {wanted.name} ...")
        compiled.append(report.compile_program(one, wanted))
    return compiled


def _plan(config: Config, wanted: Topology) -> Setup:
    if config.mesh.data % wanted.slices:
        raise ConfigError(
            [
                f"mesh.data: must be a multiple of the {wanted.slices} slices, which only copies of the model may be "
                f"split over (everything else needs the links within a slice); got {config.mesh.data}"
            ]
        )
    return programs.plan(config, compiler.devices(wanted.name, wanted.slices))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and a number of micro-batches, and what they lead to.

    Attributes:
        mesh: sizes of its axes.
        micro_batches: pieces of a batch.
        estimate: bytes of a device and seconds of a step, by a formula.
        compiled: the programs; empty where they were not compiled.
        problem: why they could not be.
        step: `summary.step` of them.
    """

    mesh: dict[str, int]
    micro_batches: int
    estimate: tuple[float, float]
    compiled: tuple[Compiled, ...] = ()
    problem: str | None = None
    step: dict[str, float | None] | None = None

    @property
    def fits(self) -> bool:
        """Whether all programs do."""
        return bool(self.compiled) and all(one.fits for one in self.compiled)

    @property
    def peak(self) -> int | None:
        """Of the program that needs most."""
        known = [one.peak for one in self.compiled if one.peak is not None]
        return max(known) if known else None

    def overrides(self) -> list[str]:
        """What to put on the command line."""
        return [
            *(f"mesh.{name}={size}" for name, size in self.mesh.items()),
            f"training.micro_batches={self.micro_batches}",
        ]

    def as_json(self) -> dict[str, Any]:
        """JSON's types."""
        return {
            "mesh": self.mesh,
            "micro_batches": self.micro_batches,
            "overrides": self.overrides(),
            "estimated_bytes": self.estimate[0],
            "estimated_seconds": self.estimate[1],
            "fits": self.fits,
            "peak_bytes": self.peak,
            "step": self.step,
            "problem": self.problem,
        }


def suggest(
    config: Config, wanted: Topology, *, tries: int = 4, say: Callable[[str], None] = lambda text: None
) -> list[Layout]:
    """Layouts that fit, fastest first; then those that do not.

    Meshes and micro-batches are first sorted by a formula for memory and time, which leaves out what cannot fit; the
    best are compiled.

    Args:
        config: of the run; its mesh and micro-batches are left aside.
        wanted: the topology.
        tries: most layouts that are compiled.
        say: told what is being compiled.

    Raises:
        ConfigError: if not even the formula finds a layout with room.
    """
    every = sorted(layouts(config, wanted), key=lambda one: one.estimate[1])
    room = [one for one in every if one.estimate[0] <= wanted.chip.memory]
    if not room:
        least = min(every, key=lambda one: one.estimate[0], default=None)
        needs = "" if least is None else f"; the least needs about {least.estimate[0] / GIB:.1f} GiB a device"
        raise ConfigError(
            [
                f"no mesh of {wanted.devices} devices of {wanted.chip.memory / GIB:.1f} GiB has room for this run"
                f"{needs}: take a larger slice, bfloat16 parameters (model.param_dtype), adapters (model.lora), or "
                "fewer or shorter completions"
            ]
        )
    found = []
    for one in room[:tries]:
        say(f"trying {' '.join(one.overrides())}")
        changed = dataclasses.replace(
            config,
            mesh=MeshConfig(**one.mesh),
            training=dataclasses.replace(config.training, micro_batches=one.micro_batches),
        )
        try:
            compiled = compile_run(changed, wanted, ("rollout", "step"), say=say)
        except ValueError as error:  # a mesh that some part of the run cannot be split over
            found.append(dataclasses.replace(one, problem=str(error)))
            continue
        step = summary.step(compiled, wanted)
        light = tuple(dataclasses.replace(each, executable=None) for each in compiled)
        found.append(dataclasses.replace(one, compiled=light, step=step))
    return sorted(found, key=lambda one: (not one.fits, (one.step or {}).get("seconds") or math.inf))


def layouts(config: Config, wanted: Topology) -> Iterator[Layout]:
    """Every mesh of the topology that splits what it should, with every number of micro-batches that divides the batch.

    Args:
        config: of the run.
        wanted: the topology.

    Yields:
        Layouts with their estimates.
    """
    one = dataclasses.replace(config, mesh=MeshConfig())
    setup = programs.plan(one, compiler.devices(wanted.name, wanted.slices)[:1])
    scale = _Scale.of(setup)
    stage = setup.stages[-1]
    pieces = scale.prompts if stage.method.unit in ("group", "batch") or config.training.share_prompts else scale.rows
    within = wanted.devices // wanted.slices
    for tensor in (1, 2, 4, 8, 16):
        if within % tensor or scale.heads % tensor:
            continue
        for fsdp in (n for n in range(1, within // tensor + 1) if (within // tensor) % n == 0):
            data = wanted.devices // tensor // fsdp
            for micro in (n for n in range(1, pieces + 1) if pieces % n == 0):
                if (scale.rows // micro) % (data * fsdp) == 0:
                    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
                    yield Layout(mesh, micro, scale.estimate(wanted, data, fsdp, tensor, micro))


class _Scale(NamedTuple):
    """Sizes of a run that memory and time follow from: bytes are those of one device that holds everything."""

    state: int
    trained: int
    matrices: float
    sizes: ModelSizes
    rows: int
    prompts: int
    length: int
    new: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv: int
    cache: int
    item: int
    passes: int

    @classmethod
    def of(cls, setup: Setup) -> _Scale:
        import jax

        stage = setup.stages[-1]
        state, rollouts = setup.state_shapes(stage), setup.rollout_shapes(stage)
        params = jax.eval_shape(setup.policy.init, setup.key)
        layers = params["layers"]
        config = setup.config
        rows, length = rollouts.tokens.shape
        chosen = setup.trainable(stage).get("policy")
        leaves = jax.tree.leaves(params)
        moving = [True] * len(leaves) if chosen is None else jax.tree.leaves(chosen)
        trained = sum(x.size * x.dtype.itemsize for x, moves in zip(leaves, moving, strict=True) if moves)
        cache = jax.eval_shape(lambda: setup.policy.init_cache(rows, length - 1))
        key = jax.tree.leaves(layers["attention"]["key"])[0].shape
        query = jax.tree.leaves(layers["attention"]["query"])[0].shape
        up = jax.tree.leaves(layers["mlp"]["up"])[0].shape
        return cls(
            state=sum(programs.state_bytes(state).values()),
            trained=trained,
            matrices=sum(x.size for x in leaves),
            sizes=ModelSizes.of(setup),
            rows=rows,
            prompts=rollouts.num_prompts,
            length=length,
            new=config.rollout.max_new_tokens,
            width=query[1],
            mlp=up[-1] * (setup.models.source.config.get("num_experts_per_tok", 1) if setup.models.source else 1),
            layers=query[0],
            heads=query[2],
            kv=key[2],
            cache=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) if stage.kind == "rollouts" else 0,
            item=2 if config.model.dtype == "bfloat16" else 4,
            passes=stage.micro_batches,
        )

    def estimate(self, wanted: Topology, data: int, fsdp: int, tensor: int, micro: int) -> tuple[float, float]:
        """Bytes at the worst moment, and seconds of a step."""
        chip: Chip = wanted.chip
        shards = fsdp * tensor
        local = self.rows / micro / (data * fsdp)
        kept = local * self.length * self.width * self.item * self.layers
        layer = local * self.length * (3 * self.mlp / tensor + 6 * self.width) * self.item
        gathered = 2 * self.matrices / self.layers / tensor * self.item if fsdp > 1 else 0
        head = 2 * self.sizes.head / tensor * self.item
        gradient = self.trained / shards * (2 if micro > 1 else 1)
        training = self.state / shards + gradient + kept + layer + gathered + head
        sampling = self.state / shards + self.cache / (data * fsdp * math.gcd(tensor, self.kv)) + head
        flops = 4 * self.sizes.forward(self.rows, self.length, self.rows * self.new) / wanted.devices
        weights = self.matrices * self.item / tensor
        sent = 4 * micro * weights * (1 - 1 / fsdp) + 2 * weights / fsdp * 2 * (1 - 1 / data)
        sent += 8 * self.layers * local * micro * self.length * self.width * self.item * (1 - 1 / tensor)
        decode = self.new * (
            (weights / fsdp + self.cache / (data * fsdp * math.gcd(tensor, self.kv))) / chip.bandwidth
            + weights * (1 - 1 / fsdp) / chip.interconnect
        )
        return max(training, sampling), flops / chip.flops + sent / chip.interconnect + decode


def describe(ranked: Sequence[Layout]) -> str:
    """Layouts as a table to read, and what to put on the command line for the best."""
    rows = [["layout", "fits", "GiB", "s a step", "tokens/s", "MFU"]]
    for one in ranked:
        step = one.step or {}
        mesh = " ".join(f"{name}={size}" for name, size in one.mesh.items() if size > 1) or "one device"
        seconds, rate, mfu = (step.get(name) for name in ("seconds", "tokens_per_second", "mfu"))
        rows.append(
            [
                f"{mesh} micro_batches={one.micro_batches}",
                "yes" if one.fits else "NO",
                "?" if one.peak is None else f"{one.peak / GIB:.2f}",
                "?" if seconds is None else f"{seconds:.3g}",
                "?" if rate is None else f"{rate:,.0f}",
                "?" if mfu is None else f"{100 * mfu:.1f}%",
            ]
        )
    lines = summary.aligned(rows)
    nothing = "none of these fits; try more with --tries, or a larger slice"
    best = ranked[0] if ranked and ranked[0].fits else None
    lines += [f"take: {' '.join(best.overrides())}" if best else nothing]
    return "\n".join([*lines, "", summary.NOTE])

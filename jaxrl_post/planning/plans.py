"""From a configuration and a topology to compiled programs; and which layout of the devices to take."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_post.planning import compiler, programs, report, summary
from jaxrl_post.planning.chips import GIB, Chip, Topology
from jaxrl_post.planning.programs import PARTS, ModelSizes
from jaxrl_post.planning.report import Compiled
from jaxrl_post.training.config import Config, ConfigError, ConfigWarning, MeshConfig, validate
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
    """A mesh, one to sample on and a number of micro-batches, and what they lead to.

    Attributes:
        mesh: sizes of all its axes.
        rollout_mesh: the same of the layout that is sampled on; None for that of `mesh`.
        micro_batches: pieces of a batch.
        estimate: bytes of a device and seconds of a step, by a formula.
        compiled: the programs; empty where they were not compiled.
        problem: why they could not be.
        step: `summary.step` of them.
    """

    mesh: dict[str, int]
    rollout_mesh: dict[str, int] | None
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
        """What to put on the command line; nothing of the file's own mesh is left."""
        sampling = [f"rollout.mesh.{name}={size}" for name, size in (self.rollout_mesh or {}).items()]
        return [
            *(f"mesh.{name}={size}" for name, size in self.mesh.items()),
            *(sampling or ["rollout.mesh=null"]),
            f"training.micro_batches={self.micro_batches}",
        ]

    def as_json(self) -> dict[str, Any]:
        """JSON's types."""
        return {
            "mesh": self.mesh,
            "rollout_mesh": self.rollout_mesh,
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

    Meshes and micro-batches are sorted by a formula for time, and for memory where that is the same. What has no room
    by the formula, and what `train` would refuse, is left out; of the rest the best of each mesh is compiled. If it
    does not fit, the formula is too low for that mesh by so much, and another number of micro-batches may follow.

    Args:
        config: of the run; its meshes and micro-batches are left aside.
        wanted: the topology.
        tries: most layouts that are compiled: what a step samples, and the step.
        say: told what is being compiled.

    Raises:
        ConfigError: if not even the formula finds a layout with room, or `train` would refuse them all.
    """
    every = sorted(layouts(config, wanted), key=lambda one: one.estimate[::-1])
    room: dict[tuple[int, ...], float] = {}
    refused: ConfigError | None = None
    found: list[Layout] = []
    for one in every:
        mesh = (*one.mesh.values(), *(one.rollout_mesh or {}).values())
        if len(found) == tries or one.estimate[0] > room.get(mesh, wanted.chip.memory):
            continue
        try:
            changed = _changed(config, one)
        except ConfigError as error:
            refused = error
            continue
        say(f"trying {' '.join(one.overrides())}")
        made = _compiled(changed, one, wanted, say)
        found.append(made)
        times_too_large = (made.peak or 0) / wanted.chip.memory
        room[mesh] = one.estimate[0] / times_too_large if times_too_large > 1 else 0.0
    if not found and refused is not None:
        raise refused
    if not found:
        least = min(every, key=lambda one: one.estimate[0], default=None)
        needs = "" if least is None else f"; the least needs about {least.estimate[0] / GIB:.1f} GiB a device"
        raise ConfigError(
            [
                f"no mesh of {wanted.devices} devices of {wanted.chip.memory / GIB:.1f} GiB has room for this run"
                f"{needs}: take a larger slice, adapters (model.lora) on bfloat16 parameters (model.param_dtype), or "
                "fewer or shorter completions"
            ]
        )
    return sorted(found, key=lambda one: (not one.fits, (one.step or {}).get("seconds") or math.inf))


def _changed(config: Config, layout: Layout) -> Config:
    """The configuration with another layout, checked as `train` would check it."""
    training = dataclasses.replace(config.training, micro_batches=layout.micro_batches)
    sampling = None if layout.rollout_mesh is None else MeshConfig(**layout.rollout_mesh)
    rollout = None if config.rollout is None else dataclasses.replace(config.rollout, mesh=sampling)
    changed = dataclasses.replace(config, mesh=MeshConfig(**layout.mesh), rollout=rollout, training=training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return validate(changed, check_files=False)


def _compiled(config: Config, layout: Layout, wanted: Topology, say: Callable[[str], None]) -> Layout:
    try:
        compiled = compile_run(config, wanted, ("rollout", "step"), say=say)
    except Exception as error:  # one layout that some part of the run cannot be split over is no end of the search
        return dataclasses.replace(layout, problem=str(error) or type(error).__name__)
    problem = next((f"{one.program.name}: {one.problem}" for one in compiled if one.problem), None)
    light = tuple(dataclasses.replace(one, executable=None) for one in compiled)
    return dataclasses.replace(layout, compiled=light, problem=problem, step=summary.step(compiled, wanted))


def layouts(config: Config, wanted: Topology) -> Iterator[Layout]:
    """Every mesh of the topology that splits what it should, with every number of micro-batches that divides the batch.

    Positions are split only where there are no more rows to split, since attention gathers their keys and values. Each
    is sampled on as it is, or where that is slower by the formula, as where weights are split over `fsdp` and every
    token would collect them anew, on copies of the model that are split over heads alone.

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
    copies = _copies(config, scale, wanted) if stage.kind == "rollouts" else []
    parts = (math.gcd(within, scale.heads), math.gcd(within, scale.length), scale.experts)
    for tensor, sequence, expert in itertools.product(*map(_divisors, parts)):
        if within % (tensor * sequence * expert):
            continue
        for fsdp, micro in itertools.product(_divisors(within // tensor // sequence // expert), _divisors(pieces)):
            data = wanted.devices // tensor // sequence // expert // fsdp
            rows, left = divmod(scale.rows // micro, data * fsdp * expert)
            if left == 0 and (sequence == 1 or rows == 1):
                mesh = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence, "expert": expert}
                memory, seconds = scale.training(wanted.chip, mesh, micro)
                ways = [(scale.sampling(wanted.chip, mesh, where), where) for where in (mesh, *copies)]
                (needed, taken), where = min(ways, key=lambda way: (way[0][0] > wanted.chip.memory, way[0][1]))
                estimate = max(memory, needed), seconds + taken
                yield Layout(mesh, None if where == mesh else where, micro, estimate)


def _copies(config: Config, scale: _Scale, wanted: Topology) -> list[dict[str, int]]:
    """Meshes of copies of the model that are split over heads alone, which all sample the same number of rows."""
    found = []
    for tensor in _divisors(math.gcd(wanted.devices // wanted.slices, scale.heads)):
        data = wanted.devices // tensor
        shared = (scale.rows, config.rollout.slots or 0, config.rollout.cache_pages or 0)
        if not any(number % data for number in shared):
            found.append({"data": data, "fsdp": 1, "tensor": tensor, "sequence": 1, "expert": 1})
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


class _Scale(NamedTuple):
    """Sizes of a run that memory and time follow from, as of one device that holds everything.

    Attributes:
        state: bytes.
        trained: bytes of the parameters that are.
        matrices: elements of all parameters.
        routed: of these, those of experts.
        sizes: of the model.
        rows: sequences of a batch.
        prompts: of a batch.
        length: of a sequence, tokens.
        new: of these, those that may be sampled.
        width: of the model.
        mlp: hidden units that a token goes through.
        layers: how many.
        heads: of the queries.
        kv: of the keys.
        experts: of a layer; 1 without.
        cache: bytes of keys and values.
        item: bytes of a number that is computed with.
    """

    state: int
    trained: int
    matrices: float
    routed: float
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
    experts: int
    cache: int
    item: int

    @classmethod
    def of(cls, setup: Setup) -> _Scale:
        import jax

        stage = setup.stages[-1]
        state, rollouts = setup.state_shapes(stage), setup.rollout_shapes(stage)
        params = jax.eval_shape(setup.policy.init, setup.key)
        shapes = programs.weight_shapes(params)
        attention, mlp = shapes["layers"]["attention"], shapes["layers"]["mlp"]
        source = {} if setup.models.source is None else setup.models.source.config
        config = setup.config
        rows, length = rollouts.tokens.shape
        chosen = setup.trainable(stage).get("policy")
        leaves = jax.tree.leaves(params)
        moving = [True] * len(leaves) if chosen is None else jax.tree.leaves(chosen)
        trained = sum(x.size * x.dtype.itemsize for x, moves in zip(leaves, moving, strict=True) if moves)
        cache = jax.eval_shape(lambda: setup.policy.init_cache(rows, length))
        experts = mlp["up"].shape[1] if mlp["up"].ndim == 4 else 1
        return cls(
            state=sum(programs.state_bytes(state).values()),
            trained=trained,
            matrices=sum(x.size for x in jax.tree.leaves(shapes)),
            routed=sum(x.size for x in jax.tree.leaves(mlp) if x.ndim == 4),
            sizes=ModelSizes.of(setup),
            rows=rows,
            prompts=rollouts.num_prompts,
            length=length,
            new=config.rollout.max_new_tokens,
            width=attention["query"].shape[1],
            mlp=mlp["up"].shape[-1] * (source.get("num_experts_per_tok", 1) if experts > 1 else 1),
            layers=attention["query"].shape[0],
            heads=attention["query"].shape[2],
            kv=attention["key"].shape[2],
            experts=experts,
            cache=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) if stage.kind == "rollouts" else 0,
            item=2 if config.model.dtype == "bfloat16" else 4,
        )

    def training(self, chip: Chip, mesh: Mapping[str, int], micro: int) -> tuple[float, float]:
        """Bytes at the worst moment, and seconds of a step.

        What takes longest, as in `Times.roofline`, and what goes between devices in the midst of a layer, which waits
        for it: weights can be collected while others are used.
        """
        data, tensor, sequence, expert = (mesh[name] for name in ("data", "tensor", "sequence", "expert"))
        split = mesh["fsdp"] * sequence * expert  # ways that what is no expert is split; tokens are, with data
        devices, shards = data * split * tensor, split * tensor
        local = self.rows / micro / (data * split)
        token = self.width * self.item
        weights, foreign = self._weights(mesh)

        layer = local * self.length * (3 * self.mlp / tensor * self.item + (4 + 2 * expert) * token)
        gathered = 2 * weights / self.layers if foreign else 0
        gradient = self.trained / shards * (2 if micro > 1 else 1)
        inputs = local * self.length * token * self.layers
        memory = self.state / shards + gradient + inputs + layer + gathered + self._head(mesh)

        # Weights four times a micro-batch: forward, forward again, and for two gradients.
        flops = 4 * self.sizes.forward(self.rows, self.length, self.rows * self.new) / devices
        sent = 4 * micro * foreign + 4 * weights / split * (1 - 1 / data)
        sent += 4 * (sequence - 1) * self._cache(mesh)  # keys and values of the other parts of a device's rows
        states = 8 * self.layers * local * micro * self.length * token * (1 - 1 / tensor + expert - 1)
        seconds = max(flops / chip.flops, 4 * micro * weights / chip.bandwidth, sent / chip.interconnect)
        return memory, seconds + states / chip.interconnect

    def sampling(self, chip: Chip, mesh: Mapping[str, int], where: Mapping[str, int]) -> tuple[float, float]:
        """The same of sampling on `where`, with a copy of the parameters if that is not `mesh`, which keeps them."""
        (weights, foreign), cache = self._weights(where), self._cache(where)
        copied = 0.0 if where == mesh else weights
        memory = self.state * mesh["data"] / math.prod(mesh.values()) + copied + cache + self._head(where)
        # Twice a layer the states of a token are summed over the devices that its heads are split over.
        rows = self.rows / (math.prod(where.values()) / where["tensor"])
        states = 4 * self.layers * rows * self.width * self.item * (1 - 1 / where["tensor"])
        token = max((weights + cache) / chip.bandwidth, foreign / chip.interconnect) + states / chip.interconnect
        return memory, self.new * token + copied / chip.interconnect

    def _weights(self, mesh: Mapping[str, int]) -> tuple[float, float]:
        """Bytes of the weights that a device uses in a pass, and of these what it collects from others."""
        split, expert = mesh["fsdp"] * mesh["sequence"] * mesh["expert"], mesh["expert"]
        others, routed = (n * self.item / mesh["tensor"] for n in (self.matrices - self.routed, self.routed / expert))
        return others + routed, others * (1 - 1 / split) + routed * (1 - expert / split)

    def _cache(self, mesh: Mapping[str, int]) -> float:
        return self.cache / (math.prod(mesh.values()) / mesh["tensor"] * math.gcd(mesh["tensor"], self.kv))

    def _head(self, mesh: Mapping[str, int]) -> float:
        return 2 * self.sizes.head / mesh["tensor"] * self.item


def describe(ranked: Sequence[Layout]) -> str:
    """Layouts as a table to read, and what to put on the command line for the best."""
    rows = [["layout", "fits", "GiB", "s a step", "tokens/s", "MFU"]]
    for one in ranked:
        step = one.step or {}
        mesh, sampling = (
            "" if sizes is None else " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
            for sizes in (one.mesh, one.rollout_mesh)
        )
        seconds, rate, mfu = (step.get(name) for name in ("seconds", "tokens_per_second", "mfu"))
        rows.append(
            [
                f"{mesh or 'one device'}{sampling and f', sampling {sampling}'} micro_batches={one.micro_batches}",
                "yes" if one.fits else "NO",
                "?" if one.peak is None else f"{one.peak / GIB:.2f}",
                "?" if seconds is None else f"{seconds:.3g}",
                "?" if rate is None else f"{rate:,.0f}",
                "?" if mfu is None else f"{100 * mfu:.1f}%",
            ]
        )
    lines = summary.aligned(rows)
    lines += [f"{' '.join(one.overrides())}: {one.problem}" for one in ranked if one.problem]
    nothing = "none of these fits; try more with --tries, or a larger slice"
    best = ranked[0] if ranked and ranked[0].fits else None
    lines += [f"take: {' '.join(best.overrides())}" if best else nothing]
    return "\n".join([*lines, "", summary.NOTE])

"""The programs of a run, for devices that need not be there: from a configuration to what can be lowered.

Nothing is read but the configuration and the model's `config.json`: parameters, rollouts and caches are shapes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_post import data
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.models.cache import CACHE_AXES
from jaxrl_post.models.pretrained import known_configs
from jaxrl_post.models.quantize import Quantized
from jaxrl_post.rollout import SamplingParams
from jaxrl_post.rollout.slots import default_refill, together
from jaxrl_post.training import executables
from jaxrl_post.training import setup as setups
from jaxrl_post.training.config import Config, ConfigError
from jaxrl_post.training.environment_setup import Turns
from jaxrl_post.training.generation import Continued, Generation, compiled_generate
from jaxrl_post.training.given import GREEDY_REWARD
from jaxrl_post.training.setup import Setup
from jaxrl_post.training.splitting import split, unsplit_rows
from jaxrl_post.training.stages import Stage
from jaxrl_post.types import PyTree, Rollouts, TokenStats

PARTS = ("rollout", "score", "step", "evaluate")
COPY = "rollout/params"
"""Name of the program that lays the parameters out for sampling."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a run and the shapes that it is called with.

    Attributes:
        name: `rollout`, `rollout/params` (the copy of the parameters on `rollout.mesh`), `rollout/greedy` (for methods
            that compare with it), `score`, `evaluate/greedy`, `evaluate/sampled` or `step`; of a run with several
            stages `step/<stage>`.
        lower: gives what `.compile()` compiles.
        arguments: bytes on a device of what goes in, by kind.
        resident: bytes on a device of what stays there meanwhile and does not go in, by kind.
        cache: bytes on a device of the key-value cache that the program makes.
        rounds: of the loop over tokens, which only the data ends: the most that there can be.
        refills: rounds of the loop around it, where completions take each other's slots.
        tokens: tokens of all devices that it samples, scores or trains on.
        model_flops: what the model's definition asks of all devices, without anything that is computed again.
        needs: names of the programs that run before it in every step.
        configuration: what tells it from programs of other runs.
    """

    name: str
    lower: Callable[[], Any]
    arguments: dict[str, int]
    resident: dict[str, int]
    cache: int
    rounds: int
    tokens: int
    model_flops: float
    needs: tuple[str, ...] = ()
    configuration: str = ""
    refills: int = 1


@dataclasses.dataclass(frozen=True)
class _SizedTokenizer:
    """What planning needs of a tokenizer that is not here: how many ids there are, and which end a sequence."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int = 0

    def encode(self, text: str) -> list[int]:
        raise ConfigError(["the tokenizer is not here, and this configuration needs it to turn texts into tokens"])

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError

    def save(self, directory: str | os.PathLike[str]) -> None:
        raise NotImplementedError


class _PlannedSetup(Setup):
    """A setup whose data need not be there: what a method keeps for each prompt has `data.size` rows."""

    @property
    def num_prompts(self) -> int:
        return self.config.data.size


def plan(config: Config, devices: Sequence[Any]) -> Setup:
    """A run's parts on described devices, without its data, its weights and, if need be, its tokenizer.

    Args:
        config: loaded with `check_files=False`.
        devices: as many as the mesh has.

    Raises:
        ConfigError: if the mesh does not have as many devices.
    """
    wanted = math.prod(dataclasses.asdict(config.mesh).values())
    if wanted != len(devices):
        raise ConfigError(
            [
                f"mesh: the product of its sizes is {wanted}, but the topology has {len(devices)} devices; make them "
                f"the same (mesh.fsdp={len(devices)} where all others are 1), or pass --suggest"
            ]
        )
    made = setups.build(config, devices=devices, tokenizer=_tokenizer(config))
    return _PlannedSetup(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


def programs(setup: Setup, parts: Sequence[str] = PARTS) -> list[Program]:
    """The programs of a run: sampling, scoring, the steps of its stages, and sampling of held-out problems.

    Args:
        setup: from `plan`.
        parts: some of `PARTS`.
    """
    found: list[Program] = []
    for stage in setup.stages:
        state, rollouts = setup.state_shapes(stage), setup.rollout_shapes(stage)
        if "rollout" in parts:
            found += _copies(setup, stage, state)
            found += [_rollout(setup, stage, state, one) for one in _sampled(setup, stage)]
        if stage.kind == "rollouts" and "score" in parts:
            found.append(_score(setup, stage, state, rollouts))
        if "step" in parts:
            found.append(_step(setup, stage, state, rollouts))
        if stage is setup.stages[-1] and "evaluate" in parts:
            found += _evaluations(setup, state)
    return found


def _step(setup: Setup, stage: Stage, state: Any, rollouts: Rollouts) -> Program:
    sizes = ModelSizes.of(setup)
    batch = _placed(rollouts, setup.mesh)
    forward = sizes.forward(*_tokens(setup, rollouts))
    # Forward, gradient of what goes in, gradient of the parameters: which adapters alone hardly cost anything.
    updated = len(stage.method.trains) * stage.epochs * (3 if setup.config.model.lora is None else 2)
    return Program(
        setup.step_name(stage),
        lambda: setup.step(stage).lower(state, rollouts),
        state_bytes(state) | {"batch": _bytes(batch)},
        {},
        0,
        1,
        rollouts.tokens.size,
        forward * (updated + len(stage.method.roles - stage.method.trains)),
        (*(one.name for one in _copies(setup, stage, state)), *_sampled(setup, stage)),
        executables.identity(setup.config),
    )


def _score(setup: Setup, stage: Stage, state: Any, rollouts: Rollouts) -> Program:
    """Log-probs of a whole batch without a gradient, as a step computes those of its frozen roles."""
    score, params = setup.scores(stage)["policy"], state.params["policy"]
    unit: Any = getattr(score, "unit", stage.method.unit)
    fields = frozenset({"logp"})

    def run(params: PyTree, rollouts: Rollouts, key: jax.Array) -> TokenStats:
        if stage.micro_batches == 1:
            return score(params, rollouts, fields, key)
        pieces, _ = split(rollouts, (), stage.micro_batches, unit)
        stats = jax.lax.map(lambda piece: score(params, piece, fields, key), pieces)
        group = 1 if unit in ("token", "sequence") else rollouts.group_size
        return jax.tree.map(lambda x: unsplit_rows(x, group), stats)

    # Nothing may be computed while a mesh of described devices is set: keys are made before.
    batch, key = _placed(rollouts, setup.mesh), _key(setup, setup.mesh)

    def lower() -> Any:
        with jax.set_mesh(setup.mesh):
            return jax.jit(run).lower(params, batch, key)

    every = state_bytes(state)
    own = _bytes(params)
    return Program(
        "score",
        lower,
        {"parameters": own, "batch": _bytes(batch)},
        every | {"parameters": every["parameters"] - own},
        0,
        1,
        rollouts.tokens.size,
        ModelSizes.of(setup).forward(*_tokens(setup, rollouts)),
    )


def _sampled(setup: Setup, stage: Stage) -> tuple[str, ...]:
    """Names of the programs that a step of the stage samples with here."""
    if stage.kind != "rollouts":
        return ()
    here = () if setup.config.rollout.server is not None else ("rollout",)
    return (*here, "rollout/greedy") if GREEDY_REWARD in stage.method.wants else here


def _copies(setup: Setup, stage: Stage, state: Any) -> list[Program]:
    """The copy of the parameters that is sampled with, where they lie in another way for it."""
    move: Any = setup.to_rollout_mesh
    if move is None or not _sampled(setup, stage):
        return []
    params, every = state.params["policy"], state_bytes(state)
    own = _bytes(params)
    rest = every | {"parameters": every["parameters"] - own}
    return [Program(COPY, lambda: move.lower(params), {"parameters": own}, rest, 0, 1, 0, 0.0)]


def _sampling_params(setup: Setup, state: Any) -> Any:
    """Shapes of the parameters that are sampled with."""
    move: Any = setup.to_rollout_mesh
    params = state.params["policy"]
    return params if move is None else move.eval_shape(params)


def _rollout(setup: Setup, stage: Stage, state: Any, name: str) -> Program:
    """One of `_sampled`, as `Batches` has it."""
    if name == "rollout/greedy":
        return _sampling(setup, state, name, setup.generation(SamplingParams(greedy=True)), stage.batch_size)
    return _sampling(setup, state, name, setup.trained_generation(), stage.batch_size)


def _evaluations(setup: Setup, state: Any) -> Iterator[Program]:
    """What measuring on held-out problems samples, as `Evaluator` has it, if there are as many as may be."""
    config = setup.config
    options = config.eval
    if not (options.problems and config.rewards and (config.data.eval_files or not config.data.files)):
        return
    rows = config.rollout.prompts * config.curriculum.oversample * config.rollout.group_size
    warm = config.warm_start
    checked = warm.check_problems if warm is not None and warm.until is not None else 0
    greedy, each = min(rows, max(options.problems, checked)), min(max(1, rows // options.samples), options.problems)
    yield _sampling(setup, state, "evaluate/greedy", setup.generation(SamplingParams(greedy=True)), greedy)
    yield _sampling(setup, state, "evaluate/sampled", setup.generation(setup.sampling(), options.samples), each)


def _sampling(setup: Setup, state: Any, name: str, how: Generation, count: int) -> Program:
    """Groups of completions of `count` problems; where Python answers, as if nobody did."""
    params, mesh = _sampling_params(setup, state), setup.rollout_mesh
    length, new, group, parts = setup.prompt_length, how.max_new_tokens, how.group_size, how.parts
    begun = count * parts
    if how.tokens_per_step is not None:  # each completion is read again by itself, and goes on
        begun, length, new = count * group, length + new, how.tokens_per_step
    shapes = setup.prompt_shapes(how, count)
    going_on = isinstance(shapes, Continued)
    prompts = Continued(*(_placed(part, mesh) for part in shapes)) if going_on else _placed(shapes, mesh)
    key = _key(setup, mesh)

    def lower() -> Any:
        answered = how if isinstance(how.turns, Turns) else how._replace(turns=None)
        generate: Any = compiled_generate(setup.policy, answered)
        with jax.set_mesh(mesh):
            return generate.lower(params, prompts, key, version=0)

    every, own = state_bytes(state), _bytes(params)
    moved = 0 if setup.to_rollout_mesh is None else own
    rows = count * group
    dtype = None if how.cache_dtype is None else jnp.dtype(how.cache_dtype)

    def cache_of() -> Any:
        if how.cache_pages is not None:
            return setup.policy.init_cache(how.slots or rows, length + new, dtype, pages=how.cache_pages)
        if how.slots is not None and how.slots < rows:
            return setup.policy.init_cache(how.slots, length + new, dtype)
        prompts = setup.policy.init_cache(begun, length, dtype)
        return together(setup.policy, prompts, rows, rows // begun, length, new, dtype)

    with jax.set_mesh(mesh):
        cache = jax.eval_shape(cache_of)
    slots = min(how.slots or rows, rows)
    sizes = ModelSizes.of(setup)
    # A prompt is read once for all its completions, but for its last token, which gives each its first.
    read = sizes.forward(begun, length - 1, 0)
    return Program(
        name,
        lower,
        {"parameters": own, "batch": _bytes(prompts)},
        every | {"parameters": every["parameters"] + moved - own},
        sum(_cache_bytes(leaf, mesh) for leaf in jax.tree.leaves(cache)),
        -(-rows // slots) * new,
        rows * new,
        read + sizes.forward(rows, new, rows * new, before=length - 1),
        configuration=executables.identity(setup.config, how),
        refills=1 + -(-(rows - slots) // default_refill(slots)),
    )


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What a forward pass multiplies with.

    Attributes:
        per_token: elements of the matrices of all layers that a token goes through; of experts only those chosen.
        head: elements of the unembedding.
        attention: heads times their size, of all layers.
    """

    per_token: float
    head: int
    attention: int

    @classmethod
    def of(cls, setup: Setup) -> ModelSizes:
        """The sizes of a run's policy."""
        shapes = weight_shapes(jax.eval_shape(setup.policy.init, setup.key))
        source = {} if setup.models.source is None else setup.models.source.config
        chosen = source.get("num_experts_per_tok", 1)
        total = 0.0
        for leaf in jax.tree.leaves(shapes["layers"]["attention"]):
            total += leaf.size if leaf.ndim > 2 else 0  # others are scales and biases, stacked over layers
        for leaf in jax.tree.leaves(shapes["layers"]["mlp"]):
            experts = leaf.shape[1] if leaf.ndim == 4 else 1
            total += leaf.size * (chosen / experts if experts > 1 else 1) if leaf.ndim > 2 else 0
        query, head = shapes["layers"]["attention"]["query"].shape, shapes["embedding"].size
        return cls(total, head, query[0] * query[-2] * query[-1])

    def forward(self, rows: int, length: int, scored: int, *, before: int = 0) -> float:
        """Operations of `rows` rows of `length` tokens after `before` others, `scored` of all of which have logits."""
        seen = rows * (length * before + length * (length + 1) / 2)
        return 2.0 * (rows * length * self.per_token + scored * self.head) + 4.0 * self.attention * seen


def weight_shapes(params: PyTree) -> PyTree:
    """Shapes of parameters, of quantized ones those of the weights that they stand for."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params, is_leaf=lambda x: isinstance(x, Quantized)
    )


def _tokens(setup: Setup, rollouts: Rollouts) -> tuple[int, int, int]:
    rows, length = rollouts.tokens.shape
    return rows, length, rows * min(length, setup.config.rollout.max_new_tokens)


def _tokenizer(config: Config) -> data.Tokenizer | None:
    """None for the one that the configuration names; what is known of it where it is not here."""
    path, name = config.model.path, config.data.tokenizer
    if name is None or os.path.isdir(name):
        return None
    known = known_configs().get(path or "")
    if known is None or name != path:
        return None
    ends = known.get("eos_token_id", 0)
    return _SizedTokenizer(known["vocab_size"], tuple(ends) if isinstance(ends, list) else (int(ends),))


def _key(setup: Setup, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct((), setup.key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a batch, its leading axes over the devices."""
    layout = mesh_lib.rollout_shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


def _bytes(tree: PyTree) -> int:
    """Of shapes with shardings, on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * size
    return total


def state_bytes(state: Any) -> dict[str, int]:
    """Of a train state on one device, by kind."""
    rest = (state.step, state.method_state, state.curriculum_state, state.key)
    return {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state), "other state": _bytes(rest)}


def _cache_bytes(leaf: Any, mesh: Mesh) -> int:
    rows = ("batch", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ()
    names = CACHE_AXES[: leaf.ndim] if leaf.ndim > 3 else rows
    spec = mesh_lib.spec(names, leaf.shape, dict(mesh.shape))
    return math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize

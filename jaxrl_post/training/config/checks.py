"""What must hold between the fields that say how training runs: sizes that divide, roles, schedules, devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from jaxrl_post.training.config import content_checks
from jaxrl_post.training.config.content_checks import PREFERENCE, refuse_unused, uses_rollouts
from jaxrl_post.training.config.errors import ConfigError, Problems, nearest
from jaxrl_post.training.config.schema import Config, OptimizerConfig, yaml_key

GROUP_BASELINE = frozenset({"grpo", "mc_grpo"})
"""Methods that compare the completions of one prompt with each other, whatever their keywords."""
GROUP_BASELINE_CHOICES = frozenset({"leave_one_out"})
"""Choices of a method's `baseline` that do so."""


def check_fields(config: Config, problems: Problems, check_files: bool = True) -> None:
    """Everything between fields that does not need the method itself."""
    _model(config, problems)
    content_checks.check_data(config, problems)
    content_checks.check_rewards(config, problems)
    _sizes(config, problems)
    if config.training is not None and config.training.optimizer is not None:
        _optimizer(config.training.optimizer, "training.optimizer", config.training.steps, problems)
    _warm_start(config, problems)
    if check_files:
        content_checks.check_files_exist(config, problems)


def _model(config: Config, problems: Problems) -> None:
    model = config.model
    if model is None:
        return
    if model.path is not None:
        problems.add(
            "model.path", "loading a model is not available yet; leave it out and give width, layers, ...", model.path
        )
    if not problems.ok("model.width", "model.heads", "model.kv_heads", "model.head_dim"):
        return
    if model.kv_heads is not None and model.heads % model.kv_heads:
        problems.add(
            "model.kv_heads",
            f"must divide model.heads = {model.heads}; try {_nearest_divisor(model.heads, model.kv_heads)}",
            model.kv_heads,
        )
    if model.head_dim is None and model.width % model.heads:
        problems.add(
            "model.width",
            f"must be a multiple of model.heads = {model.heads} where model.head_dim is not given; "
            f"try {math.ceil(model.width / model.heads) * model.heads}",
            model.width,
        )
        return
    head_dim = model.width // model.heads if model.head_dim is None else model.head_dim
    if head_dim % 2:
        which = "model.head_dim" if model.head_dim is not None else "model.width"
        problems.add(
            which,
            f"gives heads of size {head_dim}, which must be even for rotary positions; "
            f"set model.head_dim to {head_dim + 1}",
            model.head_dim if model.head_dim is not None else model.width,
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def _sizes(config: Config, problems: Problems) -> None:
    rollout, training, mesh = config.rollout, config.training, config.mesh
    if config.method is None or not problems.ok("method.name"):
        return
    name, online = config.method.name, uses_rollouts(config)
    if not online:
        why = f"method {name} samples no completions to train on"
        if rollout is not None:
            refuse_unused(rollout, "rollout", ("group_size", "prompts"), why, problems)
        if config.curriculum is not None:
            refuse_unused(config.curriculum, "curriculum", ("oversample",), why, problems)
    elif training is not None:
        why = f"method {name} trains on rollout.prompts * rollout.group_size completions"
        refuse_unused(training, "training", ("batch_size",), why, problems)
    if online and problems.ok("rollout.group_size", "rollout.prompts", "curriculum", "data.size"):
        baseline = (config.method.keywords or {}).get("baseline")
        compares = name in GROUP_BASELINE or baseline in GROUP_BASELINE_CHOICES
        oversample = config.curriculum.oversample
        if rollout.group_size == 1 and compares:
            problems.add(
                "rollout.group_size",
                f"{name} compares the completions of a prompt with each other, so that a group of one has no "
                "advantage; set it to 2 or more (8 is usual), or use a method without a group baseline (ppo)",
                1,
            )
        elif rollout.group_size == 1 and oversample > 1:
            problems.add(
                "curriculum.oversample",
                "prefers groups whose rewards vary, and one completion cannot; set rollout.group_size to 2 or more",
                oversample,
            )
        if config.data is not None and config.data.task and rollout.prompts * oversample > config.data.size:
            problems.add(
                "data.size",
                f"a step samples rollout.prompts * curriculum.oversample = {rollout.prompts * oversample} problems; "
                "make it at least that",
                config.data.size,
            )
        if name == "mc_grpo" and rollout.group_size % 2 == 0:
            problems.warnings.append(
                f"rollout.group_size = {rollout.group_size}: mc_grpo drops the completion with the median "
                f"reward, which only an odd group has; use {rollout.group_size + 1}"
            )
    for axis in ("sequence", "expert"):
        if mesh is not None and problems.ok(f"mesh.{axis}") and getattr(mesh, axis) > 1:
            problems.add(
                f"mesh.{axis}", "splitting over this axis is not available yet; set it to 1", getattr(mesh, axis)
            )
    if (
        mesh is not None
        and problems.ok("mesh.tensor", "model")
        and mesh.tensor > 1
        and config.model.heads % mesh.tensor
    ):
        problems.warnings.append(
            f"mesh.tensor = {mesh.tensor}: does not divide model.heads = {config.model.heads}, so every device keeps "
            "all heads"
        )
    if config.eval is not None and problems.ok("eval.k", "eval.samples") and config.eval.k > config.eval.samples:
        problems.add(
            "eval.k", f"must be at most eval.samples = {config.eval.samples}; lower it or sample more", config.eval.k
        )


def check_batch(config: Config, unit: str, problems: Problems) -> None:
    """Micro-batches against the batch and the piece that the method may not split, and both against the mesh.

    Args:
        config: the configuration.
        unit: `token`, `sequence`, `group` or `batch`, of the method.
        problems: takes what is wrong.
    """
    if not problems.ok("rollout", "training", "mesh", "method"):
        return
    micro, shards = config.training.micro_batches, config.mesh.data * config.mesh.fsdp
    if uses_rollouts(config):
        groups, size = config.rollout.prompts, config.rollout.group_size
        source = f"rollout.prompts * rollout.group_size = {groups} * {size} = {groups * size} completions"
        change = "rollout.prompts"
    else:
        groups, size = config.training.batch_size, 2 if config.method.name in PREFERENCE else 1
        source = f"training.batch_size = {groups} " + ("pairs" if size == 2 else "examples")
        change = "training.batch_size"
    pieces = {"group": groups, "batch": 1}.get(unit, groups * size)
    if pieces % micro:
        fix = {
            "group": f"groups of one prompt must stay whole: use a divisor of {groups}",
            "batch": "the method needs the whole batch at once: set it to 1",
        }.get(unit, f"use a divisor of {pieces}")
        problems.add("training.micro_batches", f"does not divide {source}; {fix}", micro)
    elif (groups * size // micro) % shards:
        each = f" in each of {micro} micro-batches" if micro > 1 else ""
        multiple = micro * shards // math.gcd(micro * shards, size)
        problems.add(
            "mesh",
            f"data * fsdp = {config.mesh.data} * {config.mesh.fsdp} = {shards} devices cannot share {source}{each} "
            f"evenly; make {change} a multiple of {multiple}",
        )
    warm = config.warm_start
    if warm is not None and problems.ok("warm_start.batch_size") and warm.batch_size % shards:
        problems.add(
            "warm_start.batch_size",
            f"must be a multiple of mesh.data * mesh.fsdp = {shards}; "
            f"try {math.ceil(warm.batch_size / shards) * shards}",
            warm.batch_size,
        )


def check_roles(config: Config, needs: Iterable[str], trains: Iterable[str], problems: Problems) -> None:
    """The roles given against those that the method needs, and where each comes from.

    Args:
        config: the configuration.
        needs: roles whose stats the method reads.
        trains: roles whose parameters it updates.
        problems: takes what is wrong.
    """
    name, roles = config.method.name, config.roles or {}
    needed = sorted(role for role in needs if role != "policy" and "/" not in role)
    for role, options in roles.items():
        key = f"roles.{role}"
        if options is None or not problems.ok(key):
            continue
        if role == "policy":
            problems.add(key, "is the model that is trained, described under model; remove it here")
            continue
        if role not in needed:
            settings = f"method {name} as configured"
            have = f"; {nearest(role, needed)}" if needed else "; it needs no role beside the policy: remove it"
            problems.add(key, f"{settings} does not read this role{have}")
            continue
        if options.source != "policy" and (options.source not in needed or options.source == role):
            others = ["policy", *(other for other in needed if other != role)]
            problems.add(f"{key}.from", f"must be another role; {nearest(options.source, others)}", options.source)
        if options.refresh == "every":
            if role in trains:
                problems.add(f"{key}.refresh", f"method {name} trains this role itself; use frozen", "every")
            elif options.every is None:
                problems.add(f"{key}.every", "is missing; give the steps between renewals, e.g. 50")
        else:
            refuse_unused(options, key, ("every", "mix"), "refresh is frozen", problems)
    for role in roles:
        chain = [role]
        while (source := getattr(roles.get(chain[-1]), "source", "policy")) not in ("policy", None):
            if source in chain:
                if source == role and len(chain) > 1 and role == min(chain):
                    problems.add(f"roles.{role}.from", f"goes in a circle: {' -> '.join([*chain, role])}; break it")
                break
            chain.append(source)


def _optimizer(optimizer: OptimizerConfig, path: str, steps: int | None, problems: Problems) -> None:
    if problems.ok(f"{path}.name"):
        if optimizer.name == "sgd":
            refuse_unused(optimizer, path, ("b2", "eps", "weight_decay"), "the optimiser is sgd", problems)
        elif optimizer.name == "adam":
            refuse_unused(optimizer, path, ("weight_decay",), "the optimiser is adam; adamw decays weights", problems)
    if not problems.ok(f"{path}.schedule", f"{path}.warmup_steps"):
        return
    if optimizer.schedule == "constant":
        refuse_unused(optimizer, path, ("end_fraction",), "the schedule is constant", problems)
    steps_key = path.replace(".optimizer", ".steps")
    if steps is not None and optimizer.warmup_steps and optimizer.warmup_steps >= steps:
        message = f"the step size is still rising at the end, {steps_key} = {steps}; make it smaller"
        if optimizer.schedule == "constant":
            problems.warnings.append(f"{path}.warmup_steps = {optimizer.warmup_steps}: {message}")
        else:
            problems.add(f"{path}.warmup_steps", message, optimizer.warmup_steps)


def _warm_start(config: Config, problems: Problems) -> None:
    warm = config.warm_start
    if warm is None or not problems.ok("warm_start.until", "warm_start.check_every"):
        return
    if warm.optimizer is not None:
        _optimizer(warm.optimizer, "warm_start.optimizer", warm.steps, problems)
    if warm.until is None:
        why = "warm_start.until is not given, so nothing is checked"
        refuse_unused(warm, "warm_start", ("check_every", "check_problems"), why, problems)
        return
    if warm.check_every is None:
        problems.add("warm_start.check_every", "is missing; give the steps between the checks of until, e.g. 5")
    elif problems.ok("warm_start.steps") and warm.check_every > warm.steps:
        problems.add(
            "warm_start.check_every",
            f"is more than warm_start.steps = {warm.steps}, so until is never checked",
            warm.check_every,
        )
    if problems.ok("rewards") and not config.rewards:
        problems.add("warm_start.until", "accuracy needs a reward; give rewards, e.g. [{name: task_score}]", warm.until)


def check_devices(config: Config, device_count: int) -> list[str]:
    """Hold the mesh against the number of devices.

    Args:
        config: the configuration.
        device_count: devices there are, over all hosts.

    Returns:
        Warnings, e.g. about devices that stay idle.

    Raises:
        ConfigError: the mesh needs more devices than there are.
    """
    sizes = dataclasses.asdict(config.mesh)
    needed = math.prod(sizes.values())
    shape = " * ".join(f"{yaml_key(field)} {sizes[field.name]}" for field in dataclasses.fields(config.mesh))
    if needed > device_count:
        raise ConfigError(
            [
                f"mesh: {shape} = {needed} devices, but there are {device_count}; make an axis smaller (CPU devices "
                f"are simulated with XLA_FLAGS=--xla_force_host_platform_device_count={needed})"
            ]
        )
    if needed < device_count:
        return [f"mesh: {shape} = {needed} devices of {device_count}; the others stay idle"]
    return []

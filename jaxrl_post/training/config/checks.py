"""What must hold between the fields that say how training runs: sizes that divide, roles, schedules, devices."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from jaxrl_post.models.lora import Lora
from jaxrl_post.training.config import content_checks
from jaxrl_post.training.config.content_checks import changed, refuse_unused
from jaxrl_post.training.config.errors import ConfigError, Problems
from jaxrl_post.training.config.fields import yaml_key
from jaxrl_post.training.config.role_checks import check_roles
from jaxrl_post.training.config.schema import NOT_SIZES, Config, MeshConfig, OptimizerConfig, RolloutConfig
from jaxrl_post.training.config.subgroup_checks import check_subgroups
from jaxrl_post.training.config.turn_checks import check_turns
from jaxrl_post.training.splitting import coarsest
from jaxrl_post.types import Method


def check(config: Config, made: Method | None, problems: Problems, check_files: bool = True) -> None:
    """Everything that must hold between fields, and between fields and the method.

    What a method wants (groups, pairs, roles) is asked of the method itself, so that a new one needs no change here.

    Args:
        config: the configuration; a field that could not be read is None.
        made: the method, None if it could not be made; what depends on it is then passed over.
        problems: takes what is wrong.
        check_files: whether files and packages that the run needs must be there.
    """
    _model(config, problems)
    content_checks.check_data(config, made, problems)
    content_checks.check_rewards(config, made, problems)
    if made is not None:
        combining = [method for method in (made, *made.stages.values()) if method.combine is not None]
        if combining and config.model is not None and config.model.router_loss is not None:
            why = f"cannot be added to {config.method.name}, which weighs its terms' gradients itself; leave it out"
            problems.add("model.router_loss", why)
        _source(config, made, problems)
        _slots(config, made, problems)
        _over_steps(config, made, problems)
        check_turns(config, made, problems)
        if made.learns_from == "rollouts":
            _groups(config, made, problems)
            check_subgroups(config, made, problems)
    _mesh(config, problems)
    _evaluation(config, problems)
    training = config.training
    if training is not None and training.optimizer is not None:
        known = problems.ok("training.steps", "training.epochs")
        _optimizer(
            training.optimizer, "training.optimizer", training.steps * training.epochs if known else None, problems
        )
        for role, options in (config.roles or {}).items():
            if options is not None and options.optimizer is not None:
                _optimizer(options.optimizer, f"roles.{role}.optimizer", None, problems)
    _warm_start(config, problems)
    if config.run_dir == "":
        problems.add("run_dir", "must name a directory", "")
    if check_files:
        content_checks.check_files_exist(config, problems)
    if made is not None:
        _batch(config, made, problems)
        check_roles(config, made, problems, check_files)


def _model(config: Config, problems: Problems) -> None:
    model = config.model
    if model is None:
        return
    if model.path is not None:
        names = [field.name for field in dataclasses.fields(model) if field.name not in NOT_SIZES]
        refuse_unused(model, "model", names, "the checkpoint of model.path has sizes of its own", problems)
        if model.revision is not None and Path(model.path).is_dir():
            problems.add("model.revision", "does not apply: model.path is a directory; leave it out", model.revision)
    else:
        refuse_unused(model, "model", ("ignore", "revision"), "there is no model.path", problems)
    if model.quantize not in (None, "none") and model.remat == "none":
        problems.warnings.append(
            "model.quantize with model.remat = none: the backward pass keeps every weight in full; set model.remat to "
            "full or dots"
        )
    if model.param_dtype == "bfloat16" and model.lora is None and problems.ok("model.lora"):
        problems.warnings.append(
            "model.param_dtype = bfloat16 without model.lora: there is no float32 copy of the parameters or of Adam's "
            "means, and at usual learning rates most updates are rounded away; set it to float32 (model.dtype: "
            "bfloat16 computes in bfloat16 all the same)"
        )
    if model.router_loss is not None and model.path is None and problems.ok("model.path", "model.lora"):
        problems.add(
            "model.router_loss", "is for a model with experts, and one that is built here has none; leave it out"
        )
    if model.quantize not in (None, "none") and model.lora is None:
        problems.add(
            "model.quantize", "freezes the projections, and without model.lora they are what is trained", model.quantize
        )
    if model.lora is not None and problems.ok("model.lora"):
        try:
            Lora(**{name: value for name, value in vars(model.lora).items() if name != "path"}).checked()
        except (ValueError, TypeError) as error:
            problems.add("model.lora", str(error))
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


def _source(config: Config, made: Method, problems: Problems) -> None:
    rollout, name = config.rollout, config.method.name
    if made.learns_from != "rollouts":
        why = f"method {name} samples no completions to train on"
        if rollout is not None:
            names = ("group_size", "prompts", "budgets", "budget_prompt", "exits", "server")
            refuse_unused(rollout, "rollout", names, why, problems)
            if config.eval is not None and problems.ok("eval.problems") and config.eval.problems == 0:
                refuse_unused(
                    rollout,
                    "rollout",
                    ("mesh", "slots", "cache_dtype", "stop"),
                    f"{why}, and eval.problems is 0",
                    problems,
                )
        if config.curriculum is not None:
            refuse_unused(config.curriculum, "curriculum", ("oversample",), why, problems)
    elif rollout is not None and rollout.server is not None:
        why = "rollout.server samples whole completions that nobody answers, and is waited for"
        refuse_unused(rollout, "rollout", ("environment", "exits", "tokens_per_step", "ahead", "stop"), why, problems)
        if rollout.server.weights is None:
            why = "rollout.server.weights is null, and the server keeps its weights"
            refuse_unused(rollout.server, "rollout.server", ("every",), why, problems)
        if config.data is not None:
            refuse_unused(config.data, "data", ("environment",), why, problems)
    if made.learns_from == "rollouts" and config.training is not None:
        why = f"method {name} trains on rollout.prompts * rollout.group_size completions"
        refuse_unused(config.training, "training", ("batch_size",), why, problems)


def _groups(config: Config, made: Method, problems: Problems) -> None:
    if not problems.ok("rollout.group_size", "rollout.prompts", "curriculum", "data.size"):
        return
    rollout, oversample = config.rollout, config.curriculum.oversample
    if rollout.group_size < made.min_group:
        problems.add(
            "rollout.group_size",
            f"{config.method.name} compares the completions of a prompt with each other, and a group of fewer than "
            f"{made.min_group} has no advantage; set it to {made.min_group} or more (8 is usual), or use a method "
            "without a group baseline (ppo)",
            rollout.group_size,
        )
    elif rollout.group_size == 1 and oversample > 1:
        problems.add(
            "curriculum.oversample",
            "prefers groups whose rewards vary, and one completion cannot; set rollout.group_size to 2 or more",
            oversample,
        )
    if config.data is not None and not config.data.files and rollout.prompts * oversample > config.data.size:
        problems.add(
            "data.size",
            f"a step samples rollout.prompts * curriculum.oversample = {rollout.prompts * oversample} problems; "
            "make it at least that",
            config.data.size,
        )


def _mesh(config: Config, problems: Problems) -> None:
    mesh = config.mesh
    if mesh is None:
        return
    if config.data is not None and config.rollout is not None and problems.ok("mesh.sequence", "data", "rollout"):
        prompt, new = config.data.max_prompt_length, config.rollout.max_new_tokens
        if left := (prompt + new) % mesh.sequence:
            problems.add(
                "mesh.sequence",
                f"does not divide the positions of a row, data.max_prompt_length + rollout.max_new_tokens = {prompt} + "
                f"{new} = {prompt + new}; set rollout.max_new_tokens to {new + mesh.sequence - left}, say",
                mesh.sequence,
            )
    if config.rollout is not None and config.rollout.mesh is not None and problems.ok("rollout", "mesh"):
        _rollout_mesh(config.rollout, config.rollout.mesh, mesh, problems)
    drawn = problems.ok("mesh.tensor", "model") and config.model.path is None
    if drawn and mesh.tensor > 1 and config.model.heads % mesh.tensor:
        problems.warnings.append(
            f"mesh.tensor = {mesh.tensor}: does not divide model.heads = {config.model.heads}, so every device keeps "
            "all heads"
        )


def _rollout_mesh(rollout: RolloutConfig, mesh: MeshConfig, training: MeshConfig, problems: Problems) -> None:
    devices, own = (math.prod(dataclasses.asdict(one).values()) for one in (mesh, training))
    if devices != own:
        problems.add(
            "rollout.mesh",
            f"is {devices} devices, but mesh is {own}; it lays out the same ones: make the products equal, or set it "
            "to null",
        )
    rows, ways = rollout.prompts * rollout.group_size, devices // mesh.tensor
    if rows % ways:
        problems.warnings.append(
            f"rollout.mesh: {ways} devices cannot share rollout.prompts * rollout.group_size = {rows} completions "
            "evenly, so some repeat the work of others; give more of the devices to tensor"
        )


def _slots(config: Config, made: Method, problems: Problems) -> None:
    rollout = config.rollout
    if rollout is not None and rollout.cache_pages is not None and problems.ok("rollout", "data", "mesh"):
        mesh = rollout.mesh or config.mesh
        ways = math.prod(dataclasses.asdict(mesh).values()) // mesh.tensor
        if rollout.cache_pages % ways:
            nearest = -(-rollout.cache_pages // ways) * ways
            why = f"{ways} devices that share the completions cannot share so many evenly; try {nearest}"
            problems.add("rollout.cache_pages", why, rollout.cache_pages)
        if rollout.environment is not None or rollout.exits is not None:
            why = "is for what one program samples to its end: no rollout.environment, no rollout.exits; leave it out"
            problems.add("rollout.cache_pages", why, rollout.cache_pages)
    if rollout is None or rollout.slots is None or not problems.ok("rollout", "curriculum", "mesh"):
        return
    if rollout.exits is not None:
        problems.add("rollout.slots", "does not apply to rollout.exits, whose groups are serial; leave it out", None)
    devices = rollout.mesh or config.mesh
    ways = math.prod(dataclasses.asdict(devices).values()) // devices.tensor
    if rollout.slots % ways:
        nearest = -(-rollout.slots // ways) * ways
        problems.add("rollout.slots", f"{ways} devices cannot share so many evenly; try {nearest}", rollout.slots)
    total = rollout.prompts * rollout.group_size * config.curriculum.oversample
    if made.learns_from == "rollouts" and rollout.slots >= total:
        problems.add(
            "rollout.slots",
            f"a step samples {total} completions (rollout.prompts * rollout.group_size * curriculum.oversample), and "
            "all of them at a time without it; give fewer, or leave it out",
            rollout.slots,
        )


def _over_steps(config: Config, made: Method, problems: Problems) -> None:
    """Completions that outlast the step they begin in."""
    rollout = config.rollout
    if rollout is None or not problems.ok("rollout"):
        return
    if made.learns_from != "rollouts":
        why = f"method {config.method.name} learns from given completions"
        refuse_unused(rollout, "rollout", ("tokens_per_step", "ahead"), why, problems)
        return
    if rollout.environment is not None:
        why = "rollout.environment is in Python, which is asked turn by turn"
        refuse_unused(rollout, "rollout", ("tokens_per_step", "ahead"), why, problems)
    if rollout.tokens_per_step is None:
        return
    if rollout.tokens_per_step >= rollout.max_new_tokens:
        why = f"lets every completion end in its step, as rollout.max_new_tokens = {rollout.max_new_tokens}"
        problems.add("rollout.tokens_per_step", f"{why}; give fewer, or leave it out", rollout.tokens_per_step)
    if made.partial and rollout.group_size > 1:
        why = "would have each wait for the others of its group; set it to 1, or leave rollout.tokens_per_step out"
        problems.add(
            "rollout.group_size", f"{config.method.name} learns from what has not ended, and {why}", rollout.group_size
        )
    others = {name: getattr(rollout, name) for name in ("budgets", "exits", "slots", "cache_pages")}
    clashing = [f"rollout.{name}" for name, value in others.items() if value is not None]
    if config.data is not None and config.data.environment is not None:
        clashing.append("data.environment")
    for key in clashing:
        problems.add("rollout.tokens_per_step", f"is for plain groups of completions, not for {key}; leave one out")


def _batch(config: Config, made: Method, problems: Problems) -> None:
    # Micro-batches against the batch and the piece that the method may not split, and both against the mesh.
    if not problems.ok("rollout", "training", "mesh", "method"):
        return
    micro, mesh = config.training.micro_batches, config.mesh
    shards = mesh.data * mesh.fsdp * mesh.expert
    if made.learns_from == "rollouts":
        groups, size = config.rollout.prompts, config.rollout.group_size
        source = f"rollout.prompts * rollout.group_size = {groups} * {size} = {groups * size} completions"
        change = "rollout.prompts"
    else:
        groups, size = config.training.batch_size, 2 if made.learns_from == "pairs" else 1
        source = f"training.batch_size = {groups} " + ("pairs" if size == 2 else "examples")
        change = "training.batch_size"
    share = config.training.share_prompts
    if share and size == 1:
        why = "one completion of a prompt has nobody to share it with; leave it out, or sample groups"
        problems.add("training.share_prompts", why, share)
    if share:
        source += ", those of a prompt in one row (training.share_prompts),"
    rows = 1 if share else size
    unit = coarsest(made.unit, "group") if share else made.unit
    pieces = {"group": groups, "batch": 1}.get(unit, groups * size)
    if pieces % micro:
        fix = {
            "group": f"groups of one prompt must stay whole: use a divisor of {groups}",
            "batch": "the method needs the whole batch at once: set it to 1",
        }.get(unit, f"use a divisor of {pieces}")
        problems.add("training.micro_batches", f"does not divide {source}; {fix}", micro)
    elif (groups * rows // micro) % shards:
        each = f" in each of {micro} micro-batches" if micro > 1 else ""
        multiple = micro * shards // math.gcd(micro * shards, rows)
        problems.add(
            "mesh",
            f"data * fsdp * expert = {mesh.data} * {mesh.fsdp} * {mesh.expert} = {shards} devices cannot share "
            f"{source}{each} evenly; make {change} a multiple of {multiple}",
        )
    warm = config.warm_start
    if warm is not None and problems.ok("warm_start.batch_size") and warm.batch_size % shards:
        problems.add(
            "warm_start.batch_size",
            f"must be a multiple of mesh.data * mesh.fsdp * mesh.expert = {shards}; "
            f"try {math.ceil(warm.batch_size / shards) * shards}",
            warm.batch_size,
        )


def _evaluation(config: Config, problems: Problems) -> None:
    options, data = config.eval, config.data
    if options is None:
        return
    if problems.ok("eval.k", "eval.samples") and options.k > options.samples:
        problems.add("eval.k", f"must be at most eval.samples = {options.samples}; lower it or sample more", options.k)
    if data is None or not problems.ok("data.files", "data.eval_files", "eval.problems", "eval.every"):
        return
    asked = changed(options, ("problems", "every")) if options.problems else []
    if asked and data.files and not data.eval_files:  # tasks and environments hold problems out by themselves
        given = ", ".join(f"eval.{name} = {getattr(options, name)}" for name in asked)
        problems.warnings.append(
            f"{given}: without data.eval_files nothing is held out, and nothing will be measured while training; give "
            "data.eval_files, or set eval.problems to 0"
        )


def _optimizer(optimizer: OptimizerConfig, path: str, updates: int | None, problems: Problems) -> None:
    if problems.ok(f"{path}.name"):
        if optimizer.name == "sgd":
            refuse_unused(optimizer, path, ("b2", "eps", "weight_decay"), "the optimiser is sgd", problems)
            if problems.ok(f"{path}.b1") and optimizer.b1 == 0:
                refuse_unused(optimizer, path, ("mu_dtype",), "sgd keeps no momentum where b1 is 0", problems)
        elif optimizer.name == "adam":
            refuse_unused(optimizer, path, ("weight_decay",), "the optimiser is adam; adamw decays weights", problems)
    if not problems.ok(f"{path}.schedule", f"{path}.warmup_steps"):
        return
    if optimizer.schedule == "constant":
        refuse_unused(optimizer, path, ("end_fraction",), "the schedule is constant", problems)
    if updates is not None and optimizer.warmup_steps and optimizer.warmup_steps >= updates:
        # No error, because a run that is cut to two steps for a quick try is one of these.
        problems.warnings.append(
            f"{path}.warmup_steps = {optimizer.warmup_steps}: the step size is still rising at the last of the "
            f"{updates} updates; make it smaller, or train for more steps"
        )


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

"""What must hold of the roles: those that the method reads, and sources that exist and do not go in a circle."""

from __future__ import annotations

from pathlib import Path

from jaxrl_post.models.hub import HUB
from jaxrl_post.training.config.content_checks import refuse_unused
from jaxrl_post.training.config.errors import Problems, nearest
from jaxrl_post.training.config.schema import BASE, Config, RoleConfig
from jaxrl_post.types import Method


def check_roles(config: Config, made: Method, problems: Problems, check_files: bool) -> None:
    """The roles that are given against those that the method reads, and where each comes from.

    Args:
        config: the configuration; a field that could not be read is None.
        made: the method.
        problems: takes what is wrong.
        check_files: whether the directories of other runs must be there.
    """
    name, roles = config.method.name, config.roles or {}
    needed = sorted(made.roles - {"policy"})
    for role, options in roles.items():
        key = f"roles.{role}"
        if options is None or not problems.ok(key):
            continue
        if role == "policy":
            if any(source in ("policy", *needed) for source in options.sources):
                problems.add(
                    key,
                    "is the model that is trained, described under model; give from: the directory of a run to start "
                    "it from that run's policy, or remove it here",
                )
                continue
            if len(options.sources) == 1 and is_checkpoint(options.sources[0]):
                problems.add(key, "starts from a checkpoint by model.path; give it there", options.sources[0])
                continue
        elif role not in needed:
            settings = f"method {name} as configured"
            have = f"; {nearest(role, needed)}" if needed else "; it needs no role beside the policy: remove it"
            problems.add(key, f"{settings} does not read this role{have}")
            continue
        if options.optimizer is not None and role not in made.trains:
            problems.add(f"{key}.optimizer", f"does not apply: method {name} does not train this role; leave it out")
        if options.sources == (BASE,):
            _check_base(config, role, made, key, problems)
            continue
        bases = [other for other, given in roles.items() if given is not None and given.sources == (BASE,)]
        if followed := sorted(set(options.sources) & set(bases)):
            problems.add(
                f"{key}.from", f"{followed[0]} is the base and has no weights of its own; give base", followed[0]
            )
            continue
        others = [other for other in ("policy", *needed) if other != role]
        runs = _check_sources(options, key, others, problems, check_files)
        _check_weights(options, key, problems)
        if options.refresh == "every":
            if role in made.trains:
                problems.add(f"{key}.refresh", f"method {name} trains this role itself; use frozen", "every")
            elif runs:
                problems.add(
                    f"{key}.refresh", f"renews from roles, but {runs[0]} is a directory, which stays as it is", "every"
                )
            elif options.every is None:
                problems.add(f"{key}.every", "is missing; give the steps between renewals, e.g. 50")
        else:
            refuse_unused(options, key, ("every", "mix"), "refresh is frozen", problems)
    _check_circles({role: options for role, options in roles.items() if options is not None}, problems)


def is_checkpoint(source: str) -> bool:
    """Whether a role's source is a Hugging Face checkpoint: its directory, one that `convert` made, or on the hub."""
    directory = Path(source)
    here = (directory / "config.json").is_file() and not (directory / "config.yaml").is_file()
    return here or source.startswith(HUB)


def _check_base(config: Config, role: str, made: Method, key: str, problems: Problems) -> None:
    if config.model is not None and config.model.lora is None:
        problems.add(f"{key}.from", "base is the model without its adapters, and model.lora gives it none", BASE)
    if role in made.trains:
        problems.add(
            f"{key}.from", f"method {config.method.name} trains this role, so it needs weights of its own", BASE
        )
    refuse_unused(config.roles[role], key, ("weights", "refresh", "every", "mix"), "base never changes", problems)


def _check_sources(
    options: RoleConfig, key: str, others: list[str], problems: Problems, check_files: bool
) -> list[str]:
    # A source that is no role is the directory of a run; a bare word that is neither is taken for a misspelt role.
    runs = [source for source in options.sources if source not in others]
    if not options.sources:
        problems.add(f"{key}.from", "is empty; give a role or the directory of a run")
    for source in runs:
        directory = Path(source)
        if "/" not in source and not directory.is_dir():
            problems.add(
                f"{key}.from",
                f"must be another role, or the directory of a run or checkpoint; {nearest(source, others)}",
                source,
            )
        elif check_files and not ("://" in source or (directory / "config.yaml").is_file() or is_checkpoint(source)):
            problems.add(
                f"{key}.from",
                f"no run in this directory (looked from {Path.cwd()}): it holds no config.yaml, nor the config.json of "
                "a Hugging Face checkpoint; correct the path, or give hf://owner/name for a model of the hub",
                source,
            )
    return runs


def _check_weights(options: RoleConfig, key: str, problems: Problems) -> None:
    weights, count = options.weights, len(options.sources)
    if weights is None:
        return
    if count == 1:
        problems.add(f"{key}.weights", "does not apply: there is one source; leave it out", list(weights))
    elif len(weights) != count:
        problems.add(f"{key}.weights", f"must hold one number for each of the {count} sources of from", list(weights))
    elif abs(sum(weights) - 1.0) > 1e-6:
        problems.add(f"{key}.weights", f"must add up to 1, and these add up to {sum(weights):g}", list(weights))


def _check_circles(roles: dict[str, RoleConfig], problems: Problems) -> None:
    def circle(start: str) -> list[str] | None:
        paths = [[start]]
        while paths:
            path = paths.pop()
            for source in roles[path[-1]].sources:
                if source == start and len(path) > 1:
                    return [*path, source]
                if source in roles and source not in path:
                    paths.append([*path, source])
        return None

    reported: set[str] = set()
    for role in sorted(roles):
        if role not in reported and (found := circle(role)) is not None:
            problems.add(f"roles.{role}.from", f"goes in a circle: {' -> '.join(found)}; break it")
            reported.update(found)

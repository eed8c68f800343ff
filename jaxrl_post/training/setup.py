"""From a configuration to the things a run is made of: tokenizer, model, problems, rewards, stages.

Everything here is a function of the configuration alone, so that a resumed run, `generate` and `evaluate` rebuild
exactly what `train` built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_post import data, models, rewards
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.models.hub import local_directory
from jaxrl_post.rollout import Exits, Prompts, SamplingParams
from jaxrl_post.sampling import StopStrings, stop_strings
from jaxrl_post.training import executables
from jaxrl_post.training.config import BASE, Config, ConfigError, check_devices
from jaxrl_post.training.config.methods_check import tokenizer_of
from jaxrl_post.training.config.role_checks import is_checkpoint
from jaxrl_post.training.environment_setup import HostTurns, Turns, as_if_answered, by_token, make_turns
from jaxrl_post.training.generation import Continued, Generation, Tasks, none_begun, sample_groups
from jaxrl_post.training.model_setup import (
    Checkpoint,
    Models,
    check_export,
    check_same_meaning,
    check_same_tokens,
    make_checkpoint,
    make_copy,
    make_models,
    read_policy,
    router_losses,
    trainable,
    warn_of_long_rows,
    what_parameters_mean,
)
from jaxrl_post.training.problem_setup import Problems, make_problems
from jaxrl_post.training.reward_setup import check_reward_columns, make_rewards, reward_components
from jaxrl_post.training.roles import Role, check_same_shapes, make_refresh, role_params
from jaxrl_post.training.server_setup import PolicyServer, as_if_served, check_served
from jaxrl_post.training.stages import Stage, make_stages
from jaxrl_post.training.state import TrainState, init, state_shardings
from jaxrl_post.training.step import Step, make_step
from jaxrl_post.training.subgroups import make_budgets, make_exits, with_budgets
from jaxrl_post.types import ANSWER_TOKENS, Array, Params, Policy, PyTree, Rollouts, Score


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything of a run that is not state."""

    config: Config
    tokenizer: data.Tokenizer
    models: Models
    mesh: Mesh
    stages: list[Stage]
    executables: str | None = None
    measured_only: bool = False

    def program(self, name: str, jitted: Any, how: Generation | None = None) -> Callable[..., Any]:
        """`jitted`, or what was compiled of it before, where the run was given a directory of `executables`."""
        if self.executables is None:
            return jitted
        return executables.use(self.executables, name, jitted, configuration=executables.identity(self.config, how))

    @property
    def policy(self) -> Policy:
        """The model that is trained."""
        return self.models.policy

    @functools.cached_property
    def rollout_mesh(self) -> Mesh:
        """The same devices as they are laid out for sampling."""
        sizes = self.config.rollout.mesh
        if sizes is None:
            return self.mesh
        return mesh_lib.make_mesh(**dataclasses.asdict(sizes), devices=list(self.mesh.devices.flat))

    @functools.cached_property
    def to_rollout_mesh(self) -> Callable[[Params], Params] | None:
        """Copies the policy's parameters there; None where sampling has no mesh of its own."""
        return None if self.config.rollout.mesh is None else make_copy(self.policy, self.key, self.rollout_mesh)

    @functools.cached_property
    def server(self) -> PolicyServer | None:
        """Where completions are sampled that are trained on; None for the devices here."""
        if self.config.rollout.server is None:
            return None
        return PolicyServer(self.config, self.models, self.tokenizer)

    @functools.cached_property
    def problems(self) -> Problems:
        """The run's problems, made when they are first asked for."""
        return make_problems(self.config, self.tokenizer, self.turns, measured_only=self.measured_only)

    @functools.cached_property
    def turns(self) -> Turns | HostTurns | None:
        """In which environment the policy acts; None if it does in none."""
        return make_turns(self.config, self.tokenizer)

    @functools.cached_property
    def reward_functions(self) -> list[rewards.RewardFunction]:
        """The run's reward functions; a task's scorer comes with its problems."""
        return make_rewards(self.config, lambda: self.problems.train)

    def prepare(self) -> None:
        """Make the problems, the reward functions and the roles' models now, so that what is wrong with them shows."""
        _ = self.problems, self.reward_functions, self.checkpoints
        sampled, in_turns = self.stages[-1].kind == "rollouts", self.turns is not None
        check_reward_columns(self.config, self.reward_functions, self.problems, sampled=sampled, in_turns=in_turns)

    @property
    def num_prompts(self) -> int:
        """Size of the training data, for methods that keep a state per prompt."""
        return len(self.problems.train) if self.config.data.files else self.config.data.size

    @property
    def key(self) -> Array:
        """The run's key; sampling and training fold different numbers into it."""
        return jax.random.key(self.config.seed)

    @functools.cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The models of roles that start from a Hugging Face directory, which may be of other sizes than the policy."""
        method = self.stages[-1].method
        return {
            role: make_checkpoint(
                self.config.model,
                self.tokenizer,
                given.sources[0],
                value_head=self._gives_values(role),
                trained=role in method.trains,
            )
            for role, given in self.config.roles.items()
            if role != "policy" and len(given.sources) == 1 and is_checkpoint(given.sources[0])
        }

    def _gives_values(self, role: str) -> bool:
        return role != "policy" and "value" in self.stages[-1].method.needs.get(role, ())

    def model(self, role: str) -> Policy:
        """The model that plays a role: those that give values have a value head."""
        if role in self.checkpoints:
            return self.checkpoints[role].policy
        return self.models.critic if self._gives_values(role) else self.policy

    def borrows(self, stage: Stage) -> dict[str, str]:
        """The roles that are the policy without its adapters, and read its parameters."""
        return {role: "policy" for role, given in stage.roles.items() if given.sources == (BASE,)}

    def trainable(self, stage: Stage) -> dict[str, PyTree]:
        """Which parameters are trained, by role; a role that is not there trains all of them."""
        found = {role: trainable(self.config.model, self.model(role), self.key) for role in stage.method.trains}
        return {role: tree for role, tree in found.items() if tree is not None}

    def scores(self, stage: Stage) -> dict[str, Score]:
        """A score for each role, at the temperature that completions are sampled with."""
        temperature = self.config.rollout.sampling.temperature if stage.kind == "rollouts" else 1.0
        # Of rollouts only the completions are scored; how long given answers are is not known beforehand.
        bound = self.config.rollout.max_new_tokens if stage.kind == "rollouts" else None
        if bound is not None and self.exits is not None:
            bound = self.exits.most_chosen(bound)
        grouped = self.config.training.share_prompts and stage.kind != "completions"
        prompt = self.prompt_length if grouped else None
        borrowed = self.borrows(stage)
        return {
            role: models.score(
                self.models.base if role in borrowed else self.model(role),
                temperature=temperature,
                max_chosen=bound,
                shared_prompt=prompt,
            )
            for role in stage.method.roles
        }

    def step_name(self, stage: Stage) -> str:
        """The name of a stage's train step among the run's programs."""
        return "step" if len(self.stages) == 1 else f"step/{stage.name}"

    def step(self, stage: Stage) -> Step:
        """The train step of a stage, on the run's mesh."""
        return make_step(
            self.scores(stage),
            stage.method,
            stage.optimizer,
            micro_batches=stage.micro_batches,
            epochs=stage.epochs,
            refresh=make_refresh(stage.roles),
            trainable=self.trainable(stage),
            borrows=self.borrows(stage),
            router_losses=router_losses(self.config.model),
            mesh=self.mesh,
        )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a completion: the tokenizer's, and those that the model's own files name."""
        found = list(self.tokenizer.eos_ids)
        source = self.models.source
        for given in () if source is None else (source.generation_config or {}, source.config):
            ids = given.get("eos_token_id")
            found += [ids] if isinstance(ids, int) else list(ids or ())
        return tuple(dict.fromkeys(token for token in found if token < self.tokenizer.vocab_size))

    @functools.cached_property
    def stop_strings(self) -> StopStrings | None:
        """What finds the texts that end a completion; None without any.

        Raises:
            ConfigError: if one is empty, or the tokenizer cannot write it.
        """
        texts = self.config.rollout.stop
        try:
            return stop_strings(texts, data.token_bytes(self.tokenizer)) if texts else None
        except ValueError as error:
            raise ConfigError([f"rollout.stop: {error}"]) from None

    def sampling(self) -> SamplingParams:
        """How the completions that are trained on are drawn, but for the tokenizer's stop tokens."""
        options = self.config.rollout.sampling
        return SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p)

    def generation(
        self, sampling: SamplingParams, group_size: int = 1, *, max_new_tokens: int | None = None
    ) -> Generation:
        """How groups are sampled; the tokens that end a completion are added to those of `sampling`."""
        rollout = self.config.rollout
        stops = (*self.stop_tokens, *(int(token) for token in sampling.stop_tokens))
        return Generation(
            sampling._replace(stop_tokens=stops, stop_strings=self.stop_strings),
            rollout.max_new_tokens if max_new_tokens is None else max_new_tokens,
            group_size,
            slots=rollout.slots,
            cache_pages=rollout.cache_pages,
            cache_dtype=rollout.cache_dtype,
            turns=self.turns,
        )

    @property
    def prompt_length(self) -> int:
        """Longest prompt, tokens."""
        turns = self.turns
        return turns.environment.max_prompt if isinstance(turns, Turns) else self.config.data.max_prompt_length

    def prompt_shapes(self, how: Generation, count: int) -> Prompts | Tasks | Continued:
        """Shapes of the prompts of `count` problems, as a `Sampler` gives them."""
        rows = count * how.parts

        def shape(dtype: Any, *size: int) -> Any:
            return jax.ShapeDtypeStruct((rows, *size), dtype)

        id = shape(jnp.uint32, how.group_size // how.parts)
        if isinstance(how.turns, Turns):
            return Tasks(shape(jnp.int32), shape(jnp.int32), id)
        prompts = Prompts(shape(jnp.int32, self.prompt_length), shape(jnp.int32), shape(jnp.int32), id)
        if how.tokens_per_step is None:
            return prompts
        params = jax.eval_shape(self.policy.init, self.key)
        return Continued(prompts, none_begun(self.policy, params, prompts, how=how))

    def trained_generation(self) -> Generation:
        """How the groups that are trained on are sampled."""
        budgets = make_budgets(self.config)
        how = self.generation(self.sampling(), self.config.rollout.group_size)
        return how._replace(
            parts=1 if budgets is None else budgets.parts,
            exits=self.exits,
            tokens_per_step=self.config.rollout.tokens_per_step,
        )

    @functools.cached_property
    def exits(self) -> Exits | None:
        """How thoughts are left early while training; None if they are not."""
        return make_exits(self.config, self.tokenizer)

    def rollout_shapes(self, stage: Stage) -> Rollouts:
        """Shapes of what a step of the stage trains on, for methods that keep a state of that shape."""
        config = self.config
        length = config.data.max_prompt_length + config.rollout.max_new_tokens
        if stage.kind == "rollouts":
            count = config.rollout.prompts
            shapes = self.sampled_shapes(count)
            shapes = shapes.replace(rewards=dict.fromkeys(reward_components(config), shapes.reward) | by_token(shapes))
        else:
            count, size = stage.batch_size, 2 if stage.kind == "pairs" else 1
            shapes = jax.eval_shape(lambda: data.to_rollouts([[0]] * count, [[[0]] * size] * count, length=length))
        wanted = {name: jax.ShapeDtypeStruct((count,), jnp.float32) for name in stage.method.wants - {ANSWER_TOKENS}}
        if ANSWER_TOKENS in stage.method.wants:
            wanted[ANSWER_TOKENS] = jax.ShapeDtypeStruct((count, config.rollout.max_new_tokens), jnp.int32)
        return shapes.replace(extras={**wanted, **shapes.extras})

    def sampled_shapes(self, count: int) -> Rollouts:
        """Shapes of the groups of `count` problems, as they are sampled."""
        budgets, how = make_budgets(self.config), self.trained_generation()
        prompts = self.prompt_shapes(how, count)
        asked = None if budgets is None else budgets.at(0)

        def sample(params: Params, prompts: Prompts | Tasks | Continued, key: Array) -> Rollouts:
            made = sample_groups(self.policy, params, prompts, key, how=how)
            if isinstance(how.turns, HostTurns):
                made = as_if_answered(made)
            if self.config.rollout.server is not None:
                made = as_if_served(made)
            return made if asked is None else with_budgets(made, asked)

        return jax.eval_shape(sample, jax.eval_shape(self.policy.init, self.key), prompts, self.key)

    def carries(self, stage: Stage) -> bool:
        """Whether a step leaves completions to the next: to go on with, or to train on."""
        rollout = self.config.rollout
        return stage.kind == "rollouts" and (rollout.ahead or rollout.tokens_per_step is not None)

    def carried(self, stage: Stage) -> Any:
        """Shapes and shardings of what a step leaves to the next, as a checkpoint has it."""
        if not self.carries(stage):
            return ()
        shapes = self.sampled_shapes(stage.batch_size)
        layout = mesh_lib.rollout_shardings(shapes, self.rollout_mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)

    def initial_params(self) -> Params:
        """The policy's parameters before anything is learnt, on the mesh: drawn, read, or those of other runs."""
        if (given := self.config.roles.get("policy")) is not None:
            role = {"policy": Role(given.sources, given.weights)}
            return role_params(role, {}, self.load_policy)["policy"]
        return self.models.load(jax.random.fold_in(self.key, 1), self.mesh)

    def begin(self, stage: Stage, policy_params: Params, *, step: int) -> TrainState:
        """The state before a stage's first step: each role gets its parameters."""
        return init(
            self._role_params(stage, policy_params, self.load_policy, self._read_checkpoint),
            stage.method,
            stage.optimizer,
            jax.random.fold_in(self.key, 2),
            rollouts=self.rollout_shapes(stage),
            num_prompts=self.num_prompts,
            step=step,
            trainable=self.trainable(stage),
            borrows=self.borrows(stage),
            mesh=self.mesh,
            axes=self._axes(stage),
        )

    def template(self, stage: Stage) -> TrainState:
        """Shapes and shardings of what a checkpoint of a stage holds, with nothing allocated but the key."""
        shapes = self.state_shapes(stage)
        key = mesh_lib.place(self.key, shapes.key.sharding)
        return shapes.replace(key=key, curriculum_state=self.carried(stage))

    def state_shapes(self, stage: Stage, num_prompts: int | None = None) -> TrainState:
        """Shapes and shardings of a stage's state, on devices that need not be there.

        Args:
            stage: one of `stages`.
            num_prompts: `num_prompts`, which reads the data, if None.
        """
        num_prompts = self.num_prompts if num_prompts is None else num_prompts
        key, rollouts, chosen = self.key, self.rollout_shapes(stage), self.trainable(stage)

        def build() -> TrainState:
            # The parameters of other runs are in the checkpoint by now; only their shapes matter here.
            params = self._role_params(
                stage,
                self.policy.init(key),
                lambda run: self.policy.init(key),
                lambda role: self.model(role).init(key),
            )
            return init(
                params,
                stage.method,
                stage.optimizer,
                key,
                rollouts=rollouts,
                num_prompts=num_prompts,
                trainable=chosen,
                borrows=self.borrows(stage),
            )

        shapes = jax.eval_shape(build)
        layout = state_shardings(shapes, stage.method, stage.optimizer, self.mesh, self._axes(stage), chosen)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)

    def _axes(self, stage: Stage) -> dict[str, object]:
        axes = {role: self.model(role).axes for role in stage.method.roles}
        return {role: None if function is None else function() for role, function in axes.items()}

    def load_policy(self, run_dir: str) -> Params:
        """The policy of another run, as its newest checkpoint has it, or of a Hugging Face directory, on this mesh.

        Raises:
            ConfigError: if its model or its tokenizer is another one.
            CheckpointError: if there is no checkpoint that can be read.
        """
        from jaxrl_post.training.inference import load_run  # which sets up runs with this module

        other = None
        if is_checkpoint(run_dir):
            check_same_tokens(self.tokenizer, run_dir)
            params = read_policy(self.config.model, run_dir, jax.random.fold_in(self.key, 1), self.mesh)
            config = models.read_config(local_directory(run_dir, ("config.json",)))
            meaning = what_parameters_mean(self.config.model, config)
        else:
            other, params = load_run(run_dir, mesh=self.config.mesh)
            meaning = other._meaning
        try:
            check_same_shapes(jax.eval_shape(self.policy.init, self.key), params, "the model of this run", run_dir)
            check_same_meaning(self._meaning, meaning, run_dir)
        except ValueError as error:
            raise ConfigError([f"roles: {error}; give both runs the same model"]) from None
        if other is None:
            return params
        for name in ("tokenizer", "alphabet"):
            own, found = getattr(self.config.data, name), getattr(other.config.data, name)
            if own != found:
                raise ConfigError(
                    [f"roles: data.{name} is {own!r} here but {found!r} in {run_dir}; tokens must mean the same"]
                )
        return params

    @property
    def _meaning(self) -> dict[str, Any]:
        source = self.models.source
        return what_parameters_mean(self.config.model, None if source is None else source.config)

    def _read_checkpoint(self, role: str) -> Params:
        return self.checkpoints[role].load(jax.random.fold_in(self.key, 3), self.mesh)

    def _role_params(
        self,
        stage: Stage,
        policy_params: Params,
        load: Callable[[str], Params],
        read: Callable[[str], Params],
    ) -> dict[str, Params]:
        """Parameters by role: `load` gives those of a directory for the policy's model, `read` a role's own."""

        def adapt(role: str, source: Params) -> Params:
            if not self._gives_values(role):
                return source
            # What the policy does not have (the value head) is drawn anew, and nothing else is.
            critic = self.models.critic
            missing = [name for name in jax.eval_shape(critic.init, self.key) if name not in source]
            draw = jax.jit(lambda key: {name: critic.init(key)[name] for name in missing})
            return {**source, **draw(jax.random.fold_in(self.key, 3))}

        roles = {role: stage.roles[role] for role in stage.method.roles - {"policy"} - set(self.borrows(stage))}
        own = {role: read(role) for role in sorted(set(self.checkpoints) & set(roles))}
        found = role_params(roles, {"policy": policy_params, **own}, load, adapt)
        for role in roles:
            try:
                shapes = jax.eval_shape(self.model(role).init, self.key)
                check_same_shapes(shapes, found[role], f"the model of {role}", "what it starts from")
            except ValueError as error:
                raise ConfigError([f"roles.{role}.from: {error}"]) from None
        return found


def build(
    config: Config,
    *,
    devices: Sequence[Any] | None = None,
    tokenizer: data.Tokenizer | None = None,
    executables: str | None = None,
    measured_only: bool = False,
) -> Setup:
    """Build a run's parts.

    Args:
        config: of the run.
        devices: that its mesh is made of, present or only described; those of this machine if None.
        tokenizer: in place of the one that the configuration names.
        executables: a directory of programs that need not be compiled.
        measured_only: see `make_problems`.

    Raises:
        ConfigError: if there are too few devices.
    """
    idle = check_devices(config, jax.device_count() if devices is None else len(devices))
    if idle and devices is None and jax.process_count() > 1:
        raise ConfigError([f"{idle[0]}; a mesh over {jax.process_count()} processes takes in all their devices"])
    tokenizer = make_tokenizer(config) if tokenizer is None else tokenizer
    made = make_models(config.model, tokenizer)
    check_export(config.model, made, tokenizer, config.model.export)
    longest = made.source.config.get("max_position_embeddings") if made.source is not None else None
    wanted = config.data.max_prompt_length + config.rollout.max_new_tokens
    if longest is not None and wanted > longest:
        limits = f"data.max_prompt_length + rollout.max_new_tokens = {wanted}"
        raise ConfigError([f"{limits}, but the model was made for {longest} positions"])
    warn_of_long_rows(config.model, made.source, wanted)
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    setup = Setup(config, tokenizer, made, mesh, make_stages(config), executables, measured_only)
    if config.rollout.server is not None:
        check_served(config.rollout.server, config.model, made, tokenizer, setup.trained_generation().sampling)
    return setup


def make_tokenizer(config: Config) -> data.Tokenizer:
    """The character tokenizer of `data.alphabet`, or the one at `data.tokenizer`."""
    return tokenizer_of(config.data)

"""From a configuration to the things a run is made of: tokenizer, model, problems, rewards, stages.

Everything here is a function of the configuration alone, so that a resumed run, `generate` and `evaluate` rebuild
exactly what `train` built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxrl_post import data, methods, models, rewards
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.training.config import Config, ConfigError, DataConfig, OptimizerConfig, check_devices
from jaxrl_post.training.optimizers import make_optimizer, make_schedule
from jaxrl_post.training.roles import Role
from jaxrl_post.training.state import TrainState, init, state_shardings
from jaxrl_post.types import Array, LearnsFrom, Method, Params, Policy, Score

# Parts of the data that must not share problems: each draws from seeds of its own.
_TRAIN, _WARM_START, _VALIDATION, _HELD_OUT = range(4)
_HELD_OUT_SEED = 0  # the same problems whatever the run's seed, so that runs can be compared


class Problems(NamedTuple):
    """The problems of a run.

    Attributes:
        train: what the method trains on.
        warm_start: the worked examples of the supervised stage.
        validation: decides when the supervised stage is over.
        held_out: what accuracy is measured on.
        exclude: prompts that training must not see: those of `validation` and `held_out`.
    """

    train: data.Source
    warm_start: list[data.Problem]
    validation: list[data.Problem]
    held_out: list[data.Problem]
    exclude: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One method trained for a number of steps.

    Attributes:
        name: of the stage, `warm_start` or the method's.
        kind: what a batch is made of: `rollouts` are sampled, `completions` and `pairs` are given by the data.
        method: the method.
        optimizer: its optimiser.
        schedule: the optimiser's learning rate by update.
        steps: most steps of the stage.
        batch_size: prompts that a step draws from the data.
        epochs: updates per batch.
        micro_batches: pieces a batch is cut into.
        roles: models beside the policy.
        until: greedy accuracy on the validation problems that ends the stage, or None.
        check_every: steps between looks at it.
    """

    name: str
    kind: LearnsFrom
    method: Method
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    steps: int
    batch_size: int
    epochs: int = 1
    micro_batches: int = 1
    roles: Mapping[str, Role] = dataclasses.field(default_factory=dict)
    until: float | None = None
    check_every: int = 1


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything of a run that is not state."""

    config: Config
    tokenizer: data.Tokenizer
    policy: Policy
    critic: Policy
    mesh: Mesh
    stages: list[Stage]

    @functools.cached_property
    def problems(self) -> Problems:
        """The run's problems, made when they are first asked for."""
        return make_problems(self.config, self.tokenizer)

    @functools.cached_property
    def reward_functions(self) -> list[rewards.RewardFunction]:
        """The run's reward functions; a task's scorer comes with its problems."""
        return make_rewards(self.config, lambda: self.problems.train)

    def prepare(self) -> None:
        """Make the problems and the reward functions now, so that what is wrong with them shows."""
        _ = self.problems, self.reward_functions

    @property
    def num_prompts(self) -> int:
        """Size of the training data, for methods that keep a state per prompt."""
        return self.config.data.size if self.config.data.task is not None else len(self.problems.train)

    @property
    def key(self) -> Array:
        """The run's key; sampling and training fold different numbers into it."""
        return jax.random.key(self.config.seed)

    def model(self, role: str) -> Policy:
        """The model that plays a role: those that give values have a value head."""
        return self.critic if role == "critic" else self.policy

    def scores(self, stage: Stage) -> dict[str, Score]:
        """A score for each role, at the temperature that completions are sampled with."""
        temperature = self.config.rollout.sampling.temperature if stage.kind == "rollouts" else 1.0
        # Of rollouts only the completions are scored; how long given answers are is not known beforehand.
        bound = self.config.rollout.max_new_tokens if stage.kind == "rollouts" else None
        return {
            role: models.score(self.model(role), temperature=temperature, max_chosen=bound)
            for role in stage.method.needs
        }

    def initial_params(self) -> Params:
        """The policy's parameters before anything is learnt, on the mesh."""
        key = jax.random.fold_in(self.key, 1)
        shapes = jax.eval_shape(self.policy.init, key)
        axes = None if self.policy.axes is None else self.policy.axes()
        layout = mesh_lib.shardings(shapes, axes, self.mesh)
        with jax.set_mesh(self.mesh):
            return jax.jit(self.policy.init, out_shardings=layout)(key)

    def begin(self, stage: Stage, policy_params: Params, *, step: int) -> TrainState:
        """The state before a stage's first step: each role gets its parameters."""
        return init(
            self._role_params(stage, policy_params),
            stage.method,
            stage.optimizer,
            jax.random.fold_in(self.key, 2),
            num_prompts=self.num_prompts,
            step=step,
            mesh=self.mesh,
            axes=self._axes(stage),
        )

    def template(self, stage: Stage) -> TrainState:
        """Shapes and shardings of a stage's state, with nothing allocated but the key."""
        key = self.key

        def build() -> TrainState:
            params = self._role_params(stage, self.policy.init(key))
            return init(params, stage.method, stage.optimizer, key, num_prompts=self.num_prompts)

        shapes = jax.eval_shape(build)
        layout = state_shardings(shapes, stage.method, stage.optimizer, self.mesh, self._axes(stage))
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
        return abstract.replace(key=jax.device_put(key, layout.key))

    def _axes(self, stage: Stage) -> dict[str, object]:
        axes = {role: self.model(role).axes for role in stage.method.needs}
        return {role: None if function is None else function() for role, function in axes.items()}

    def _role_params(self, stage: Stage, policy_params: Params) -> dict[str, Params]:
        params = {"policy": policy_params}
        waiting = [role for role in stage.method.needs if role != "policy"]
        while waiting:
            ready = [role for role in waiting if stage.roles[role].source in params]
            if not ready:
                raise ConfigError(
                    [f"roles: {sorted(waiting)} take their parameters from each other; begin with policy"]
                )
            for role in ready:
                source = params[stage.roles[role].source]
                if role == "critic":
                    # What the policy does not have (the value head) is drawn anew.
                    fresh = self.critic.init(jax.random.fold_in(self.key, 3))
                    source = {name: source.get(name, value) for name, value in fresh.items()}
                params[role] = source
                waiting.remove(role)
        return params


def build(config: Config) -> Setup:
    """Build a run's parts.

    Raises:
        ConfigError: if there are too few devices.
    """
    check_devices(config, jax.device_count())
    tokenizer = make_tokenizer(config)
    sizes = dataclasses.asdict(config.model)
    del sizes["path"]
    policy, critic = (
        models.decoder(vocab_size=tokenizer.vocab_size, value_head=value_head, **sizes) for value_head in (False, True)
    )
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh))
    return Setup(config, tokenizer, policy, critic, mesh, make_stages(config))


def make_tokenizer(config: Config) -> data.Tokenizer:
    """The character tokenizer of `data.alphabet`, or the one at `data.tokenizer`."""
    if config.data.tokenizer is not None:
        return data.load_tokenizer(config.data.tokenizer)
    return data.CharTokenizer(config.data.alphabet or data.PRINTABLE)


def make_problems(config: Config, tokenizer: data.Tokenizer) -> Problems:
    """Sources of the run's problems; held-out ones differ in content from all that training sees."""
    options = config.data
    fits = data.prompt_fits(tokenizer, options.max_prompt_length, on_long_prompt=options.on_long_prompt)

    def answer_fits(problem: data.Problem) -> bool:
        return fits(problem) and completion_fits(tokenizer, problem["answer"], config.rollout.max_new_tokens)

    def generated(seed: int, part: int) -> data.Source:
        assert options.task is not None
        return data.ReasoningGymSource(
            options.task,
            seed=data.spaced_seed(seed, part, size=options.size),
            size=options.size,
            prompt=options.prompt,
            answer=options.answer,
            lowercase=options.lowercase,
            options=options.task_options,
        )

    def read(files: tuple[str, ...], *, answers: bool, pairs: bool) -> data.Source:
        source = functools.partial(
            data.JsonlSource,
            list(files),
            prompt=options.prompt,
            chosen=options.chosen if pairs else None,
            rejected=options.rejected if pairs else None,
            lowercase=options.lowercase,
        )
        compared = any(reward.name == "exact_match" for reward in config.rewards)
        if answers or compared or options.answer != DataConfig.answer:
            return source(answer=options.answer)
        # Nothing is known to need answers, so files may lack them; a reward of the user's that reads them gets the text
        # of the template, as always, where there are any.
        plain = source()
        return source(answer=options.answer) if all("answer" in plain[i] for i in range(len(plain))) else plain

    def some(source: data.Source, count: int, exclude: frozenset[str]) -> list[data.Problem]:
        return data.held_out(source, count, exclude=exclude, keep=fits) if count else []

    warm = config.warm_start
    held_out_count = config.eval.problems
    if options.task is not None:
        held_out = some(generated(_HELD_OUT_SEED, _HELD_OUT), held_out_count, frozenset())
        train = generated(config.seed, _TRAIN)
        warm_source, validation_source = generated(config.seed, _WARM_START), generated(config.seed, _VALIDATION)
    else:
        kind = make_method(config).learns_from
        answers = kind == "completions" or warm is not None
        train = warm_source = validation_source = read(options.files, answers=answers, pairs=kind == "pairs")
        held_out = []
        if options.eval_files and held_out_count:
            source = read(options.eval_files, answers=False, pairs=False)
            held_out = some(source, min(held_out_count, len({p["prompt"] for p in source})), frozenset())
    exclude = frozenset(problem["prompt"] for problem in held_out)
    wants_check = warm is not None and warm.until is not None
    validation = some(validation_source, warm.check_problems, exclude) if warm is not None and wants_check else []
    exclude |= {problem["prompt"] for problem in validation}
    examples = data.held_out(warm_source, warm.examples, exclude=exclude, keep=answer_fits) if warm is not None else []
    data.check_disjoint((problem["prompt"] for problem in examples), exclude)
    return Problems(train, examples, validation, held_out, exclude)


def completion_fits(tokenizer: data.Tokenizer, text: str, max_new_tokens: int) -> bool:
    """Whether a completion and its stop token are within the limit."""
    return len(tokenizer.encode(str(text))) < max_new_tokens


def make_rewards(config: Config, train: Callable[[], data.Source]) -> list[rewards.RewardFunction]:
    """The reward functions of the configuration, by names that are unique.

    Raises:
        ConfigError: for a reward that the library does not have.
    """
    made: list[rewards.RewardFunction] = []
    for option in config.rewards:
        if option.path is not None:
            name, function = option.path.rpartition(":")[2], rewards.load(option.path)
            adapters = {"verl": rewards.from_verl, "verifiers": rewards.from_verifiers}
            function = adapters[option.adapter](function) if option.adapter in adapters else function
        elif option.name in ("task_score", "task_solved"):
            source = train()
            assert isinstance(source, data.ReasoningGymSource)  # the configuration's check has seen to it
            name, function = option.name, getattr(rewards, option.name)(source.score_answer)
        elif option.name == "exact_match":
            name, function = "exact_match", rewards.exact_match
        else:
            raise ConfigError(
                [f"rewards: there is no reward {option.name!r}; use task_score, task_solved, exact_match or path"]
            )
        if option.threshold is not None:
            function = rewards.thresholded(function, option.threshold)
        taken = [function.name for function in made]
        unique = name if name not in taken else f"{name}_{len(made)}"
        made.append(rewards.RewardFunction(unique, function, option.weight))
    return made


def make_method(config: Config) -> Method:
    """The method that the configuration names, with its keywords."""
    return getattr(methods, config.method.name)(**config.method.keywords)


def make_stages(config: Config) -> list[Stage]:
    """The supervised stage, if there is one, and the method's."""
    stages = []
    if (warm := config.warm_start) is not None:
        optimizer, schedule = _optimizer(warm.optimizer, warm.steps)
        stages.append(
            Stage(
                name="warm_start",
                kind="completions",
                method=methods.sft(),
                optimizer=optimizer,
                schedule=schedule,
                steps=warm.steps,
                batch_size=warm.batch_size,
                until=warm.until,
                check_every=warm.check_every or 1,
            )
        )
    training, method = config.training, make_method(config)
    optimizer, schedule = _optimizer(training.optimizer, training.steps * training.epochs)
    stages.append(
        Stage(
            name=config.method.name,
            kind=method.learns_from,
            method=method,
            optimizer=optimizer,
            schedule=schedule,
            steps=training.steps,
            batch_size=config.rollout.prompts * config.curriculum.oversample
            if method.learns_from == "rollouts"
            else training.batch_size,
            epochs=training.epochs,
            micro_batches=training.micro_batches,
            roles={role: Role(option.source, option.every or 0, option.mix) for role, option in config.roles.items()},
        )
    )
    return stages


def _optimizer(options: OptimizerConfig, updates: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    schedule = make_schedule(
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_steps=options.warmup_steps,
        steps=updates,
        end_fraction=options.end_fraction,
    )
    optimizer = make_optimizer(
        schedule,
        name=options.name,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
    )
    return optimizer, schedule

"""What a run can be told: one frozen dataclass per section of the YAML file, with meaning, unit and bounds per field.

Bounds of single fields stand here; what concerns several fields at once is in `checks`. A field whose default is null
because it follows from others (`model.kv_heads`) is filled in when the configuration is read.
"""

# ruff: noqa: RUF009 (option() makes a dataclasses.field, which is not shared between instances)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxrl_post.training.config.fields import option

NOT_SIZES = ("path", "revision", "ignore", "lora", "router_loss", "quantize", "dtype", "param_dtype", "remat", "export")
"""Options of a model that a checkpoint leaves open."""

BASE = "base"
"""Source of a role that is the policy's model without its adapters."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, which are trained alone while the model stays as it is."""

    path: str | None = option(
        "directory or hub id of adapters in PEFT's format to go on from; the options below are then theirs, and so is "
        "the model where model.path is null",
        None,
    )
    rank: int | None = option("rows of A and columns of B; null: that of path", None, minimum=1)
    alpha: float | None = option(
        "what the adapters add is multiplied by alpha / rank; null: that of path, else 16", None, above=0
    )
    targets: tuple[str, ...] | None = option(
        "projections with an adapter: query, key, value, out, gate, up, down, or q_proj, k_proj, ...; qkv and gate_up "
        "have one A for all their parts, as adapters of fused matrices do (phi3); null: those of path, else query and "
        "value",
        None,
    )
    dropout: float | None = option(
        "share of an adapter's inputs that is zeroed in training; null: that of path, else 0", None, minimum=0, below=1
    )
    rank_stabilized: bool | None = option("multiply by alpha / sqrt(rank) instead; null: as in path, else false", None)


@dataclass(frozen=True, kw_only=True)
class RouterLossConfig:
    """The load-balancing loss of a model with experts, added to the method's."""

    coefficient: float = option("factor of the loss, as router_aux_loss_coef of Hugging Face's models", above=0)
    over: Literal["batch", "sequence"] = option(
        "whose load is balanced: a step's batch, at the cost of a forward pass where the method has none before its "
        "gradient, or each sequence alone",
        "batch",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder that is built and trained."""

    path: str | None = option(
        "directory or hub id of a Hugging Face checkpoint to start from, whose sizes hold; null builds the decoder "
        "below",
        None,
    )
    revision: str | None = option("branch, tag or commit of path on the hub; null: its main branch", None)
    ignore: tuple[str, ...] = option(
        "keys of the checkpoint's config.json that are known to make no difference, though they are not known here",
        factory=tuple,
    )
    lora: LoraConfig | None = option("adapters, which alone are trained; null: all parameters are", None)
    router_loss: RouterLossConfig | None = option("what keeps experts evenly used; null: nothing", None)
    quantize: Literal["none", "int8", "nf4"] = option("bits of the frozen projections under adapters", "none")
    export: str | None = option(
        "directory that receives the trained policy as a Hugging Face checkpoint, and its adapters if it has any; not "
        "one that holds another run's",
        None,
    )
    width: int = option("size of the residual stream (D)", 128, minimum=1)
    layers: int = option("number of blocks", 2, minimum=1)
    heads: int = option("query heads of a block", 4, minimum=1)
    kv_heads: int | None = option("key and value heads; divides heads; null: as many as heads", None, minimum=1)
    head_dim: int | None = option("size of a head, even; null: width / heads", None, minimum=2)
    mlp_width: int | None = option("hidden size of the gated MLP; null: 4 * width", None, minimum=1)
    rope_base: float = option("base of the rotary position angles", 10000.0, above=0)
    qk_norm: bool = option("RMS-normalise queries and keys of each head", False)
    tied: bool = option("use the token embedding as the unembedding too", False)
    softcap: float | None = option("logits become softcap * tanh(logits / softcap); null: no cap", None, above=0)
    norm_eps: float = option("epsilon of RMSNorm", 1e-6, above=0)
    dtype: Literal["float32", "bfloat16"] = option("type that activations are computed in", "float32")
    param_dtype: Literal["float32", "bfloat16"] = option(
        "type that parameters are stored and updated in, adapters always in float32; with bfloat16 and no lora most "
        "updates are rounded away at usual learning rates",
        "float32",
    )
    remat: Literal["none", "dots", "full"] = option(
        "what the backward pass recomputes: nothing, all but matrix products, or whole blocks (least memory)", "none"
    )
    init_std: float = option("standard deviation of the initial weights", 0.02, above=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The problems, how they become text, and how text becomes tokens.

    Exactly one of `task`, `files` and `environment` is given.
    """

    task: str | None = option("name of a reasoning-gym task that generates problems", None)
    task_options: dict[str, Any] = option("options of the task's generator", factory=dict)
    environment: str | None = option(
        "where the policy acts in turns and is answered: gridworld, calculator, or a function of yours as "
        "path/file.py:function or module:function, which is given the tokenizer as vocabulary and returns a "
        "rollout.environments.Environment whose prompts depend on the task's number alone",
        None,
    )
    environment_options: dict[str, Any] = option("its other keywords", factory=dict)
    files: tuple[str, ...] = option(
        "JSON (lines, or one array), Parquet or Arrow files (or globs), or directories of a saved data set; rows in "
        "the layouts of TRL or verl, or any with templates",
        factory=tuple,
    )
    eval_files: tuple[str, ...] = option(
        "the same with the held-out problems; with completions or pairs, where the method trains on such, for its loss",
        factory=tuple,
    )
    kind: str | None = option("layout of the rows; null: told from the first one", None)
    split: str | None = option("part of a data set directory that has several, e.g. train", None)
    columns: dict[str, str] = option("further columns from templates, e.g. {level: '{extra_info.level}'}", factory=dict)
    on_bad_row: Literal["error", "skip"] = option("a malformed row is an error, or skipped and counted", "error")
    chat: bool = option("a prompt of plain text is a user's message, put through the tokenizer's chat template", False)
    system: str | None = option("a system message before it (chat: true)", None)
    prompt: str | None = option(
        "template of the prompt over the problem's columns; null: {question}, or what the files' layout says", None
    )
    answer: str | None = option("template of the answer (supervised training and rewards); null: likewise", None)
    chosen: str | None = option("template of the preferred completion (preference methods); null: likewise", None)
    rejected: str | None = option("template of the other completion (preference methods); null: likewise", None)
    lowercase: bool = option("lower-case prompts and answers", False)
    alphabet: str | None = option(
        "characters of the character tokenizer; null without a tokenizer: printable ASCII and newline", None
    )
    tokenizer: str | None = option(
        "directory or hub id of a tokenizer, in place of alphabet; null with model.path: the model's", None
    )
    tokenizer_revision: str | None = option(
        "branch, tag or commit of tokenizer on the hub; null: its main branch", None
    )
    size: int = option("problems to draw from the task's generator, or tasks of the environment", 100_000, minimum=1)
    max_prompt_length: int = option("longest prompt, tokens", minimum=1)
    on_long_prompt: Literal["filter", "error"] = option(
        "problems whose prompt, or completion that is given to be trained on, is longer than its limit: left out and "
        "counted, or an error",
        "filter",
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One component of the reward. Exactly one of `name` and `path` is given."""

    name: str | None = option(
        "a reward of this library, e.g. task_score or exact_match; environment: what an environment gave, over all "
        "turns",
        None,
    )
    path: str | None = option("a function of yours: module:function or file.py:function", None)
    weight: float = option("factor of this component in the total reward", 1.0)
    threshold: float | None = option("the component becomes 1 where its score is at least this, else 0", None)
    adapter: Literal["trl", "verl", "verifiers", "judge"] = option(
        "whose signature the function of path has; judge: (prompts, first, second) -> probabilities that the first is "
        "better, from which each completion has its win rate in its group",
        "trl",
    )
    options: dict[str, Any] = option(
        'keywords of the function that are the same for the whole run, e.g. {pattern: "<answer>(.*?)</answer>"}; of '
        "the adapters verl, verifiers and judge, theirs",
        factory=dict,
    )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which prompts to try next."""

    name: Literal["uniform", "in_order"] = option(
        "uniform: every problem once, in random order, then again; in_order: in the order of the data, e.g. easy ones "
        "first, or wordings of a question next to each other",
        "uniform",
    )
    oversample: int = option(
        "sample this many times the prompts of a step and train on those whose rewards vary first; where none do, a "
        "method that learns from differences alone leaves the step out",
        1,
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn while training (evaluation is greedy, and sampled beside it)."""

    temperature: float = option("divides the logits", 1.0, above=0)
    top_k: int = option("draw among the k likeliest tokens; 0: all", 0, minimum=0)
    top_p: float = option("draw from the smallest set with this much probability; 1: all", 1.0, above=0, maximum=1)
    min_p: float = option("drop tokens less likely than this times the likeliest; 0: none", 0.0, minimum=0, below=1)


@dataclass(frozen=True, kw_only=True)
class BudgetScheduleConfig:
    """One token budget for all completions, which shrinks in stages: start * decay ** (step // every)."""

    start: int = option("budget of the first step, tokens", minimum=1)
    decay: float = option("what a reduction leaves of the budget", 0.7, above=0, maximum=1)
    every: int = option("steps between reductions", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ExitsConfig:
    """Serial groups: one trajectory of a prompt, and answers from random places at which its thought is ended early."""

    count: int = option("exits of a thought; rollout.group_size is one more, for the trajectory itself", minimum=1)
    text: str = option(
        "ends the thought at an exit",
        "Time is limited, stop thinking and start answering.\n</think>\n\n",
    )
    end: str | None = option("where a thought ends by itself; null: all of the completion is thought", "</think>")
    max_new_tokens: int | None = option(
        "longest answer after an exit, tokens; null: rollout.max_new_tokens", None, minimum=1
    )
    whole: bool = option(
        "train the thought before an exit and text with its answer, so that exits are learned; false: the answer alone",
        True,
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """An inference server that samples what is trained on; what is measured is sampled here. One process only.

    Its log-probs are never quite the trained model's: method.old_logp: recompute with method.correction: tis weighs the
    difference out.
    """

    url: str = option("its address, http://host:8000/v1 of vLLM or http://host:30000 of SGLang")
    kind: Literal["vllm", "sglang"] = option("what it speaks: the completions of vLLM, or those of SGLang", "vllm")
    model: str | None = option("name of the model, where the server asks for one", None)
    log_probs: Literal["raw", "tempered", "processed"] | None = option(
        "what its log-probs are of, see rollout.Server; null: what its kind gives as it starts", None
    )
    weights: str | None = option(
        "directory that the server finds under the same name: the policy is written there, adapters merged into it, "
        "and the server told to load it (vLLM: start it with VLLM_SERVER_DEV_MODE=1). null: it keeps its weights",
        None,
    )
    every: int = option("steps from one such update to the next; the first step sampled always has one", 1, minimum=1)
    api_key: str | None = option("name of the environment variable that holds its key", None)
    timeout: float = option("seconds that the completions of a prompt may take, and an update", 600.0, above=0)
    concurrency: int = option("requests at a time", 32, minimum=1)
    retries: int = option("further tries where it is busy, fails or cannot be reached", 5, minimum=0)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The completions sampled at each step."""

    group_size: int = option("completions per prompt (G)", 8, minimum=1)
    prompts: int = option("prompts per step that are trained on (P)", 32, minimum=1)
    max_new_tokens: int = option(
        "longest completion, tokens, sampled or given to be trained on; with what an environment answers in between",
        minimum=1,
    )
    environment: str | None = option(
        "who answers the policy between its turns: a function of yours in Python, as path/file.py:function or "
        "module:function, that returns an object with reset(problem) and step(state, action), see rollout.host_turns "
        "and rollout.tool_environment. What its steps earn is the reward named environment. One written in JAX goes "
        "into data.environment",
        None,
    )
    environment_options: dict[str, Any] = option("keywords of that function", factory=dict)
    environment_error: str = option(
        "what the policy reads after an answer that failed or did not come; of characters that the tokenizer knows",
        "error: {error}",
    )
    environment_timeout: float = option(
        "seconds that an answer may take; then the policy reads an error", 30.0, above=0
    )
    max_turns: int | None = option("most actions of the policy in an environment", None, minimum=1)
    max_turn_tokens: int | None = option(
        "longest action in an environment, tokens, which a token that ends completions ends earlier; null: "
        "whatever max_new_tokens leaves",
        None,
        minimum=1,
    )
    sampling: SamplingConfig = option("how a token is drawn", factory=SamplingConfig)
    stop: tuple[str, ...] = option(
        "texts that end a completion, or an action in an environment, wherever tokens begin and end; the token that "
        "completes one is the last. In evaluation too",
        (),
    )
    budgets: tuple[int | None, ...] | BudgetScheduleConfig | None = option(
        "token budgets that the completions of a prompt are asked to keep to: a list, whose items (null: no budget) "
        "get equal shares of the group, or a schedule, one budget for all; null: none. Evaluation names none",
        None,
    )
    budget_prompt: str = option(
        "what a budget adds to the prompt", " I will answer the question with {budget} tokens.\n"
    )
    exits: ExitsConfig | None = option("early exits from one thought in place of separate completions", None)
    slots: int | None = option(
        "completions that are decoded at a time; where one ends, the next takes its slot, so that none waits for the "
        "longest of a batch, and the cache is of so many. null: all of a step, or of an evaluation's batch",
        None,
        minimum=1,
    )
    cache_pages: int | None = option(
        "keep keys and values in a pool of so many pages (of 256 tokens, on a CPU of 32), which completions take as "
        "they grow and give back when they end, so that it may be smaller than slots times the longest; where full, "
        "the last to come starts over later; devices that share the completions share the pages too, evenly. null: "
        "room for each slot",
        None,
        minimum=1,
    )
    tokens_per_step: int | None = option(
        "most tokens that a completion gets in one step; one that has not ended goes on in the next, with the policy "
        "of then, and its group is trained on when all of it has ended (by t_ppo, at once), while others take the "
        "places that are free. Log-probs are those of the policies that sampled: ratios to them (old_logp: rollout, "
        "which most methods have) or method.correction allow for older ones. null: all of them",
        None,
        minimum=1,
    )
    ahead: bool = option(
        "sample a step's completions while those of the step before are scored on the host, with a policy that is one "
        "update older; what allows for that is as for tokens_per_step",
        False,
    )
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = option(
        "type that keys and values are kept in while sampling; what is read of a narrower one differs from what the "
        "trained model computes, which method.correction can repair. null: model.dtype",
        None,
    )
    server: ServerConfig | None = option("an inference server that samples in place of the devices here", None)
    mesh: MeshConfig | None = option(
        "layout of the devices while completions are sampled; parameters are copied to it at each step, in the "
        "precision that they are multiplied in. Every token takes all parameters: where they are many, shards of the "
        "products (tensor) are faster than shards that are collected first (fsdp). null: that of mesh",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The training method. In YAML the keywords stand beside the name: `{name: grpo, clip_high: 0.28}`.

    Where a keyword holds token ids, `{text: "..."}` stands for those of a text.
    """

    name: str = option(
        "a function of jaxrl_post.methods, or your own that returns a Method, as path/file.py:function or "
        "module:function; its keywords stand beside it",
        "grpo",
    )
    keywords: dict[str, Any] = option("keywords of that function", factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The Optax chain."""

    name: Literal["adamw", "adam", "sgd"] = option("the update rule", "adamw")
    learning_rate: float = option("peak step size", above=0)
    schedule: Literal["constant", "cosine", "linear"] = option(
        "how the step size goes from its peak to end_fraction of it", "constant"
    )
    warmup_steps: int = option(
        "updates over which the step size rises linearly; the first has peak / (warmup_steps + 1)", 0, minimum=0
    )
    end_fraction: float = option(
        "step size that it comes to behind the last step, as a fraction of the peak (cosine, linear)",
        0.1,
        minimum=0,
        maximum=1,
    )
    b1: float = option("decay of the mean of gradients (adam, adamw); momentum (sgd)", 0.9, minimum=0, below=1)
    b2: float = option("decay of the mean of squared gradients (adam, adamw)", 0.999, minimum=0, below=1)
    eps: float = option("added to the root of the mean square (adam, adamw)", 1e-8, above=0)
    weight_decay: float = option("decoupled weight decay (adamw)", 0.0, minimum=0)
    max_grad_norm: float | None = option("gradients are scaled down to this global norm; null: never", 1.0, above=0)
    mu_dtype: Literal["float32", "bfloat16"] | None = option(
        "type that the mean of gradients (the momentum of sgd) is kept in; null: model.param_dtype", None
    )


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """A model beside the policy, e.g. the reference: where its parameters come from, and whether they are renewed."""

    source: str | tuple[str, ...] = option(
        "whose parameters it starts (and is renewed) from: policy, another role, the directory of another run, whose "
        "newest policy is meant, or of a Hugging Face checkpoint (a reward model, a critic, a teacher; on the hub "
        "hf://owner/name), whose sizes are its own; a list is averaged; base: the policy without its adapters, whose "
        "weights it shares (the default where model.lora is given and its adapters start anew)",
        "policy",
        key="from",
    )
    weights: tuple[float, ...] | None = option("of the average, one for each of from; null: equal ones", None)
    refresh: Literal["frozen", "every"] = option("frozen, or every: renewed every n steps", "frozen")
    every: int | None = option(
        "steps between renewals (refresh: every), which are where it divides a step of the run, warm_start's included",
        None,
        minimum=1,
    )
    mix: float = option("a renewal gives mix * source + (1 - mix) * old (refresh: every)", 1.0, above=0, maximum=1)
    optimizer: OptimizerConfig | None = option("of a role that the method trains; null: training.optimizer", None)

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple, of one where it is one name; empty where it could not be read."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source or ())


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """A supervised stage on worked examples before the method starts."""

    steps: int = option("most steps of the stage", minimum=1)
    batch_size: int = option("examples per step", 128, minimum=1)
    examples: int = option("number of distinct problems", minimum=1)
    until: float | None = option(
        "stop when greedy accuracy on separate problems reaches this fraction; null: run all steps",
        None,
        above=0,
        maximum=1,
    )
    check_every: int | None = option("steps between the checks of until", None, minimum=1)
    check_problems: int = option("problems of each check of until", 256, minimum=1)
    optimizer: OptimizerConfig = option("the optimiser of this stage")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    steps: int = option("steps of the method", minimum=1)
    epochs: int = option("passes over the rollouts of a step", 1, minimum=1)
    micro_batches: int = option("pieces of a batch whose gradients are accumulated", 1, minimum=1)
    share_prompts: bool = option(
        "run a prompt once for all of its completions: the same gradient for less work; micro-batches keep the "
        "completions of a prompt together",
        False,
    )
    batch_size: int = option("examples or preference pairs per step (methods without rollouts)", 128, minimum=1)
    optimizer: OptimizerConfig = option("the optimiser")
    checkpoint_every: int = option("steps between checkpoints", 100, minimum=1)
    keep_checkpoints: int = option(
        "newest checkpoints that are kept; 2 or more leave one to fall back to", 2, minimum=1
    )
    max_nonfinite_steps: int = option(
        "skipped steps with non-finite gradients, in a row, that end the run", 5, minimum=1
    )
    max_empty_steps: int = option("steps without anything to train on, in a row, that end the run", 10, minimum=1)
    log_completions_every: int = option("steps between samples of completions in the log; 0: never", 50, minimum=0)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = option("copies that split the batch", 1, minimum=1)
    fsdp: int = option("shards of parameters that split the batch too", 1, minimum=1)
    tensor: int = option("shards of heads, MLP and vocabulary", 1, minimum=1)
    sequence: int = option("shards of each row's positions, and of parameters", 1, minimum=1)
    expert: int = option("shards of the experts; of all else what fsdp is", 1, minimum=1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measurements on held-out problems."""

    problems: int = option("held-out problems at most; 0: no evaluation", 512, minimum=0)
    every: int = option("steps between evaluations; 0: only after each stage", 0, minimum=0)
    samples: int = option("completions per problem for sampled accuracy and pass@k", 8, minimum=1)
    k: int = option("k of pass@k, at most samples", 8, minimum=1)
    correct_at: float = option("a completion with at least this total reward is correct", 1.0)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written beside metrics.jsonl."""

    tensorboard: bool = option("write TensorBoard event files", True)
    wandb: bool = option("log to Weights & Biases, which must be installed", False)
    progress: bool = option("show progress on the terminal", True)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str = option(
        "directory, also in a bucket (gs://...), that receives metrics.jsonl, config.yaml, checkpoints and curves.png"
    )
    seed: int = option("seed of everything random", 0, minimum=0, below=2**32)
    model: ModelConfig = option("the model", factory=ModelConfig)
    data: DataConfig = option("the problems")
    rewards: tuple[RewardConfig, ...] = option("components of the reward, added up by weight", factory=tuple)
    on_reward_error: Literal["stop", "invalid"] = option(
        "a reward function that raises stops the run, or makes its rows invalid", "stop"
    )
    curriculum: CurriculumConfig = option("which prompts to try next", factory=CurriculumConfig)
    rollout: RolloutConfig = option("the completions sampled at each step")
    method: MethodConfig = option("the training method", factory=MethodConfig)
    roles: dict[str, RoleConfig] = option("models beside the policy, by role", factory=dict)
    warm_start: WarmStartConfig | None = option("a supervised stage before the method; null: none", None)
    training: TrainingConfig = option("the loop")
    mesh: MeshConfig = option("devices", factory=MeshConfig)
    eval: EvalConfig = option("measurements on held-out problems", factory=EvalConfig)
    logging: LoggingConfig = option("what is written beside metrics.jsonl", factory=LoggingConfig)

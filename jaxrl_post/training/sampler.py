"""Between texts and rollouts: prompts are encoded, completions sampled, decoded and scored.

Of several processes each does this for its own problems; what they found is put together, so that all of them know
every reward and none holds all tokens. A reward function that compares completions sees whole groups, of one process.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from jaxrl_post import data, rewards
from jaxrl_post import mesh as mesh_lib
from jaxrl_post.rollout import BUDGET, EXIT, Prompts
from jaxrl_post.rollout.host import ALONE, Processes
from jaxrl_post.training import distributed
from jaxrl_post.training.config import ConfigError
from jaxrl_post.training.environment_setup import HostTurns, by_token
from jaxrl_post.training.generation import Continued, Generation, Tasks, compiled_generate, sample_on_host
from jaxrl_post.training.server_setup import PolicyServer
from jaxrl_post.training.setup import Setup
from jaxrl_post.training.shares import Share, make_share
from jaxrl_post.training.subgroups import Budgets, subgroup_metrics, with_budgets
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, Array, Params, Rollouts

COMPONENT = "component/"
"""What the names of the reward's components begin with in a process's report."""

ENVIRONMENT_COUNTS = ("turns", "environment_errors", "environment_timeouts")

SHOWN = 4
"""Problems of a batch whose first completion every process gets to see, for the log."""


class Begun(NamedTuple):
    """Completions that the devices are given to sample, in one compiled call.

    Attributes:
        problems: as the data has them; those after the first `count` only fill up the compiled shape.
        count: problems that were asked for.
        version: of the policy, as `Sampler` is given it.
        rollouts: on the devices, which may still be at work.
    """

    problems: list[data.Problem]
    count: int
    version: int
    rollouts: Rollouts


class Sampled(NamedTuple):
    """Rollouts with their texts, and what the rewards said of them.

    Attributes:
        rollouts: on the device, rewards and validity filled in.
        completions: texts of the problems that are this process's own, in order: all `B` where there is one process.
        ended: `[E]`, the problems of which all completions have ended: all `P`, but where completions go on. Only they
            are valid, and in what follows.
        shown: the first completion of each of the first `SHOWN` of them.
        rows: host arrays `[E, G]`, those of all processes: `new_tokens`, `finish`, and, where there are, `entropy`
            (nats, summed over the tokens), `stale_tokens` (of an older policy), `budget` and `exit`.
        scored: by the reward functions of all processes; None where there are none.
    """

    rollouts: Rollouts
    completions: list[str]
    ended: NDArray[np.int64]
    shown: list[str]
    rows: dict[str, NDArray]
    scored: rewards.Scored | None


class Sampler:
    """Samples completions of problems and scores them, in batches of fixed shape.

    Args:
        setup: the run's parts.
        how: groups are sampled.
        name: of the compiled call among the run's programs.
        prompts: prompts of one compiled call; a longer list is sampled in several calls.
        prompt_length: longest prompt, tokens.
        rewarded: score the completions with the run's reward functions.
        budgets: what the members of a group are asked to keep to; None for nothing.
        server: that samples; None for the devices here.
    """

    def __init__(
        self,
        setup: Setup,
        how: Generation,
        *,
        name: str = "",
        prompts: int,
        prompt_length: int,
        rewarded: bool = True,
        budgets: Budgets | None = None,
        server: PolicyServer | None = None,
    ):
        self._setup = setup
        self._group_size = how.group_size
        self._prompts = prompts
        self._prompt_length = prompt_length
        self._rewarded = rewarded
        self._budgets = budgets
        self._how, self._turns, self._server = how, how.turns, server
        if server is not None:
            return
        if not isinstance(how.turns, HostTurns):
            self._generate = setup.program(name, compiled_generate(setup.policy, how), how)
            return
        share = make_share(prompts, setup.rollout_mesh)  # an environment is asked from Python
        if distributed.any_process(len(share.own) < len(share.held)):
            raise ConfigError(
                [
                    f"rollout.environment: the rows of {prompts} prompts do not lie on one process each, which would "
                    "answer them; give a number of prompts that data * fsdp divides (rollout.prompts, eval.problems), "
                    "and a mesh (rollout.mesh) that splits the model within processes only"
                ]
            )

    def __call__(self, params: Params, problems: Sequence[data.Problem], key: Array) -> Sampled:
        """`begin` and `score`, of a policy that does not learn from it."""
        return self.score(self.begin(params, problems, key))

    def begin(
        self,
        params: Params,
        problems: Sequence[data.Problem],
        key: Array,
        *,
        first_id: int = 0,
        version: int = 0,
        carried: Rollouts | None = None,
    ) -> list[Begun]:
        """Have `group_size` completions of each problem sampled, without waiting for them.

        Args:
            params: the policy's parameters.
            problems: `P` problems; where completions go on, those of `carried`, with others where all have ended.
            key: of the random streams.
            first_id: id of the first sequence; the others follow.
            version: the policy's version, recorded with every token; scheduled budgets are those of this step.
            carried: completions to go on with, where they do.
        """
        budgets = self._budgets_at(version)
        if self._server is not None:
            self._server.update(params, version)
        elif self._setup.to_rollout_mesh is not None:
            params = self._setup.to_rollout_mesh(params)
        begun = []
        for start in range(0, len(problems), self._prompts):
            some = list(problems[start : start + self._prompts])
            count = len(some)
            if (
                not isinstance(self._turns, HostTurns) or jax.process_count() > 1
            ):  # one process plays no more than asked
                some += some[:1] * (self._prompts - count)  # filled up to the compiled shape
            share = make_share(len(some), self._setup.rollout_mesh)
            first = first_id + start * self._group_size
            with jax.set_mesh(self._setup.rollout_mesh):
                if isinstance(self._turns, HostTurns):
                    piece = self._answered(params, share, some, key, first, count, version)
                elif self._turns is not None:
                    tasks = self._tasks_of(share, some, first, count)
                    piece = self._generate(params, tasks, key, version=version)
                else:
                    texts = {int(i): [self._asked(some[i], budget) for budget in budgets] for i in share.held}
                    prompts: Any = self._prompts_of(share, texts, first, count)
                    if self._server is not None:
                        piece = self._placed(self._server.sample(prompts, key, self._how))
                    else:
                        prompts = prompts if carried is None else Continued(prompts, carried)
                        piece = self._generate(params, prompts, key, version=version)
            if self._budgets is not None:
                piece = with_budgets(piece, budgets)
            begun.append(Begun(some, count, version, piece))
        return begun

    def score(self, begun: list[Begun], version: int | None = None) -> Sampled:
        """Wait for completions, and score those of problems of which all have ended.

        Args:
            begun: all that was sampled for one batch.
            version: of the policy that is going to learn from it, where that may be another than what sampled.
        """
        pieces, own, start = [], [], 0
        for some, count, sampled_by, piece in begun:
            share = make_share(len(some), self._setup.rollout_mesh)
            rows = _rows(share, piece)
            if version is not None:
                older = share.read((piece.mask > 0) & (piece.version < version))
                rows["stale_tokens"] = older.sum(axis=1).reshape(-1, self._group_size)
            kept = share.own < count
            if self._how.tokens_per_step is not None:
                kept &= (rows["finish"] != FINISH_NONE).all(axis=1)
            mine, budgets = share.own[kept], self._budgets_at(sampled_by)
            asked = [[self._asked(some[i], budget) for budget in budgets] for i in mine]
            rows = {name: _of_problems(x, kept) for name, x in rows.items()}
            own.append(_Own(start + mine, [some[i] for i in mine], asked, rows))
            pieces.append(piece if count == len(some) else _first_prompts(piece, count))
            start += count
        rollouts = pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
        if self._setup.rollout_mesh is not self._setup.mesh:
            rollouts = mesh_lib.place(rollouts, mesh_lib.rollout_shardings(rollouts, self._setup.mesh))
        completions = [text for part in own for text in self._decode(part)]
        every = distributed.exchange(lambda: self._report(own, completions))
        return self._merged(rollouts, completions, every)

    def _budgets_at(self, version: int) -> tuple[int | None, ...]:
        return (None,) if self._budgets is None else self._budgets.at(version)

    def _asked(self, problem: data.Problem, budget: int | None) -> data.Problem:
        return problem if self._budgets is None else data.extend_prompt(problem, self._budgets.prompt("", budget))

    def _prompts_of(self, share: Share, texts: dict[int, list[data.Problem]], first_id: int, count: int) -> Prompts:
        """The prompts of one compiled call; those after the first `count` only fill it up."""
        encoded = [data.encode_prompt(self._setup.tokenizer, asked) for i in texts for asked in texts[i]]
        tokens, length = data.pad_prompts(encoded, self._prompt_length)
        prompt_id = [asked.get("prompt_id", -1) if i < count else -1 for i in texts for asked in texts[i]]
        ids = self._ids(share, first_id).reshape(len(encoded), -1)
        return Prompts(*share.place((tokens, length, np.asarray(prompt_id, np.int32), ids)))

    def _tasks_of(self, share: Share, problems: list[data.Problem], first_id: int, count: int) -> Tasks:
        """The same of tasks of the environment."""
        numbers = np.asarray([problems[i]["task"] for i in share.held], np.int32)
        return Tasks(*share.place((numbers, _prompt_ids(share, problems, count), self._ids(share, first_id))))

    def _answered(
        self,
        params: Params,
        share: Share,
        problems: list[data.Problem],
        key: Array,
        first_id: int,
        count: int,
        version: int,
    ) -> Rollouts:
        """Groups that act in an environment in Python, which answers each process's own."""
        several = Processes(share.place, functools.partial(jax.tree.map, share.read), distributed.any_process)
        rollouts = sample_on_host(
            self._setup.policy,
            params,
            [problems[i] for i in share.held],
            key,
            how=self._how,
            tokenizer=self._setup.tokenizer,
            max_length=self._prompt_length + self._how.max_new_tokens,
            prompt_id=_prompt_ids(share, problems, count),
            id=self._ids(share, first_id),
            version=version,
            processes=several if jax.process_count() > 1 else ALONE,
        )
        return self._placed(rollouts)

    def _placed(self, rollouts: Rollouts) -> Rollouts:
        return mesh_lib.place(rollouts, mesh_lib.rollout_shardings(rollouts, self._setup.rollout_mesh))

    def _ids(self, share: Share, first_id: int) -> NDArray[np.uint32]:
        ids = first_id + share.held.astype(np.uint64)[:, None] * self._group_size + np.arange(self._group_size)
        return (ids % 2**32).astype(np.uint32)

    def _decode(self, own: _Own) -> list[str]:
        tokenizer, each = self._setup.tokenizer, self._group_size // len(own.asked[0]) if own.asked else 1
        texts, row = [], 0
        for problem, lengths in zip(own.asked, own.rows["length"], strict=False):
            if "begins" in own.rows:
                starts = own.rows["begins"][row : row + len(lengths)].tolist()
            else:
                starts = [len(data.encode_prompt(tokenizer, asked)) for asked in problem for _ in range(each)]
            for start, length in zip(starts, lengths, strict=True):
                texts.append(tokenizer.decode(own.rows["tokens"][row, start:length].tolist()))
                row += 1
        return texts

    def _report(self, own: list[_Own], completions: list[str]) -> dict[str, NDArray]:
        """What the other processes have to know of this one's problems: a few numbers a completion."""
        group = self._group_size
        problem = np.concatenate([part.index for part in own])
        report = {"problem": problem}
        for name in own[0].rows.keys() - {"tokens", "length", "begins"}:
            report[name] = np.concatenate([part.rows[name] for part in own])
        shown = {int(i): completions[row * group] for row, i in enumerate(problem[:SHOWN])}
        report["shown"] = np.asarray(json.dumps(shown))
        if not self._rewarded:
            return report
        functions, shape = self._setup.reward_functions, (len(problem), group)
        if not len(problem):  # more processes than problems
            nothing = {COMPONENT + function.name: np.zeros(shape, np.float32) for function in functions}
            errors = np.zeros(len(functions), np.int64)
            return report | nothing | {"total": np.zeros(shape), "valid": np.zeros(shape, bool), "errors": errors}
        problems = [problem for part in own for problem in part.problems]
        columns = data.columns(problems, repeat=group)
        if self._turns is not None:
            columns["environment_reward"] = report["environment_reward"].reshape(-1).tolist()
        scored = rewards.score(
            functions,
            [
                asked["prompt"]
                for part in own
                for several in part.asked
                for asked in several
                for _ in range(group // len(several))
            ],
            completions,
            columns,
            on_error=self._setup.config.on_reward_error,
        )
        components = {COMPONENT + name: values.reshape(shape) for name, values in scored.components.items()}
        errors = np.asarray([scored.errors[function.name] for function in functions])
        return (
            report
            | components
            | {
                "total": scored.total.reshape(shape),
                "valid": scored.valid.reshape(shape),
                "errors": errors,
            }
        )

    def _merged(self, rollouts: Rollouts, completions: list[str], every: list[dict[str, NDArray]]) -> Sampled:
        """The reports of all processes put together."""
        problem = np.concatenate([report["problem"] for report in every])
        order = np.argsort(problem)
        ended, rows = problem[order], {}
        for name in every[0].keys() - {"problem", "shown", "errors"}:
            rows[name] = np.concatenate([report[name] for report in every])[order]
        texts = {int(i): text for report in every for i, text in json.loads(str(report["shown"])).items()}
        shown = [texts[i] for i in sorted(texts)[:SHOWN]]
        if not self._rewarded:
            return Sampled(rollouts, completions, ended, shown, rows, None)
        errors = np.sum([report["errors"] for report in every], axis=0)
        names = [function.name for function in self._setup.reward_functions]
        components = {name: rows.pop(COMPONENT + name) for name in names}
        total = rows.pop("total").astype(np.float32)
        valid = rows.pop("valid") & (rows["finish"] != FINISH_ABORT)  # nothing is learned from what was given up
        shape = rollouts.reward.shape[:1] + total.shape[1:]
        layout = NamedSharding(self._setup.mesh, mesh_lib.spec(("batch", None), shape, self._setup.mesh.shape))
        whole = jax.tree.map(lambda x: _of_all(x, ended, rollouts.num_prompts), (total, components, valid))
        placed = mesh_lib.place(whole, (layout, dict.fromkeys(components, layout), layout))
        rollouts = rollouts.replace(reward=placed[0], rewards=placed[1] | by_token(rollouts), valid=placed[2])
        scored = rewards.Scored(
            total.reshape(-1),
            {name: values.reshape(-1) for name, values in components.items()},
            valid.reshape(-1),
            {name: int(error) for name, error in zip(names, errors, strict=True)},
        )
        return Sampled(rollouts, completions, ended, shown, rows, scored)


class _Own(NamedTuple):
    """What one compiled call gave of the problems that are this process's own.

    Attributes:
        index: of each problem among those that were asked for.
        problems: as the data has them.
        asked: the prompts of each: one, or one for each sub-group.
        rows: host arrays of these problems, `tokens` `[O * G, T]` and numbers `[O, G]`.
    """

    index: NDArray
    problems: list[data.Problem]
    asked: list[list[data.Problem]]
    rows: dict[str, NDArray]


def _rows(share: Share, rollouts: Rollouts) -> dict[str, NDArray]:
    """What is read back of the completions that are this process's own."""
    group = rollouts.group_size
    rows = {
        "tokens": share.read(rollouts.tokens),
        "length": share.read(rollouts.length),
        "finish": share.read(rollouts.finish),
        "new_tokens": share.read(rollouts.mask).sum(axis=1).reshape(-1, group),
    }
    if "entropy" in rollouts.extras:  # a server tells none
        rows["entropy"] = share.read(rollouts.extras["entropy"]).sum(axis=1).reshape(-1, group)
    if by_token(rollouts):
        rows["environment_reward"] = share.read(rollouts.reward)
        rows |= {name: share.read(rollouts.extras[name]) for name in ENVIRONMENT_COUNTS if name in rollouts.extras}
        # Whoever answers may have changed the prompt.
        spoken = share.read(rollouts.mask) > 0
        rows["begins"] = np.where(spoken.any(axis=1), spoken.argmax(axis=1), rows["length"].reshape(-1))
    return rows | {name: share.read(rollouts.extras[name]) for name in (BUDGET, EXIT) if name in rollouts.extras}


def _of_problems(rows: NDArray, kept: NDArray[np.bool_]) -> NDArray:
    """Of `[O * k, ...]` the rows of the problems that are kept."""
    return rows.reshape(len(kept), -1, *rows.shape[1:])[kept].reshape(-1, *rows.shape[1:]) if len(kept) else rows


def _of_all(rows: NDArray, ended: NDArray[np.int64], count: int) -> NDArray:
    """`[E, G]` as `[P, G]`, with zeros for the others."""
    whole = np.zeros((count, *rows.shape[1:]), rows.dtype)
    whole[ended] = rows
    return whole


def _prompt_ids(share: Share, problems: list[data.Problem], count: int) -> NDArray[np.int32]:
    """Of the problems held; -1 behind the first `count`, which only fill up the compiled shape."""
    return np.asarray([problems[i].get("prompt_id", -1) if i < count else -1 for i in share.held], np.int32)


def _first_prompts(rollouts: Rollouts, count: int) -> Rollouts:
    prompts, group = rollouts.num_prompts, rollouts.group_size
    return jax.tree.map(lambda x: x[: count if x.shape[0] == prompts else count * group], rollouts)


def sampled_metrics(sampled: Sampled, correct_at: float) -> dict[str, float]:
    """What a batch of rollouts says about the policy, before anything is filtered.

    Args:
        sampled: rollouts and their scores.
        correct_at: a completion with at least this total reward is correct.

    Returns:
        `reward` (mean over scored completions), `reward_std` (mean over groups of the unbiased standard deviation),
        `frac_reward_zero_std` (groups whose rewards are all equal), `accuracy`, `rewards/<name>/mean|std`,
        `rewards/unscored` (fraction), `completions/*` (tokens; `clipped_ratio` is the fraction cut at the limit,
        `aborted_ratio` that of those the engine gave up, which are not valid; `stale_ratio` the fraction of tokens that
        an older policy sampled, where there are any; `mean_turns` in an environment, of which
        one in Python gives `environment/errors` and, among them, `environment/timeouts`, numbers of calls),
        `entropy` (nats per token, of the tempered distribution; not of what a server samples), and those of
        `subgroup_metrics`.
    """
    rows = sampled.rows
    lengths = rows["new_tokens"].reshape(-1)
    if not len(lengths):
        return {}
    ended = rows["finish"].reshape(-1) != FINISH_LENGTH
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1.0 - ended.mean()),
        "completions/aborted_ratio": float((rows["finish"] == FINISH_ABORT).mean()),
    }
    if "entropy" in rows:
        metrics["entropy"] = float(rows["entropy"].sum() / max(lengths.sum(), 1.0))
    if "stale_tokens" in rows:
        metrics["completions/stale_ratio"] = float(rows["stale_tokens"].sum() / max(lengths.sum(), 1))
    if "turns" in rows:
        metrics["completions/mean_turns"] = float(rows["turns"].mean())
    for name in ("environment_errors", "environment_timeouts"):
        if name in rows:
            metrics[name.replace("_", "/")] = float(rows[name].sum())
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    if sampled.scored is None:
        return metrics
    shape = rows["new_tokens"].shape
    reward, valid = sampled.scored.total.astype(np.float64).reshape(shape), sampled.scored.valid.reshape(shape)
    arrays = {**rows, "length": rows["new_tokens"], "reward": reward, "valid": valid}
    metrics |= subgroup_metrics(arrays, correct_at)
    counts = valid.sum(axis=1)
    metrics["rewards/unscored"] = float(1.0 - valid.mean())
    if not valid.any():
        return metrics
    metrics["reward"] = float(reward[valid].mean())
    metrics["accuracy"] = float((reward[valid] >= correct_at).mean())
    groups = [row[keep] for row, keep in zip(reward, valid, strict=True) if keep.sum() > 1]
    if groups and counts.max() > 1:
        stds = np.array([group.std(ddof=1) for group in groups])
        metrics["reward_std"] = float(stds.mean())
        metrics["frac_reward_zero_std"] = float((stds < 1e-6).mean())
    for name, values in sampled.scored.components.items():
        known = values[~np.isnan(values)].astype(np.float64)
        if known.size:
            metrics[f"rewards/{name}/mean"] = float(known.mean())
            metrics[f"rewards/{name}/std"] = float(known.std(ddof=1)) if known.size > 1 else 0.0
    for name, errors in sampled.scored.errors.items():
        if errors:
            metrics[f"rewards/{name}/errors"] = float(errors)
    return metrics

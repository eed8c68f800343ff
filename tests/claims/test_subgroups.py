"""Claims of groups with members of several kinds, on a policy that only decides when to stop thinking."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import advantages, methods, training
from jaxrl_post.methods.signals import stateless
from jaxrl_post.rollout import draw_exits
from jaxrl_post.types import FINISH_STOP, Rollouts, TokenStats
from tests.claims import lab

LIMIT = 8  # tokens: a stop, or another step of the thought
PLACES = jnp.arange(1, LIMIT + 1)


def logits(params, budgets):
    """`[P, G, LIMIT]`: of stopping at each token. A budget in the prompt (0: none) is heeded a little."""
    asked = jnp.where(budgets[..., None] > 0, jnp.sign(PLACES - budgets[..., None] + 0.5), 0.0)
    return params[:, None, :] + asked


def score(params, rollouts, fields, key):
    """A `Score` of `params`, `[P, LIMIT]` logits of stopping."""
    del key, fields
    x = logits(params, rollouts.extras["budget"])[rollouts.prompt_id].reshape(-1, LIMIT)
    stops = rollouts.tokens[:, 1:] == 1
    return TokenStats(logp=jnp.pad(jax.nn.log_sigmoid(jnp.where(stops, x, -x)), ((0, 0), (1, 0))))


def lengths_of(params):
    """`[P, LIMIT]`: the probability of each length without a budget, the last of it by force."""
    stop = jax.nn.sigmoid(params).at[:, -1].set(1.0)
    goes_on = jnp.cumprod(jnp.concatenate([jnp.ones_like(stop[:, :1]), 1 - stop[:, :-1]], axis=1), axis=1)
    return goes_on * stop


def sample(params, key, budgets):
    """Sequences under the budgets `[P, G]`, not judged."""
    shape, x = budgets.shape, logits(params, budgets)
    stops = jax.random.bernoulli(key, jax.nn.sigmoid(x))
    size = jnp.where(jnp.any(stops, axis=2), jnp.argmax(stops, axis=2) + 1, LIMIT).reshape(-1, 1)
    mask = jnp.pad((size >= PLACES).astype(jnp.float32), ((0, 0), (1, 0)))
    nothing = jnp.where(mask > 0, 0, -1)
    made = Rollouts(
        tokens=jnp.pad(stops.reshape(-1, LIMIT).astype(jnp.int32), ((0, 0), (1, 0))),
        mask=mask,
        logp=mask,
        step=nothing,
        version=nothing,
        reward=jnp.zeros(shape),
        rewards={},
        valid=jnp.ones(shape, bool),
        length=size.reshape(shape) + 1,
        finish=jnp.full(shape, FINISH_STOP, jnp.int8),
        id=jnp.arange(mask.shape[0], dtype=jnp.uint32).reshape(shape),
        prompt_id=jnp.arange(shape[0]),
        extras={"budget": budgets},
    )
    return made.replace(logp=score(params, made, frozenset(), key).logp * mask)


def trained(method, start, budgets, judge, key, *, steps, optimizer):
    """Parameters after training; `judge(rollouts, key) -> rollouts`."""
    if isinstance(method, lab.Either):
        options = {"steps": steps, "optimizer": optimizer}
        return lab.pick(method, lambda method: trained(method, start, budgets, judge, key, **options))

    def batch(params, key):
        draw, judged = jax.random.split(key)
        return judge(sample(params, draw, budgets), judged)

    shapes = jax.eval_shape(batch, start, key)
    state = training.init({"policy": start}, method, optimizer, key, rollouts=shapes, num_prompts=start.shape[0])
    step = training.make_step(score, method, optimizer)

    def one(state, number):
        return step(state, batch(state.params["policy"], jax.random.fold_in(key, number)))[0], None

    return jax.lax.scan(one, state, jnp.arange(steps))[0].params["policy"]


def test_hbpo_keeps_hard_problems_where_a_length_penalty_for_all_gives_them_up():
    # Problems of rising difficulty: the length at which an answer begins to be right, and how often it is from there.
    needed, right = jnp.array([1, 2, 4, 6]), jnp.array([0.95, 0.95, 0.8, 0.6])
    accuracy = jnp.where(needed[:, None] <= PLACES, right[:, None], 0.02)
    start = jnp.full((4, LIMIT), -2.5)
    budgets = jnp.broadcast_to(jnp.repeat(jnp.array([1.0, 2.0, 4.0, 5.0]), 4), (4, 16))  # of 8, as the paper's of 4096

    def judge(rollouts, key):
        chance = accuracy[jnp.arange(4)[:, None], rollouts.length - 2]
        return rollouts.replace(reward=jax.random.bernoulli(key, chance).astype(jnp.float32))

    def mean_lengths(params):
        return lengths_of(params) @ PLACES.astype(float)

    def outcome(compared, key):
        method, asked = compared
        params = trained(method, start, asked, judge, key, steps=120, optimizer=optax.adam(0.1))
        length, before = mean_lengths(params), mean_lengths(start)
        kept = (lengths_of(params)[3] @ accuracy[3]) / (lengths_of(start)[3] @ accuracy[3])
        # Of the three that are claimed the one that holds least: fewer tokens, accuracy kept, length by difficulty.
        follows = jnp.corrcoef(length, needed)[0, 1]
        return jnp.where(jnp.sum(length) < jnp.sum(before), jnp.minimum(kept, follows), 0.0)

    def penalised(s):
        return advantages.grpo(s.reward - s.lengths / LIMIT, s.valid)

    uniform = methods.policy_gradient(advantage=stateless(penalised, min_group=2))
    method, baseline = (methods.hbpo(max_length=LIMIT), budgets), (uniform, jnp.zeros_like(budgets))
    lab.check("hbpo", outcome, method=method, baseline=baseline, seeds=32, margin=0.5)


def test_s_grpo_shortens_thoughts_by_more_than_a_third_at_equal_accuracy_and_not_without_decay():
    exits, needs = 4, 2
    start = jnp.full((4, LIMIT), -2.5)

    def serial(rollouts, key):
        """Groups of exits from their last member's thought, right once it is as long as the problem needs."""
        cut_key, need_key = jax.random.split(key)
        shape = (4, exits + 1, LIMIT + 1)
        whole, mask = (x.reshape(shape)[:, -1:] for x in (rollouts.tokens, rollouts.mask))
        thought = jnp.sum(mask * (whole == 0), axis=(1, 2)).astype(jnp.int32)
        cuts = draw_exits(cut_key, rollouts.id[:, -1], thought, count=exits)
        at = jnp.concatenate([cuts, thought[:, None]], axis=1)
        place, last = jnp.arange(LIMIT + 1), (jnp.arange(exits + 1) == exits)[:, None]
        stop = at[..., None] + 1
        tokens = jnp.where(last, whole, place == stop)
        masks = jnp.where(last, mask, (place >= 1) & (place <= stop))
        need = jax.random.randint(need_key, (4, 1), 1, needs + 1)
        return rollouts.replace(
            tokens=tokens.reshape(-1, LIMIT + 1).astype(jnp.int32),
            mask=masks.reshape(-1, LIMIT + 1).astype(jnp.float32),
            reward=(at >= need).astype(jnp.float32),
            extras={**rollouts.extras, "exit": at},
        )

    def thoughts(params):
        """Mean tokens of a thought, and how often it is long enough."""
        longer = jnp.cumprod(1 - jax.nn.sigmoid(params), axis=1)
        return jnp.mean(jnp.sum(longer, axis=1)), jnp.mean(longer[:, :needs])

    def outcome(method, key):
        unasked = jnp.zeros((4, exits + 1))
        params = trained(method, start, unasked, serial, key, steps=200, optimizer=optax.adam(0.05))
        (length, accuracy), (length_before, accuracy_before) = thoughts(params), thoughts(start)
        return jnp.where(accuracy >= accuracy_before, 1 - length / length_before, 0.0)

    options = {"old_logp": "recompute"}  # an exit is not sampled
    without = methods.s_grpo(decay=1.0, **options)
    found = lab.check("s-grpo", outcome, method=methods.s_grpo(**options), baseline=without, seeds=32, margin=0.35)
    assert found.method.mean() > 0.35

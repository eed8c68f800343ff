"""Turns inside the loop over tokens, against a loop in plain Python that plays the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.advantages import to_turns
from jaxrl_post.mesh import make_mesh
from jaxrl_post.models import cache as caches
from jaxrl_post.rollout import SamplingParams, generate_turns
from jaxrl_post.rollout.environments import Environment, Text, Transition, gridworld
from jaxrl_post.sampling import row_keys
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, Policy, Unembedding
from tests.rollout.table import markov

V, A, TURNS, G = 16, 3, 4, 2
KEY = jax.random.key(5)
TASKS = jnp.array([4, 9, 2, 7, 13])
STOPS = (3, 9, 12)
STOPPED = SamplingParams(temperature=0.8, stop_tokens=STOPS)
POLICY = models.decoder(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, init_std=0.4)


TABLE = markov(V)


@functools.cache
def params(policy=POLICY):
    return jax.jit(policy.init)(jax.random.key(0))


def sum_up(prompt, action):
    """What the test's environment remembers: sums of tokens, so that each of them and their number count."""
    return prompt + sum(action) + len(action)


def counting(**changes):
    """An environment whose observations have 0 to 3 tokens, the first of them random, and which ends now and then."""

    def reset(task, key):
        length = 1 + task % 3
        tokens = (3 * task + jnp.arange(3)) % V
        return {"total": task}, Text(jnp.where(jnp.arange(3) < length, tokens, 10**6), length)

    def step(state, action, key):
        total = state["total"] + jnp.sum(action.tokens) + action.length  # 0 behind the action
        tokens = (jax.random.randint(key, (), 0, V) + total * jnp.arange(3)) % V
        return Transition({"total": total}, Text(tokens, total % 4), total % 7 / 4, total % 5 == 0)

    return Environment(reset, step, 3, 3, lambda state: state["total"])._replace(**changes)


class Counting:
    """The same in plain Python, one episode."""

    def __init__(self, task):
        self.total = task
        self.prompt = [(3 * task + index) % V for index in range(1 + task % 3)]
        self.fingerprint = task

    def play(self, action):
        self.total = self.fingerprint = sum_up(self.total, action)
        return self.total % 7 / 4, self.total % 4, self.total % 5 == 0

    def saw(self, observation):
        return all(token == (observation[0] + self.total * index) % V for index, token in enumerate(observation))


def replay(out, row, twin, *, room, stops=STOPS, max_turns=TURNS, action_tokens=A):
    """Play a transcript with the twin and compare all that is recorded; returns how it ended."""
    names = ("tokens", "mask", "step", "version", "logp")
    got = {name: np.asarray(getattr(out, name))[row] for name in names}
    got["state"], got["entropy"] = (np.asarray(out.extras[name])[row] for name in ("state", "entropy"))
    rewards = np.asarray(out.rewards["environment"])[row]
    tokens, width = got["tokens"].tolist(), len(got["tokens"])
    expected = {"mask": np.zeros(width), "step": np.full(width, -1), "state": np.zeros(width)}
    earned = np.zeros(width)
    at = begin = len(twin.prompt)
    assert tokens[:at] == twin.prompt
    for turn in range(max_turns):
        action, first = [], at
        while not action or (action[-1] not in stops and len(action) < action_tokens and at - begin < room):
            action.append(tokens[at])
            at += 1
        expected["mask"][first:at], expected["step"][first:at] = 1, turn
        expected["state"][first] = twin.fingerprint
        earned[at - 1], length, done = twin.play(action)
        if done or turn + 1 == max_turns or begin + room - at <= length:
            break
        assert twin.saw(tokens[at : at + length])
        at += length
    finish = FINISH_STOP if done else FINISH_LENGTH
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    np.testing.assert_array_equal(rewards, earned)
    outside = expected["mask"] == 0
    assert not got["logp"][outside].any()
    assert not got["entropy"][outside].any()
    assert (got["entropy"][~outside] > 0).all()
    assert got["version"].tolist() == np.where(outside, -1, 17).tolist()
    ends = (np.asarray(x).reshape(-1)[row] for x in (out.length, out.finish, out.extras["turns"], out.reward))
    assert tuple(ends) == (at, finish, turn + 1, pytest.approx(earned.sum()))
    return finish


ENVIRONMENT = counting()


@functools.cache
def program(sampling=STOPPED, policy=POLICY, environment=ENVIRONMENT, **options):
    options = {"max_turns": TURNS, "max_turn_tokens": A, "group_size": G, "version": 17} | options
    run = functools.partial(generate_turns, policy, sampling=sampling, **options)
    return jax.jit(lambda params, tasks, key, id=None: run(params, environment, tasks, key, id=id))


@functools.cache
def base(policy=POLICY):
    return program(policy=policy)(params(policy), TASKS, KEY)


def by_id(out):
    """All that a sequence is, by its id, up to its end."""
    found = {}
    for row, number in enumerate(np.asarray(out.id).reshape(-1).tolist()):
        length = int(np.asarray(out.length).reshape(-1)[row])
        fields = (out.tokens, out.mask, out.step, out.rewards["environment"], out.extras["state"])
        by_token = [np.asarray(x)[row, :length].tolist() for x in fields]
        by_sequence = [np.asarray(x).reshape(-1)[row].item() for x in (out.finish, out.valid, out.extras["turns"])]
        found[number] = (by_token, by_sequence, np.asarray(out.logp)[row, :length])
    return found


def same(found, expected):
    assert found.keys() <= expected.keys()
    for number, (by_token, by_sequence, logp) in found.items():
        assert by_token == expected[number][0]
        assert by_sequence == expected[number][1]
        np.testing.assert_allclose(logp, expected[number][2], atol=1e-5)


def test_transcripts_are_those_of_a_plain_loop_over_turns():
    out = base()
    assert out.tokens.shape == (10, 3 + TURNS * A + (TURNS - 1) * 3)
    assert np.array_equal(out.prompt_id, TASKS)
    rows = [replay(out, row, Counting(int(TASKS[row // G])), room=21) for row in range(10)]
    assert set(rows) == {FINISH_STOP, FINISH_LENGTH}
    assert np.asarray(out.valid).all()
    assert len(set(np.asarray(out.extras["turns"]).reshape(-1).tolist())) > 1


def test_what_the_environment_draws_differs_between_sequences_and_turns():
    out, firsts, changing = base(), [], 0
    step, length = np.asarray(out.step), np.asarray(out.length).reshape(-1)
    for row in range(10):
        inside = np.arange(step.shape[1])
        fed = (step[row] < 0) & (inside < length[row]) & (np.roll(step[row], 1) >= 0)
        own = np.asarray(out.tokens)[row, fed].tolist()
        firsts += own[:1]
        changing += len(set(own)) > 1
    assert len(set(firsts)) > 3
    assert changing > 3


@pytest.mark.parametrize("room", [pytest.param(3, marks=pytest.mark.nightly), 10])
def test_an_episode_ends_where_observation_and_answer_do_not_fit(room):
    out = program(policy=TABLE, max_new_tokens=room)(params(TABLE), TASKS, KEY)
    assert out.tokens.shape == (10, 3 + room)
    rows = [replay(out, row, Counting(int(TASKS[row // G])), room=room) for row in range(10)]
    assert FINISH_LENGTH in rows
    assert np.max(np.asarray(out.length) - np.asarray(base(TABLE).length)) <= 0
    assert not np.array_equal(out.length, base(TABLE).length)


def test_log_probs_are_those_that_scoring_the_whole_transcript_gives():
    out = base()
    score = jax.jit(models.score(POLICY, temperature=0.8), static_argnums=2)
    stats = score(params(), out, frozenset({"logp", "entropy"}), KEY)
    np.testing.assert_allclose(out.logp, stats.logp * out.mask, atol=1e-5)
    np.testing.assert_allclose(out.extras["entropy"], stats.entropy * out.mask, atol=1e-5)
    assert np.asarray(out.logp).min() < -1


def test_every_sampled_token_is_the_draw_of_its_id_and_position_from_the_whole_transcript():
    out = base()
    positions = jnp.broadcast_to(jnp.arange(out.tokens.shape[1]), out.tokens.shape)
    hidden = jax.jit(lambda p: POLICY.hidden(p, out.tokens, positions)[0])(params())
    logits = np.asarray(models.logits(POLICY.unembed(params()), hidden), np.float64) / 0.8
    rows, places = np.nonzero(np.asarray(out.mask))
    keys = row_keys(KEY, out.id.reshape(-1)[rows], jnp.asarray(places))
    noise = np.asarray(jax.jit(jax.vmap(lambda key: jax.random.gumbel(key, (V,))))(keys))
    assert np.array_equal(np.argmax(logits[rows, places - 1] + noise, axis=1), np.asarray(out.tokens)[rows, places])


@pytest.mark.parametrize(("slots", "refill"), [(2, 1), pytest.param(5, 3, marks=pytest.mark.nightly)])
def test_a_queue_through_few_slots_gives_what_all_at_once_give(slots, refill):
    out = program(slots=slots, refill=refill)(params(), TASKS, KEY)
    assert np.array_equal(out.id, base().id)
    same(by_id(out), by_id(base()))


@pytest.mark.parametrize("slots", [4, pytest.param(None, marks=pytest.mark.nightly)])
def test_episodes_that_start_over_in_a_full_pool_of_pages_are_played_as_they_were(monkeypatch, slots):
    monkeypatch.setitem(caches.BLOCKS, "cpu", 4)
    decoded = []

    def decode(params, tokens, positions, cache):
        jax.debug.callback(lambda x: decoded.append(int((x >= 0).sum())), positions)
        return POLICY.decode(params, tokens, positions, cache)

    room = -(-base().tokens.shape[1] // 4)  # pages of the longest episode
    watched = POLICY._replace(decode=decode)
    out = program(policy=watched, slots=slots, cache_pages=room + 2)(params(), TASKS, KEY)
    jax.effects_barrier()
    assert np.array_equal(out.id, base().id)
    same(by_id(out), by_id(base()))
    once = np.asarray(out.length - (1 + TASKS % 3)[:, None]).sum()
    assert sum(decoded) > once + 5  # tokens of those that have gone back


def test_alternatives_are_those_of_what_the_policy_says():
    out = program(alternatives=3)(params(), TASKS, KEY)
    same(by_id(out), by_id(base()))
    found, logp = (np.asarray(out.extras[name]) for name in ("alternatives", "alternative_logp"))
    said = np.asarray(out.mask) > 0
    assert not found[~said].any()
    assert not logp[~said].any()
    score = jax.jit(models.score(POLICY, temperature=0.8), static_argnums=2)
    rows, last = np.arange(len(said)), np.asarray(out.length).reshape(-1) - 1
    for place in range(3):
        # Another last token changes nothing that stands before it.
        one = out.replace(tokens=out.tokens.at[rows, last].set(found[rows, last, place]))
        expected = np.asarray(score(params(), one, frozenset({"logp"}), KEY).logp)[rows, last]
        np.testing.assert_allclose(logp[rows, last, place], expected, atol=1e-5)
    assert (np.diff(logp, axis=-1)[said] <= 0).all()


def test_an_episode_is_the_same_alone():
    alone = program(group_size=1)
    for row in range(10):
        out = alone(params(), TASKS[row // G : row // G + 1], KEY, jnp.array([[row]], jnp.uint32))
        same(by_id(out), by_id(base()))


def test_an_episode_is_the_same_on_a_mesh_and_without_shared_prompts():
    with jax.set_mesh(make_mesh(data=2, devices=jax.devices()[:2])):
        out = program(policy=POLICY._replace(insert=None))(params(), TASKS, KEY)
    same(by_id(out), by_id(base()))


def test_other_tasks_and_keys_compile_nothing():
    run = jax.jit(functools.partial(generate_turns, max_turns=2, max_turn_tokens=2), static_argnums=(0, 2))
    first = run(TABLE, params(TABLE), ENVIRONMENT, jnp.array([4, 9]), KEY)
    other = run(TABLE, params(TABLE), ENVIRONMENT, jnp.array([5, 2]), jax.random.key(6))
    assert run._cache_size() == 1
    assert not np.array_equal(first.tokens, other.tokens)
    assert other.prompt_id.tolist() == [5, 2]


def test_the_states_that_methods_compare_are_those_in_which_turns_were_begun():
    out = base()
    state, exists = to_turns(out.extras["state"], out.step, out.mask, num_turns=TURNS)
    assert np.array_equal(np.sum(exists, axis=1), np.asarray(out.extras["turns"]).reshape(-1))
    assert np.array_equal(state[:, 0], np.repeat(TASKS, G))
    plain = jax.eval_shape(program(environment=counting(fingerprint=None)), params(), TASKS, KEY)
    assert "state" not in plain.extras


def test_logits_that_are_no_numbers_abort_their_episode_and_no_other():
    bad = 5  # stops nothing

    def decode(params, tokens, *rest):
        hidden, cache = TABLE.decode(params, tokens, *rest)
        return jnp.where((tokens == bad)[..., None], jnp.nan, hidden), cache

    whole, aborted = by_id(base(TABLE)), 0
    out = program(policy=TABLE._replace(decode=decode))(params(TABLE), TASKS, KEY)
    for row, (by_token, by_sequence, _) in by_id(out).items():
        tokens, mask = whole[row][0][:2]
        # The state behind the bad token is one to draw from only where nothing is fed behind it.
        fails = [at for at in range(len(tokens) - 1) if tokens[at] == bad and mask[at + 1]]
        if not fails:
            assert (by_token, by_sequence) == whole[row][:2]
            continue
        aborted += 1
        assert by_token == [field[: fails[0] + 1] for field in whole[row][0]]
        begun = set(whole[row][0][2][: fails[0] + 1]) - {-1}
        # A turn counts when it has been played, that is, when it is not the one of the token that failed.
        assert by_sequence == [FINISH_ABORT, False, len(begun - {whole[row][0][2][fails[0] + 1]})]
    assert 0 < aborted < 10


def test_a_prompt_of_no_length_aborts_its_episode_and_no_other():
    def reset(task, key):
        state, prompt = ENVIRONMENT.reset(task, key)
        return state, Text(prompt.tokens, jnp.where(task == TASKS[1], 0, prompt.length))

    out, whole = program(environment=counting(reset=reset))(params(), TASKS, KEY), base()
    assert out.valid.tolist() == [[row != 1] * G for row in range(len(TASKS))]
    assert out.extras["turns"][1].tolist() == out.reward[1].tolist() == [0] * G
    assert not np.asarray(out.mask)[G : 2 * G].any()
    np.testing.assert_array_equal(np.delete(out.tokens, [G, G + 1], 0), np.delete(whole.tokens, [G, G + 1], 0))


def test_an_environment_that_fails_aborts_its_episode_and_no_other():
    def step(state, action, key):
        found = ENVIRONMENT.step(state, action, key)
        case, (tokens, length) = found.state["total"] % 8, found.observation
        return found._replace(
            reward=jnp.where(case == 1, jnp.nan, found.reward),
            observation=Text(tokens, jnp.select([case == 2, case == 3], [4, -1], length)),
        )

    whole, failed = by_id(base()), []
    out = program(environment=counting(step=step))(params(), TASKS, KEY)
    for row, (by_token, by_sequence, _) in by_id(out).items():
        tokens, mask, turns, rewards, _ = whole[row][0]
        totals, total = [], int(TASKS[row // G])
        for turn in range(whole[row][1][2]):
            total = sum_up(total, [token for token, own in zip(tokens, turns, strict=True) if own == turn])
            totals.append(total)
        fails = [turn for turn, total in enumerate(totals) if total % 8 in (1, 2, 3)]
        if not fails:
            assert (by_token, by_sequence) == whole[row][:2]
            continue
        failed.append(totals[fails[0]] % 8)
        end = max(at for at, own in enumerate(turns) if own == fails[0]) + 1
        assert by_token[:3] == [tokens[:end], mask[:end], turns[:end]]
        assert by_token[3] == [*rewards[: end - 1], 0.0]
        assert by_sequence == [FINISH_ABORT, False, fails[0] + 1]
    assert set(failed) == {1, 2, 3}
    assert len(failed) < 10
    assert np.isfinite(out.reward).all()


def test_a_penalty_counts_what_the_policy_says_and_not_what_it_is_told():
    sampling = SamplingParams(presence_penalty=1e4, stop_tokens=STOPS)
    out = program(sampling, policy=TABLE)(params(TABLE), TASKS, KEY)
    again = 0
    for tokens, mask, step, *_ in (row[0] for row in by_id(out).values()):
        said = [token for token, own in zip(tokens, mask, strict=True) if own]
        assert len(set(said)) == len(said)
        told = [(at, token) for at, token in enumerate(tokens) if not mask[at] and max(step[:at], default=-1) >= 0]
        again += sum(token in tokens[at + 1 :] and token in said for at, token in told)
    assert again > 0
    assert "sampler_logp" in out.extras


# A policy that follows a table: the token of each position is known.
SCRIPT = (0, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7)


def scripted():
    def logits(positions):
        return 100 * jax.nn.one_hot(jnp.asarray(SCRIPT)[jnp.clip(positions + 1, 0, len(SCRIPT) - 1)], V)

    def cached(params, tokens, positions, cache):
        return logits(positions), cache

    return Policy(
        init=lambda key: {},
        hidden=lambda params, tokens, positions, *rest, **options: (logits(positions), {}),
        unembed=lambda params: Unembedding(None),
        heads=lambda params, hidden: {},
        init_cache=lambda batch, capacity, dtype: (),
        prefill=cached,
        decode=cached,
    )


def told(tokens):
    """An environment that says the same after every action."""

    def reset(task, key):
        return task, Text(jnp.zeros(1, jnp.int32), 1)

    def step(state, action, key):
        observation = jnp.pad(jnp.asarray(tokens, jnp.int32), (0, 1))
        return Transition(state, Text(observation, len(tokens)), 1.0, False)

    return Environment(reset, step, 1, len(tokens) + 1)


@pytest.mark.parametrize(
    ("stops", "told_tokens", "expected"),
    [
        (((6, 7),), (), "0 5 6 7 | 8 5 6 7 | 8 5 6 7"),
        (((8, 5),), (), "0 5 6 7 8 | 5 6 7 8 | 5 6 7"),  # no action has 8 5
        (((6, 6),), (6,), "0 5 6 7 8 | (6) 6 7 8 5 | (6) 7"),  # nor 6 6, though it is 6 behind the 6 that is told
        (((4, 6), (7, 8)), (4,), "0 5 6 7 8 | (4) 6 7 8 | (4) 6 7"),
    ],
)
def test_a_stop_sequence_is_of_one_action_and_has_nothing_of_what_is_told(stops, told_tokens, expected):
    sampling = SamplingParams(greedy=True, stop_sequences=stops)
    sizes = {"max_turns": 3, "max_turn_tokens": 4, "max_new_tokens": len(SCRIPT) - 1}
    run = functools.partial(generate_turns, scripted(), {}, told(told_tokens), sampling=sampling, **sizes)
    out = jax.jit(run)(jnp.zeros(1, jnp.int32), KEY)
    turns = expected.split(" | ")
    words = [(word, turn) for turn, part in enumerate(turns) for word in part.split()]
    assert out.tokens[0, : len(words)].tolist() == [int(word.strip("()")) for word, _ in words]
    own = [-1 if word.startswith("(") or at == 0 else turn for at, (word, turn) in enumerate(words)]
    assert out.step[0, : len(words)].tolist() == own
    assert out.length.item() == len(words)
    assert out.extras["turns"].item() == len(turns) == out.reward.item()


class Grid:
    """The gridworld without walls on two cells a side, in plain Python and in the tokens of the test."""

    characters = "0123456789udlr>?AG#./"

    def __init__(self, prompt):
        self.prompt = prompt
        board = "".join(self.characters[token] for token in prompt)
        self.agent, self.goal = (divmod(board.index(name), 3) for name in "AG")

    @property
    def fingerprint(self):
        return 2 * self.agent[0] + self.agent[1]

    def play(self, action):
        down, right = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}[self.characters[action[0]]]
        self.agent = tuple(min(max(here + by, 0), 1) for here, by in zip(self.agent, (down, right), strict=True))
        return float(self.agent == self.goal), 3, self.agent == self.goal

    def saw(self, observation):
        return "".join(self.characters[token] for token in observation) == f"{self.agent[0]}{self.agent[1]}>"


def test_a_policy_that_walks_at_random_finds_the_goal_and_is_paid_once():
    world = gridworld(size=2, vocabulary={c: number for number, c in enumerate(Grid.characters)}, walls=0.0)
    policy = models.decoder(vocab_size=21, width=16, layers=1, heads=2, mlp_width=16)
    moves = jnp.zeros(21, bool).at[jnp.arange(10, 14)].set(True)
    run = functools.partial(generate_turns, policy, max_turns=6, max_turn_tokens=1, group_size=8, version=17)
    play = jax.jit(lambda params, tasks: run(params, world, tasks, KEY, sampling=SamplingParams(allowed=moves)))
    out = play(jax.jit(policy.init)(KEY), jnp.arange(3))
    walks = [Grid(np.asarray(out.tokens)[row, :6].tolist()) for row in range(24)]
    sizes = {"room": 21, "stops": (), "max_turns": 6, "action_tokens": 1}
    ends = [replay(out, row, walk, **sizes) for row, walk in enumerate(walks)]
    assert np.array_equal(np.asarray(out.reward).reshape(-1) == 1.0, np.array(ends) == FINISH_STOP)
    assert 0 < np.mean(out.reward) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_turns": 0}, "max_turns and max_turn_tokens must be at least 1, got 0 and 3"),
        ({"max_turn_tokens": 0}, "must be at least 1, got 4 and 0"),
        ({"max_new_tokens": 2}, "room for an action of max_turn_tokens=3, got 2; all 4 turns need at most 21"),
        ({"sampling": SamplingParams(min_tokens=1)}, "sampling.min_tokens does not apply to turns"),
        ({"tasks": jnp.zeros((2, 2), int)}, r"tasks must be \[P\] integers, got int32 of shape \(2, 2\)"),
        ({"tasks": jnp.ones(2)}, r"tasks must be \[P\] integers, got float32"),
        ({"tasks": np.array([1, 2**31])}, "tasks must be 32-bit integers, got 1 to 2147483648"),
        ({"id": jnp.zeros((5, 3), jnp.uint32)}, r"prompts.id must be \[P, G\] = \[5, 2\], got \(5, 3\)"),
        ({"slots": 2, "policy": POLICY._replace(insert=None)}, r"\(Policy.insert\)"),
        ({"environment": counting(max_prompt=4)}, r"reset's prompt must have \(\(4,\), \(\)\), got \(\(3,\), \(\)\)"),
        ({"environment": counting(max_observation=2)}, "step's observation must have"),
        ({"environment": counting(max_observation=0)}, "max_prompt and max_observation must be at least 1, got 3 and"),
        ({"environment": counting(fingerprint=lambda state: jnp.zeros(2))}, r"fingerprint must have \(\(\),\)"),
        (
            {"environment": counting(reset=lambda task, key: ({"total": task}, Text(jnp.zeros(3, int), 0 * task)))},
            "prompts.length must be between 1 and L=3, got 0 for prompt 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(options, message):
    given = {"policy": POLICY, "params": params(), "environment": ENVIRONMENT, "tasks": TASKS, "key": KEY}
    sizes = {"max_turns": TURNS, "max_turn_tokens": A, "group_size": G}
    with pytest.raises(ValueError, match=message):
        generate_turns(**given | sizes | options)


def test_an_environment_whose_state_or_reward_changes_its_shape_is_refused():
    def step(state, action, key, change):
        return change(ENVIRONMENT.step(state, action, key))

    for change, message in (
        (
            lambda found: found._replace(state={"total": found.state["total"] / 2}),
            r"state must have .*int32\[\].*float32",
        ),
        (lambda found: found._replace(reward=jnp.zeros(2)), r"reward and done must have \(\(\), \(\)\), got \(\(2,\)"),
    ):
        environment = counting(step=functools.partial(step, change=change))
        with pytest.raises(ValueError, match=message):
            generate_turns(POLICY, params(), environment, TASKS, KEY, max_turns=2, max_turn_tokens=2)

"""The environments that speak in characters, against the same games in plain Python."""

import functools
import re
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.data import CharTokenizer
from jaxrl_post.rollout import environments
from jaxrl_post.rollout.environments import calculator, gridworld
from jaxrl_post.rollout.environments import interface as texts
from jaxrl_post.rollout.environments.gridworld import CHARACTERS as OF_BOARDS

TOKENIZER = CharTokenizer()
KEY = jax.random.key(0)
WIDTH = 9  # tokens of an action
MOVES = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}


def text(tokens, length):
    return TOKENIZER.decode(np.asarray(tokens)[: int(length)])


def encoded(said, end=False):
    """Actions `[N, WIDTH]` and lengths `[N]`; with `end`, all are closed by the tokenizer's end token."""
    rows = [TOKENIZER.encode(action) + [1] * end for action in said]
    tokens = np.array([row + [0] * (WIDTH - len(row)) for row in rows], np.int32)
    return environments.Text(jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32))


@functools.cache
def begun(environment, count=32):
    """States of the first tasks, and their prompts as strings."""
    keys = jax.random.split(KEY, count)
    states, prompts = jax.device_get(jax.jit(jax.vmap(environment.reset))(jnp.arange(count), keys))
    return states, [text(*prompt) for prompt in zip(*prompts, strict=True)]


@functools.cache
def script(environment):
    """Plays one list of actions from one state: observations, rewards, ends and fingerprints after each."""

    def play(state, actions):
        def step(state, action):
            new = environment.step(state, environments.Text(*action), KEY)
            return new.state, (*new.observation, new.reward, new.done, environment.fingerprint(new.state))

        return jax.lax.scan(step, state, tuple(actions))[1]

    return jax.jit(play)


def played(environment, number, said, end=False):
    state = jax.tree.map(lambda x: x[number], begun(environment)[0])
    tokens, length, *others = jax.device_get(script(environment)(state, encoded(said, end)))
    return [text(*row) for row in zip(tokens, length, strict=True)], *others


class Walk:
    """The gridworld in plain Python, read off its prompt."""

    def __init__(self, prompt, horizon):
        assert prompt.endswith(">")
        self.rows = prompt[:-1].split("/")
        self.agent, self.goal = self.find("A"), self.find("G")
        self.moves, self.horizon = 0, horizon

    def find(self, symbol):
        places = [(row, line.index(symbol)) for row, line in enumerate(self.rows) if symbol in line]
        assert len(places) == 1
        return places[0]

    def beside(self, cell, move):
        row, column = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
        free = 0 <= row < len(self.rows) and 0 <= column < len(self.rows) and self.rows[row][column] != "#"
        return (row, column) if free else cell

    def step(self, said):
        self.moves += 1
        known = said in MOVES
        if known:
            self.agent = self.beside(self.agent, said)
        there = self.agent == self.goal
        seen = f"{self.agent[0]}{self.agent[1]}>" if known else "?>"
        return seen, float(there), there or self.moves == self.horizon

    def shortest(self):
        """Moves of a shortest walk to the goal, by breadth-first search; None if there is none."""
        queue, found = deque([self.agent]), {self.agent: ""}
        while queue:
            cell = queue.popleft()
            for move in MOVES:
                if (new := self.beside(cell, move)) not in found:
                    found[new] = found[cell] + move
                    queue.append(new)
        return found.get(self.goal)


@functools.cache
def world(size=4, walls=0.3, **options):
    return gridworld(size=size, vocabulary=TOKENIZER, walls=walls, **options)


@pytest.mark.parametrize(("size", "walls"), [pytest.param(4, 0.3, marks=pytest.mark.nightly), (2, 0.9), (5, 0.7)])
def test_every_goal_is_reached_by_a_shortest_walk_and_not_one_move_earlier(size, walls):
    environment = world(size, walls)
    longest = 0
    for number, prompt in enumerate(begun(environment)[1]):
        walk = Walk(prompt, None)
        path = walk.shortest()
        assert path, prompt
        longest = max(longest, len(path))
        _, rewards, done, _ = played(environment, number, list(path.ljust(12, "u")))
        assert rewards[: len(path)].tolist() == [0.0] * (len(path) - 1) + [1.0]
        assert done[: len(path)].tolist() == [False] * (len(path) - 1) + [True]
    assert longest >= {2: 2, 4: 4, 5: 4}[size]


@pytest.mark.parametrize("end", [False, True])
def test_any_script_on_a_board_plays_as_in_plain_python(end):
    environment = world(horizon=7)
    draw = np.random.default_rng(end)
    seen = set()
    for number, prompt in enumerate(begun(environment)[1][:12]):
        said = draw.choice([*"udlr" * 4, "ud", "?", "5", "u ", "rrrrrrrr", "A"], 12).tolist()
        walk = Walk(prompt, 7)
        observations, rewards, done, cells = played(environment, number, said, end)
        for turn, action in enumerate(said):
            expected = walk.step(action)
            assert (observations[turn], rewards[turn], bool(done[turn])) == expected
            assert cells[turn] == walk.agent[0] * 4 + walk.agent[1]
            seen.add(expected[0])
            if expected[2]:
                break
    assert "?>" in seen
    assert len(seen) > 6


def test_a_task_is_the_same_board_under_any_key_and_another_with_another_number_or_seed():
    boards = begun(world())[1]
    others, prompts = jax.jit(jax.vmap(world().reset))(jnp.arange(32), jax.random.split(jax.random.key(1), 32))
    assert [text(*prompt) for prompt in zip(*prompts, strict=True)] == boards
    assert len(set(boards)) > 28
    assert sum(a == b for a, b in zip(boards, begun(world(seed=1))[1], strict=True)) < 4
    assert np.mean(np.asarray(others.walls)) == pytest.approx(0.3 * 15 / 16, abs=0.06)


def test_the_places_of_agent_and_goal_are_those_of_the_board():
    for shown, prompt in zip(begun(world(view="places"))[1], begun(world())[1], strict=True):
        walk = Walk(prompt, None)
        assert shown == "".join(map(str, (*walk.agent, *walk.goal))) + ">"


NUMBER = "(-?[0-9]{1,%d})"


def calculated(said, target, digits):
    """The calculator in plain Python: what it shows, the reward, and whether that is the end."""
    number = NUMBER % digits
    if answer := re.fullmatch("=" + number, said):
        return None, float(int(answer[1]) == target), True
    if entry := re.fullmatch(number + r"([-+*])" + number, said):
        left, right = int(entry[1]), int(entry[3])
        result = {"+": left + right, "-": left - right, "*": left * right}[entry[2]]
        if len(str(abs(result))) <= digits:
            return f"{result}>", 0.0, False
    return "?>", 0.0, False


@functools.cache
def game(**options):
    return calculator(vocabulary=TOKENIZER, **options)


@pytest.mark.parametrize(
    "options", [{}, {"terms": 2, "digits": 2}, {"terms": 4, "operators": "*"}, {"terms": 9, "operators": "+-"}], ids=str
)
def test_the_right_answer_is_what_python_makes_of_the_expression(options):
    environment, values = game(**options), set()
    for number, prompt in enumerate(begun(environment)[1]):
        expression = prompt.removesuffix(">")
        assert not re.search(r"\b0", expression)
        target = eval(expression)
        _, rewards, done, _ = played(environment, number, [f"={target}", f"={target + 1}", f"={-target}", "=0"])
        assert rewards.tolist() == [1.0, 0.0, float(target == 0), float(target == 0)]
        assert done.all()
        values.add(target)
    assert len(values) > 16


@pytest.mark.parametrize("end", [False, True])
def test_any_entry_is_calculated_as_in_plain_python(end):
    environment, draw = game(), np.random.default_rng(7)
    widest = WIDTH - end
    said = [
        *("1+1", "42*-7", "-3--9", "999+0", "999+1", "-999-1", "007+01", "31*32", "=", "=-", "", "5", "-", "--3", "3+"),
        *(
            "=12=3",
            "1=2",
            "+5+5",
            "1+2+3",
            "1-+2",
            "0*0",
            "-0-0",
            "=0",
            "=-0",
            "1234+1",
            "=1234",
            " 1+1",
            "1+1>",
            "=+1",
        ),
        *("".join(draw.choice(list("0123456789-+*=-+*= "), draw.integers(1, widest + 1))) for _ in range(300)),
        *(f"{a}{o}{b}" for a, b in draw.integers(-99, 99, (60, 2)) for o in draw.choice(list("-+*"), 1)),
    ]
    said = [action if end or action else "0" for action in said]  # there is no action of no token
    target = eval(begun(environment)[1][0].removesuffix(">"))
    observations, rewards, done, shown = played(environment, 0, said, end)
    understood = 0
    for turn, action in enumerate(said):
        observation, reward, over = calculated(action, target, 3)
        assert (rewards[turn], bool(done[turn])) == (reward, over), action
        if not over:
            assert observations[turn] == observation, action
            assert shown[turn] == (1001 if observation == "?>" else int(observation[:-1]))
            understood += observation != "?>"
    assert understood > 60
    assert begun(environment)[0].shown[0] == 1000  # nothing yet is neither a number nor a question mark


def test_a_mapping_is_as_good_as_a_tokenizer():
    numbers = {character: 100 + index for index, character in enumerate(OF_BOARDS)}
    _, prompt = jax.jit(gridworld(size=4, vocabulary=numbers, walls=0.3).reset)(jnp.array(3), KEY)
    assert "".join(OF_BOARDS[token - 100] for token in prompt.tokens.tolist()) == begun(world())[1][3]


class TwoForDots(CharTokenizer):
    def encode(self, text):
        return [2, 3] if text == "." else super().encode(text)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (gridworld, {"size": 1}, "size must be between 2 and 10 cells, got 1"),
        (gridworld, {"size": 11}, "got 11; rows and columns are written as one digit"),
        (gridworld, {"walls": 1.0}, r"walls must be a probability in \[0, 1\), got 1.0"),
        (gridworld, {"view": "map"}, "view must be 'board' or 'places', got 'map'"),
        (gridworld, {"horizon": 0}, "horizon must be at least 1 action, got 0"),
        (gridworld, {"vocabulary": {"0": 1}}, "vocabulary has no token for '1'"),
        (gridworld, {"vocabulary": TwoForDots()}, r"one token for '\.', got \[2, 3\]"),
        (gridworld, {"vocabulary": dict.fromkeys(OF_BOARDS, 4)}, "different tokens for the characters"),
        (gridworld, {"vocabulary": CharTokenizer("0123456789")}, "character 'u'"),
        (calculator, {"terms": 1}, "terms must be at least 2 and digits at least 1, got 1 and 1"),
        (calculator, {"operators": "/"}, r"operators must be some of '-\+\*', got '/'"),
        (calculator, {"terms": 3, "digits": 2}, "may have values of 6 digits, and at most 4 are possible"),
    ],
)
def test_what_makes_no_game_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"vocabulary": TOKENIZER} | options)


def test_only_a_token_at_the_end_of_an_action_closes_it():
    action = texts.Text(jnp.array([5, 1, 1, 1]), jnp.array(3))
    assert texts.without_end(action, (1, 9)).length == 2
    assert texts.without_end(action, ()).length == 3
    assert texts.without_end(action._replace(length=jnp.array(1)), (1,)).length == 1

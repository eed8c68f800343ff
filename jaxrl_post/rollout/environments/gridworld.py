"""A walk on a board, told in characters: the agent is to step onto the goal, and walls are in its way."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.rollout.environments.interface import (
    Environment,
    Text,
    Transition,
    Vocabulary,
    character_tokens,
    end_tokens,
    without_end,
)
from jaxrl_post.types import Array

CHARACTERS = "0123456789udlr>?AG#./"
"""All that is read or written."""

_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # u d l r, as changes of row and column


class Board(NamedTuple):
    """The state.

    Attributes:
        agent: int32 scalar, the agent's cell: `row * size + column`, rows counted from the top.
        goal: int32 scalar, the goal's.
        walls: `[size * size]` bool.
        moves: int32 scalar, actions so far.
    """

    agent: Array
    goal: Array
    walls: Array
    moves: Array


def draw_board(key: Array, size: int, walls: float) -> Board:
    """A board on which the goal can be reached.

    Every cell but the agent's is a wall with probability `walls`; the goal is any other cell that the agent can walk
    to. Where it can walk nowhere, all walls are taken away first.

    Args:
        key: of the board.
        size: cells of a side.
        walls: probability.

    Returns:
        `Board`.

    Example:
        >>> board = jax.jit(lambda key: draw_board(key, 3, 0.4))(jax.random.key(0))
        >>> bool(board.agent != board.goal), bool(board.walls[board.agent] | board.walls[board.goal])
        (True, False)
    """
    cells = size * size
    of_walls, of_agent, of_goal = jax.random.split(key, 3)
    agent = jax.random.randint(of_agent, (), 0, cells, jnp.int32)
    here = jnp.arange(cells) == agent
    blocked = jax.random.bernoulli(of_walls, walls, (cells,)) & ~here

    def spread(_: int, reached: Array) -> Array:
        board = jnp.pad(reached.reshape(size, size), 1)
        near = [board[1 + down : 1 + down + size, 1 + right : 1 + right + size] for down, right in _MOVES]
        return reached | (jnp.any(jnp.stack(near), axis=0).reshape(cells)) & ~blocked

    reached = jax.lax.fori_loop(0, cells, spread, here)
    stuck = jnp.sum(reached) == 1
    goal = jax.random.categorical(of_goal, jnp.where((reached | stuck) & ~here, 0.0, -jnp.inf)).astype(jnp.int32)
    return Board(agent, goal, blocked & ~stuck, jnp.zeros((), jnp.int32))


def gridworld(
    *,
    size: int = 4,
    vocabulary: Vocabulary,
    walls: float = 0.2,
    view: Literal["board", "places"] = "board",
    horizon: int | None = None,
    seed: int = 0,
    ends: tuple[int, ...] | None = None,
) -> Environment:
    """A board of `size x size` cells, drawn from the number of the task: reward 1 for the move onto the goal.

    The prompt shows the board, row by row from the top, `A` agent, `G` goal, `#` wall, `.` free, `/` between rows
    (`A.#/..#/..G>`), or with `view="places"` only row and column of agent and goal (`0022>`), walls unseen.
    An action is one of `u d l r` and nothing else but a token that closes it. Against a wall or the edge the agent
    stays where it is. The answer is its row and column (`10>`); to anything else it is `?>`, and the turn is lost.
    The episode is over at the goal, or without reward after `horizon` actions.

    Args:
        size: cells of a side, 2 to 10.
        vocabulary: the tokens of `CHARACTERS`: a mapping, or a tokenizer of characters (`data.CharTokenizer`).
        walls: probability that a cell is a wall, in [0, 1).
        view: what the prompt shows.
        horizon: actions after which the episode is over; None for no other limit than `max_turns`.
        seed: of all boards; task `n` is the same board whatever key the rollout has.
        ends: token ids that may close an action; None for the tokenizer's `eos_ids`, of a mapping none.

    Returns:
        `Environment` whose fingerprint is the agent's cell.

    Raises:
        ValueError: for a number out of its range, another view, or a vocabulary without one of the characters.

    Example:
        >>> vocabulary = {character: ord(character) for character in CHARACTERS}
        >>> world = gridworld(size=2, vocabulary=vocabulary, walls=0.0)
        >>> state, prompt = jax.jit(world.reset)(jnp.array(1), jax.random.key(0))
        >>> "".join(map(chr, prompt.tokens.tolist()))
        'AG/..>'
        >>> moved = jax.jit(world.step)(state, Text(jnp.array([ord("d")]), jnp.array(1)), jax.random.key(0))
        >>> "".join(map(chr, moved.observation.tokens.tolist())), moved.reward.item()
        ('10>', 0.0)
    """
    if not 2 <= size <= 10:
        raise ValueError(f"size must be between 2 and 10 cells, got {size}; rows and columns are written as one digit")
    if not 0 <= walls < 1:
        raise ValueError(f"walls must be a probability in [0, 1), got {walls}")
    if view not in ("board", "places"):
        raise ValueError(f"view must be 'board' or 'places', got {view!r}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1 action, got {horizon}; None for no limit")
    tokens = character_tokens(vocabulary, CHARACTERS)
    digit, moves = jnp.asarray(tokens[:10], jnp.int32), jnp.asarray(tokens[10:14], jnp.int32)
    close, unknown, agent, goal, wall, free, below = tokens[14:]
    ends = end_tokens(vocabulary, ends)

    def place(cell: Array) -> list[Array]:
        return [digit[cell // size], digit[cell % size]]

    def prompt(board: Board) -> Text:
        if view == "places":
            said = jnp.stack([*place(board.agent), *place(board.goal), jnp.asarray(close)])
        else:
            cells = jnp.where(board.walls, wall, free).at[board.agent].set(agent).at[board.goal].set(goal)
            said = jnp.pad(cells.reshape(size, size), ((0, 0), (0, 1)), constant_values=below)
            said = said.reshape(-1).at[-1].set(close)
        return Text(said.astype(jnp.int32), jnp.asarray(len(said), jnp.int32))

    def reset(task: Array, key: Array) -> tuple[Board, Text]:
        del key
        board = draw_board(jax.random.fold_in(jax.random.key(seed), task), size, walls)
        return board, prompt(board)

    def step(board: Board, action: Text, key: Array) -> Transition:
        del key
        said = without_end(action, ends)
        move = said.tokens[0] == moves
        known = jnp.any(move) & (said.length == 1)
        down, right = jnp.asarray(_MOVES, jnp.int32)[jnp.argmax(move)]
        row, column = board.agent // size + down, board.agent % size + right
        inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
        target = jnp.where(inside, row * size + column, board.agent)
        target = jnp.where(known & ~board.walls[target], target, board.agent)
        moved = board._replace(agent=target, moves=board.moves + 1)
        there = target == board.goal
        seen = jnp.where(known, jnp.stack([*place(target), jnp.asarray(close)]), jnp.asarray([unknown, close, 0]))
        over = there if horizon is None else there | (moved.moves >= horizon)
        observation = Text(seen.astype(jnp.int32), jnp.where(known, 3, 2))
        return Transition(moved, observation, there.astype(jnp.float32), over)

    width = 5 if view == "places" else size * (size + 1)
    return Environment(reset, step, width, 3, lambda board: board.agent)

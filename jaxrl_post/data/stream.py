"""Batches of problems in a reproducible order, with a position that can be saved and restored.

Order and repetition come from Grain; problems that are excluded or that do not pass `keep` are stepped over and
counted here, because the counts are part of the position. Nothing is tokenized or padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from jaxrl_post.data.chat import encode_prompt
from jaxrl_post.data.problems import Problem, Source, identity
from jaxrl_post.data.tokenizer import Tokenizer

_COUNTS = ("kept", "filtered", "excluded")


class ProblemStream(Iterator[list[Problem]]):
    """An endless (or finite) iterator over batches of problems; made by `stream`.

    Attributes:
        counts: problems seen so far by fate: `kept`, `filtered` (by `keep`), `excluded`. A problem that comes round
            again counts again.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        exclude: AbstractSet[str],
        shuffle: bool,
        repeat: bool,
        keep: Callable[[Problem], bool] | None,
        process_index: int,
        process_count: int,
    ):
        import grain

        if len(source) == 0:
            raise ValueError("the data set is empty: a stream needs at least one problem")
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size must be a positive multiple of process_count, got batch_size={batch_size} and "
                f"process_count={process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        dataset = grain.MapDataset.source(source)  # type: ignore[arg-type]
        if shuffle:
            # Grain shuffles epoch e with seed + e: neighbouring seeds must not be each other's epochs.
            dataset = dataset.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        if repeat:
            dataset = dataset.repeat()
        # Read without threads: what is filtered is then counted in step with what is returned.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._items = iter(dataset.to_iter_dataset(options))
        self._identity = {"length": len(source), "seed": seed, "shuffle": shuffle, "repeat": repeat}
        self._batch_size = batch_size
        share = batch_size // process_count
        self._rows = slice(process_index * share, (process_index + 1) * share)
        self._exclude = exclude
        self._keep = keep
        self._repeat = repeat
        # Any 2n - 1 consecutive draws of a repeated sequence of n contain one whole epoch.
        self._patience = 2 * len(source)
        self._position: dict[str, Any] = {"items": self._items.get_state(), **dict.fromkeys(_COUNTS, 0)}

    @property
    def counts(self) -> dict[str, int]:
        """Problems seen so far by fate: `kept`, `filtered`, `excluded`."""
        return {name: self._position[name] for name in _COUNTS}

    def __next__(self) -> list[Problem]:
        counts = self.counts
        try:
            batch = self._draw(counts)
        except Exception as error:
            if not isinstance(error, StopIteration):
                self._items.set_state(self._position["items"])  # a failed batch leaves the position where it was
            raise
        # Copied, so that a state once handed out never moves.
        self._position = {"items": dict(self._items.get_state()), **counts}
        return batch[self._rows]

    def _draw(self, counts: dict[str, int]) -> list[Problem]:
        batch: list[Problem] = []
        since_kept = 0
        while len(batch) < self._batch_size:
            try:
                problem = next(self._items)
            except StopIteration:
                if self._position["kept"] == 0:
                    raise ValueError(
                        f"the data set holds only {len(batch)} usable problems for a batch of {self._batch_size} "
                        f"({_fates(counts)}); lower the batch size, repeat the data or loosen the filter"
                    ) from None
                raise
            if identity(problem) in self._exclude:
                counts["excluded"] += 1
            elif self._keep is not None and not self._keep(problem):
                counts["filtered"] += 1
            else:
                counts["kept"] += 1
                batch.append(problem)
                since_kept = 0
                continue
            since_kept += 1
            if since_kept >= self._patience:
                remedy = "all have the prompts of held-out problems (data.eval_files); train on others"
                if counts["filtered"]:
                    remedy = "all are excluded or filtered; raise the limit on prompt lengths or use other data"
                raise ValueError(
                    f"none of the last {since_kept} problems is usable ({_fates(counts)} so far); {remedy}"
                )
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch: a small dict that `json` can write. It is the same on every process."""
        return {**self._identity, **self._position, "items": dict(self._position["items"])}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` gave; the batches after it are the same as they were.

        Args:
            state: of a stream over the same data with the same seed, shuffle and repeat. Batch size and number of
                processes may differ.

        Raises:
            ValueError: if the state belongs to another stream, or is damaged.
        """
        for name, value in self._identity.items():
            if name not in state:
                raise ValueError(f"not the state of a problem stream: it has no {name!r}, only {sorted(state)}")
            if state[name] != value:
                raise ValueError(
                    f"the saved position belongs to other data: {name} was {state[name]!r} and is {value!r}; restore "
                    f"the data settings or start a new run"
                )
        try:
            position = {"items": dict(state["items"]), **{name: int(state[name]) for name in _COUNTS}}
            self._items.set_state(position["items"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            self._items.set_state(self._position["items"])  # Grain moves before it checks
            raise ValueError(f"the saved position is damaged ({type(error).__name__}: {error}): {state}") from error
        self._position = position


def stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    exclude: AbstractSet[str] = frozenset(),
    shuffle: bool = True,
    repeat: bool = True,
    keep: Callable[[Problem], bool] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> ProblemStream:
    """Batches of exactly `batch_size` problems, whose position can be saved and restored.

    Every process walks the same sequence and takes its own rows of each batch: the batches of all processes, one after
    the other, are those of a single process, and one saved position serves all, whatever their number.

    Args:
        source: problems by index.
        batch_size: problems in a batch, over all processes.
        seed: of the order, at least 0. Each epoch has an order of its own, and so has each seed.
        exclude: prompts that are stepped over, e.g. the held-out ones.
        shuffle: False for the order of the source.
        repeat: False for one pass; the problems left over when no full batch remains are not returned.
        keep: problems for which it is False are stepped over; it may raise instead. See `prompt_fits`.
        process_index: number of this process, `0 .. process_count - 1`.
        process_count: number of processes; divides `batch_size`.

    Returns:
        An iterator over lists of `batch_size / process_count` problems, with `get_state`, `set_state` and `counts`.

    Raises:
        ValueError: for an empty source or an impossible argument; from `next`, if no problem is usable. What `keep`
            raises is passed on. After an error the position is that of the last complete batch.

    Example:
        >>> source = [{"prompt": f"{i}+1="} for i in range(5)]
        >>> batches = stream(source, batch_size=2, seed=0, exclude={"3+1="}, shuffle=False)
        >>> [problem["prompt"] for problem in next(batches)]
        ['0+1=', '1+1=']
        >>> state = batches.get_state()
        >>> [problem["prompt"] for problem in next(batches)], batches.counts
        (['2+1=', '4+1='], {'kept': 4, 'filtered': 0, 'excluded': 1})
        >>> batches.set_state(state)
        >>> [problem["prompt"] for problem in next(batches)]
        ['2+1=', '4+1=']
    """
    return ProblemStream(
        source,
        batch_size=batch_size,
        seed=seed,
        exclude=exclude,
        shuffle=shuffle,
        repeat=repeat,
        keep=keep,
        process_index=process_index,
        process_count=process_count,
    )


def prompt_fits(tokenizer: Tokenizer, max_tokens: int, *, on_long_prompt: str = "filter") -> Callable[[Problem], bool]:
    """A `keep` for `stream`: whether a problem's prompt has at most `max_tokens` tokens.

    Args:
        tokenizer: counts the tokens.
        max_tokens: longest prompt, tokens, at least 1.
        on_long_prompt: `"filter"` gives False for a longer prompt, `"error"` raises.

    Returns:
        A function of a problem.

    Raises:
        ValueError: for an impossible argument; from the function, for a long prompt under `"error"`.

    Example:
        >>> from jaxrl_post.data import CharTokenizer
        >>> keep = prompt_fits(CharTokenizer("ab"), 3)
        >>> keep({"prompt": "aba"}), keep({"prompt": "abab"})
        (True, False)
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if on_long_prompt not in ("filter", "error"):
        raise ValueError(f"on_long_prompt must be 'filter' or 'error', got {on_long_prompt!r}")

    def keep(problem: Problem) -> bool:
        length = len(encode_prompt(tokenizer, problem))
        if length > max_tokens and on_long_prompt == "error":
            raise ValueError(
                f"the prompt {problem['prompt'][:80]!r} has {length} tokens, more than max_prompt_length={max_tokens}; "
                f"raise the limit, or set on_long_prompt to 'filter' to skip such prompts"
            )
        return length <= max_tokens

    return keep


def _fates(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in _COUNTS)

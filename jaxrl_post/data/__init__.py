"""Problems, tokenizers, resumable streams of batches, and padding."""

from jaxrl_post.data.batching import pad_prompts, to_rollouts
from jaxrl_post.data.problems import (
    JsonlSource,
    Problem,
    ReasoningGymSource,
    Source,
    check_disjoint,
    columns,
    held_out,
    spaced_seed,
)
from jaxrl_post.data.stream import ProblemStream, prompt_fits, stream
from jaxrl_post.data.tokenizer import PRINTABLE, CharTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "PRINTABLE",
    "CharTokenizer",
    "HFTokenizer",
    "JsonlSource",
    "Problem",
    "ProblemStream",
    "ReasoningGymSource",
    "Source",
    "Tokenizer",
    "check_disjoint",
    "columns",
    "held_out",
    "load_tokenizer",
    "pad_prompts",
    "prompt_fits",
    "spaced_seed",
    "stream",
    "to_rollouts",
]

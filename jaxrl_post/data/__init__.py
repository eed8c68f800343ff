"""Problems and the files they come from, tokenizers and chats, resumable streams of batches, and padding."""

from jaxrl_post.data.batching import pad_prompts, to_rollouts
from jaxrl_post.data.chat import ChatSource, continue_chat, encode_completion, encode_prompt, extend_prompt
from jaxrl_post.data.choices import InvertedQuestion, invert_question, negate_question
from jaxrl_post.data.environments import verifiers_problems
from jaxrl_post.data.json_rows import JsonlRows
from jaxrl_post.data.problems import (
    IDENTITY,
    Problem,
    ReasoningGymSource,
    Source,
    check_disjoint,
    columns,
    held_out,
    identity,
    spaced_seed,
)
from jaxrl_post.data.rows import ArrowRows, JoinedRows, Rows, open_rows
from jaxrl_post.data.schemas import RowType, as_messages, detect, show_messages, to_problem
from jaxrl_post.data.sources import FileSource, JsonlSource, open_source
from jaxrl_post.data.stream import ProblemStream, prompt_fits, stream
from jaxrl_post.data.tokenizer import PRINTABLE, CharTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from jaxrl_post.data.vocabulary import token_bytes

__all__ = [
    "IDENTITY",
    "PRINTABLE",
    "ArrowRows",
    "CharTokenizer",
    "ChatSource",
    "FileSource",
    "HFTokenizer",
    "InvertedQuestion",
    "JoinedRows",
    "JsonlRows",
    "JsonlSource",
    "Problem",
    "ProblemStream",
    "ReasoningGymSource",
    "RowType",
    "Rows",
    "Source",
    "Tokenizer",
    "as_messages",
    "check_disjoint",
    "columns",
    "continue_chat",
    "detect",
    "encode_completion",
    "encode_prompt",
    "extend_prompt",
    "held_out",
    "identity",
    "invert_question",
    "load_tokenizer",
    "negate_question",
    "open_rows",
    "open_source",
    "pad_prompts",
    "prompt_fits",
    "show_messages",
    "spaced_seed",
    "stream",
    "to_problem",
    "to_rollouts",
    "token_bytes",
    "verifiers_problems",
]

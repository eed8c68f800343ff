"""What is sent to inference servers and what their answers say, as pure functions between requests and tokens.

Two interfaces are known: the completions of OpenAI with vLLM's extensions, and SGLang's own `/generate`. Both take the
prompt as token ids and give token ids back; text is never tokenised. Nothing here touches a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP


class Ask(NamedTuple):
    """What is asked of a server for one prompt.

    Attributes:
        prompt: token ids, at least one.
        seeds: one for each of `G` completions, below 2**30.
        limits: the most tokens of each.
        temperature: 0 takes the most probable token.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        stop_tokens: ids that end a completion.
        model: the name under which the server has the model; None for its only one.
    """

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    limits: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    model: str | None = None


class Completion(NamedTuple):
    """What a server has sampled.

    Attributes:
        tokens: ids, the stop token included.
        logp: nats, one for each.
        finish: one of the `FINISH_` constants.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finish: int


class ServerFormat(NamedTuple):
    """How a kind of server is talked to.

    Attributes:
        path: behind the server's address.
        request: `Ask -> ` the body, for JSON.
        read: `(answer, Ask) -> G` completions; raises ValueError that says what is wrong with the answer.
        log_probs: what its log-probs can be of; the first is what it gives unless told otherwise.
        update: from a directory to what is asked, one after the other, for the checkpoint in it to be served: paths
            behind the address without `/v1`, and bodies.
        update_hint: how a server that refuses this must be started.
    """

    path: str
    request: Callable[[Ask], dict[str, Any]]
    read: Callable[[Any, Ask], list[Completion]]
    log_probs: tuple[str, ...]
    update: Callable[[str], tuple[tuple[str, dict[str, Any]], ...]]
    update_hint: str


def vllm_request(ask: Ask) -> dict[str, Any]:
    """The body of a request to `/completions` of a vLLM server.

    Every number is given, so that defaults from the model's generation config do not count. Completion `g` is drawn
    with the seed `seeds[0] + g`. A request has one limit: where completions have different ones the largest is sent,
    and `read_vllm` cuts the others.

    Example:
        >>> body = vllm_request(Ask((5, 6), (11, 12), (3, 4), stop_tokens=(2,)))
        >>> body["prompt"], body["n"], body["seed"], body["max_tokens"], body["stop_token_ids"]
        ([5, 6], 2, 11, 4, [2])

    Reference: vLLM, vllm/entrypoints/openai/completion/protocol.py; vllm/v1/engine/parallel_sampling.py.
    """
    body = {
        "prompt": list(ask.prompt),
        "n": len(ask.seeds),
        "seed": ask.seeds[0],
        "max_tokens": max(ask.limits),
        **_sampling(ask),
        "ignore_eos": True,  # what ends a completion is in stop_token_ids, the model's own end too if it is to count
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # for servers that do not know return_token_ids yet
        "stream": False,
    }
    return body if ask.model is None else {"model": ask.model, **body}


def read_vllm(answer: Any, ask: Ask) -> list[Completion]:
    """The completions in an answer from `/completions`.

    Args:
        answer: parsed JSON.
        ask: what was asked.

    Returns:
        `G` completions. One that went on beyond its own limit is cut there and ends with `FINISH_LENGTH`.

    Raises:
        ValueError: for an answer without as many choices, token ids or log-probs, or one to another prompt.

    Example:
        >>> logprobs = {"tokens": ["token_id:7", "token_id:2"], "token_logprobs": [-0.5, -1.0]}
        >>> answer = {"choices": [{"logprobs": logprobs, "finish_reason": "stop"}]}
        >>> read_vllm(answer, Ask((5,), (0,), (4,), stop_tokens=(2,)))
        [Completion(tokens=(7, 2), logp=(-0.5, -1.0), finish=1)]

    Reference: vLLM, vllm/entrypoints/openai/completion/serving.py.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    choices = _as_many(choices, ask, "choices")
    places = [choice.get("index", place) for place, choice in enumerate(choices)]
    if len(set(places)) < len(places):
        raise ValueError(f"its choices have the indices {places}, some of them twice")
    choices = [choice for _, choice in sorted(zip(places, choices, strict=True), key=lambda pair: pair[0])]
    return [_vllm_choice(choice, ask, limit) for choice, limit in zip(choices, ask.limits, strict=True)]


def sglang_request(ask: Ask) -> dict[str, Any]:
    """The body of a request to `/generate` of an SGLang server.

    The prompt is sent once for each completion, so that each has a seed and a limit of its own; the server's cache of
    prefixes spares it most of the reading.

    Example:
        >>> body = sglang_request(Ask((5, 6), (11, 12), (4, 3), stop_tokens=(2,)))
        >>> body["input_ids"], [(each["sampling_seed"], each["max_new_tokens"]) for each in body["sampling_params"]]
        ([[5, 6], [5, 6]], [(11, 4), (12, 3)])

    Reference: SGLang, python/sglang/srt/managers/io_struct.py and sampling/sampling_params.py.
    """
    common = {
        **_sampling(ask),
        "ignore_eos": not ask.stop_tokens,  # under which it would ignore stop_token_ids too
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    own = [
        {**common, "max_new_tokens": limit, "sampling_seed": seed}
        for limit, seed in zip(ask.limits, ask.seeds, strict=True)
    ]
    prompts = [list(ask.prompt) for _ in own]
    return {"input_ids": prompts, "sampling_params": own, "return_logprob": True, "stream": False}


def read_sglang(answer: Any, ask: Ask) -> list[Completion]:
    """The completions in an answer from `/generate`.

    Args:
        answer: parsed JSON.
        ask: what was asked.

    Returns:
        `G` completions.

    Raises:
        ValueError: for an answer without as many completions, token ids or log-probs, or one to another prompt.

    Example:
        >>> meta = {"output_token_logprobs": [[-0.5, 7, None], [-1.0, 8, None]], "finish_reason": {"type": "length"}}
        >>> read_sglang([{"output_ids": [7, 8], "meta_info": meta}], Ask((5,), (0,), (2,)))
        [Completion(tokens=(7, 8), logp=(-0.5, -1.0), finish=2)]

    Reference: SGLang, python/sglang/srt/managers/tokenizer_manager.py.
    """
    outputs = [answer] if isinstance(answer, Mapping) else answer
    outputs = _as_many(outputs, ask, "completions")
    return [_sglang_output(output, ask, limit) for output, limit in zip(outputs, ask.limits, strict=True)]


def vllm_update(directory: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """What has a vLLM server read its weights from a checkpoint, and forget keys and values of the old ones.

    Example:
        >>> [path for path, _ in vllm_update("/shared/policy")]
        ['/collective_rpc', '/reset_prefix_cache']
    """
    reload = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
    return ("/collective_rpc", reload), ("/reset_prefix_cache", {})


def sglang_update(directory: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The same of SGLang, which forgets by itself.

    Example:
        >>> sglang_update("/shared/policy")
        (('/update_weights_from_disk', {'model_path': '/shared/policy'}),)
    """
    return (("/update_weights_from_disk", {"model_path": directory}),)


FORMATS: dict[str, ServerFormat] = {
    "vllm": ServerFormat(
        "/completions",
        vllm_request,
        read_vllm,
        ("raw", "processed"),
        vllm_update,
        "start vLLM with VLLM_SERVER_DEV_MODE=1, where nobody else can reach it",
    ),
    "sglang": ServerFormat(
        "/generate",
        sglang_request,
        read_sglang,
        ("tempered", "raw"),
        sglang_update,
        "the directory must be one that SGLang reads under the same name",
    ),
}
"""Kinds of servers by name."""


def _sampling(ask: Ask) -> dict[str, Any]:
    """What both kinds of servers call by the same names."""
    return {
        "temperature": ask.temperature,
        "top_k": ask.top_k or -1,
        "top_p": ask.top_p,
        "min_p": ask.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(ask.stop_tokens),
    }


_ROUNDING = 1e-3
"""Nats above 0 that a log-prob may be in half precision."""

_LARGEST = 3.4e38
"""Beyond it a number is none in float32."""


def _as_many(found: Any, ask: Ask, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise ValueError(f"there are no {what} in it: {_shown(found)}")
    if len(found) != len(ask.seeds):
        raise ValueError(f"{len(ask.seeds)} {what} were asked for and {len(found)} came; the server must support n > 1")
    return found


def _vllm_choice(choice: Mapping[str, Any], ask: Ask, limit: int) -> Completion:
    read = choice.get("prompt_token_ids")
    if read is not None and tuple(read) != ask.prompt:
        raise ValueError(
            f"the server read a prompt of {len(read)} tokens, {_shown(read)}, not the {len(ask.prompt)} that were sent"
        )
    given = choice.get("logprobs") or {}
    logp = given.get("token_logprobs")
    if logp is None:
        raise ValueError("it holds no log-probs; the server must allow logprobs=0 (vLLM: --max-logprobs not 0)")
    tokens = choice.get("token_ids")
    if tokens is None:
        names = given.get("tokens") or []
        tokens = [int(name[9:]) for name in names if isinstance(name, str) and _names_an_id(name)]
        if len(tokens) < len(logp):
            raise ValueError(
                f"it holds no token ids, only text ({_shown(names)}), and text is never tokenised again; take a vLLM "
                f"that knows return_token_ids, or start it with --return-tokens-as-token-ids; for an SGLang server "
                f"give kind='sglang'"
            )
    why = choice.get("finish_reason")
    if isinstance(choice.get("stop_reason"), str):  # no text was to stop it
        why = "abort"
    return _completion(tokens, logp, why, ask, limit, sent=max(ask.limits))


def _names_an_id(name: str) -> bool:
    return name.startswith("token_id:") and name[9:].isdecimal()


def _sglang_output(output: Mapping[str, Any], ask: Ask, limit: int) -> Completion:
    meta = output.get("meta_info")
    if not isinstance(meta, Mapping):
        raise ValueError(f"a completion has no meta_info: {_shown(output)}")
    read = meta.get("prompt_tokens")
    if read is not None and read != len(ask.prompt):
        raise ValueError(f"the server read a prompt of {read} tokens, not the {len(ask.prompt)} that were sent")
    pairs = meta.get("output_token_logprobs")
    finish = meta.get("finish_reason") or {}
    why = finish.get("type") if isinstance(finish, Mapping) else finish
    # No text was to stop it: this is how the server says that the logits held NaN.
    if isinstance(finish, Mapping) and isinstance(finish.get("matched"), str):
        why = "abort"
    if pairs is None:
        if why != "abort":
            raise ValueError("a completion has no output_token_logprobs; the server must support return_logprob")
        pairs = []
    if not all(isinstance(pair, Sequence) and len(pair) >= 2 for pair in pairs):
        raise ValueError(f"output_token_logprobs are not [log-prob, id, text]: {_shown(pairs)}")
    tokens, ids = [pair[1] for pair in pairs], output.get("output_ids")
    if why != "abort" and ids is not None and list(ids) != tokens:
        raise ValueError(f"output_ids {_shown(ids)} are not the tokens that log-probs are given of, {_shown(tokens)}")
    return _completion(tokens, [pair[0] for pair in pairs], why, ask, limit, sent=limit)


def _completion(tokens: Sequence[Any], logp: Sequence[Any], why: Any, ask: Ask, limit: int, *, sent: int) -> Completion:
    """What was read, checked: a completion that is no sound one ends before its first token without a log-prob.

    The server was told to end at `sent` tokens; of more than `limit`, the first count.
    """
    if len(tokens) != len(logp):
        raise ValueError(f"a completion has {len(tokens)} token ids but {len(logp)} log-probs")
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in tokens):
        raise ValueError(f"token ids must be whole numbers of 0 to 2**31 - 1, got {_shown(tokens)}")
    if len(tokens) > sent:
        raise ValueError(f"a completion has {len(tokens)} tokens, more than the {sent} that were allowed")
    if not all(value is None or isinstance(value, int | float) for value in logp):
        raise ValueError(f"log-probs must be numbers, got {_shown(logp)}")
    if too_high := [value for value in logp if value is not None and value > _ROUNDING]:
        raise ValueError(f"log-probs must not be above 0, got {too_high[0]}")
    passed = next((at for at, token in enumerate(tokens[:-1]) if token in ask.stop_tokens), None)
    if passed is not None:
        raise ValueError(
            f"the server went on behind token {tokens[passed]}, which is in sampling.stop_tokens {ask.stop_tokens}: it "
            "does not know stop_token_ids"
        )
    if len(tokens) > limit:
        tokens, logp, why = tokens[:limit], logp[:limit], "length"
    sound = next((i for i, x in enumerate(logp) if x is None or not abs(x) < _LARGEST), len(logp))
    finish = {"stop": FINISH_STOP, "length": FINISH_LENGTH}.get(why, FINISH_ABORT)
    if sound < len(tokens) or not tokens:
        finish = FINISH_ABORT
    if finish == FINISH_STOP and tokens[-1] not in ask.stop_tokens:
        raise ValueError(
            f"the server ended a completion at token {tokens[-1]}, which is not in sampling.stop_tokens "
            f"{ask.stop_tokens}; add it there if it is the model's end token, else have the server not stop at it"
        )
    return Completion(tuple(tokens[:sound]), tuple(map(float, logp[:sound])), finish)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

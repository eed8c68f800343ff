"""Sequences from an inference server outside of the program: token ids go there over HTTP and come back as `Rollouts`.

What a request and an answer look like is in `server_formats`. Sampling leaves the server's weights alone: `version`
says which it has, and `update_weights` has it read others.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_post.rollout.generate import PLAIN, Prompts, check_requests
from jaxrl_post.rollout.server_formats import FORMATS, Ask, Completion, ServerFormat
from jaxrl_post.sampling import SamplingParams, is_truncating, row_keys
from jaxrl_post.sampling.transforms import check, is_off
from jaxrl_post.types import FINISH_ABORT, Array, Params, Rollouts, Score

_LONGEST_WAIT = 60.0  # seconds between two tries
_UNSUPPORTED = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "stop_sequences",
    "stop_strings",
    "logit_bias",
    "allowed",
)


class ServerError(OSError):
    """A server refused a request, or its answer cannot be used; the message has its address and its own words."""


class Server(NamedTuple):
    """Where sequences are sampled, and how patiently they are waited for.

    Attributes:
        url: address without the last part, `"http://host:8000/v1"` for vLLM, `"http://host:30000"` for SGLang.
        kind: `"vllm"`, or what else has its completions with token ids, or `"sglang"`.
        model: name of the model, where the server asks for one.
        log_probs: what the server's log-probs are of. `"raw"`: the model at temperature 1 (vLLM as it starts; SGLang
            with `SGLANG_RETURN_ORIGINAL_LOGPROB=1`). `"tempered"`: at the temperature, all tokens allowed (SGLang as it
            starts). `"processed"`: the distribution that was drawn from, truncations included (vLLM started with
            `--logprobs-mode processed_logprobs`). None for what the kind gives as it starts.
        api_key: sent as a bearer token.
        timeout: seconds for a request, the completions of one prompt.
        concurrency: requests at a time.
        retries: further tries where a server is busy (429), fails (5xx) or cannot be reached.
        backoff: seconds before the second try; doubled for each further one, up to a minute.
    """

    url: str
    kind: str = "vllm"
    model: str | None = None
    log_probs: str | None = None
    api_key: str | None = None
    timeout: float = 600.0
    concurrency: int = 32
    retries: int = 5
    backoff: float = 1.0


def served(
    server: Server,
    prompts: Prompts,
    key: Array,
    *,
    sampling: SamplingParams = PLAIN,
    max_new_tokens: int,
    group_size: int = 1,
    version: Array | int = 0,
) -> Rollouts:
    """Sample `group_size` completions of each prompt at an inference server: `generate` with the policy elsewhere.

    One request for each prompt. Seeds come from the key and the sequences' ids; whether the server keeps to them is its
    own affair (SGLang does under `--enable-deterministic-inference`).

    `logp` is the server's log-prob, which is that of the tempered distribution wherever the server gives that one:
    `server.log_probs` says. Under `"processed"` with a truncation it is that of the truncated one, also in
    `extras["sampler_logp"]`. `"raw"` log-probs are refused at other temperatures than 1.

    However the server computes, its log-probs are not to the last digits those of the trained model. A method with
    `old_logp="recompute"` and `correction="tis"` weighs the difference out; `recompute_logp` puts the policy's own into
    `logp`, for whatever else reads it. There is no `extras["entropy"]`.

    A prompt whose request fails for good (time-out, or no tries left) has sequences without tokens, `FINISH_ABORT` and
    not `valid`, and a warning says why; so are single completions that the server aborts, with the tokens they have.
    `update_weights` gives the server others.

    Args:
        server: where.
        prompts: `P` prompts of at most `L` tokens.
        key: of the seeds.
        sampling: temperature, `top_k`, `top_p`, `min_p`, `greedy`, each one number for all, and `stop_tokens`, with the
            model's end token if it is to end a sequence.
        max_new_tokens: `N`, the largest number of tokens to add to each prompt.
        group_size: `G`.
        version: of the server's weights; recorded in `Rollouts.version` for every sampled token.

    Returns:
        `Rollouts` as `generate` makes them, with `T = L + N`.

    Raises:
        ServerError: if no request succeeds; for a request that the server refuses (4xx), an answer that is not JSON, or
            one without token ids or log-probs, with fewer completions, or with an end that was not asked for.
        ValueError: as `generate`, and for options that a server does not have.

    Example:
        >>> import http.server, threading
        >>> class Repeats(http.server.BaseHTTPRequestHandler):
        ...     def log_message(self, *message):
        ...         pass
        ...
        ...     def do_POST(self):
        ...         asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ...         said = {"token_ids": asked["prompt"][:1], "finish_reason": "length"}
        ...         answer = {"choices": [{**said, "logprobs": {"token_logprobs": [-0.5]}}] * asked["n"]}
        ...         self.send_response(200)
        ...         self.end_headers()
        ...         self.wfile.write(json.dumps(answer).encode())
        >>> http_server = http.server.HTTPServer(("127.0.0.1", 0), Repeats)
        >>> threading.Thread(target=http_server.serve_forever, daemon=True).start()
        >>> server = Server(f"http://127.0.0.1:{http_server.server_port}/v1")
        >>> prompts = Prompts(jnp.array([[2, 3]]), jnp.array([2]))
        >>> out = served(server, prompts, jax.random.key(0), max_new_tokens=2, group_size=2)
        >>> out.tokens.tolist(), out.logp.tolist(), out.length.tolist()
        ([[2, 3, 2, 0], [2, 3, 2, 0]], [[0.0, 0.0, -0.5, 0.0], [0.0, 0.0, -0.5, 0.0]], [[3, 3]])
        >>> http_server.shutdown()
        >>> http_server.server_close()
    """
    sampling, kind, log_probs = check_server(server, sampling)
    asks = _asks(server, prompts, key, sampling, max_new_tokens, group_size)
    bodies = [json.dumps(kind.request(ask)).encode() for ask in asks]
    with ThreadPoolExecutor(server.concurrency) as pool:
        futures = [pool.submit(_ask, server, kind, *each) for each in zip(asks, bodies, strict=True)]
        try:
            answers = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failures = [answer for answer in answers if isinstance(answer, str)]
    address = server.url.rstrip("/") + kind.path
    if len(failures) == len(asks):
        raise ServerError(f"{address}: none of {len(asks)} requests succeeded; the first: {failures[0]}")
    if failures:
        warnings.warn(
            f"{address}: {len(failures)} of {len(asks)} requests failed, whose sequences are not valid; the first: "
            f"{failures[0]}",
            stacklevel=2,
        )
    nothing = Completion((), (), FINISH_ABORT)
    completions = [
        completion
        for answer in answers
        for completion in ([nothing] * group_size if isinstance(answer, str) else answer)
    ]
    rollouts = _rollouts(asks, completions, prompts, max_new_tokens, version)
    of_what_was_drawn_from = log_probs == "processed" or not is_truncating(sampling)
    return rollouts.replace(extras={"sampler_logp": rollouts.logp} if of_what_was_drawn_from else {})


def update_weights(server: Server, directory: str) -> None:
    """Have a server sample with the checkpoint in a directory, instead of the weights that it has.

    It waits until the server says that it does. Nothing may be sampled meanwhile.

    Args:
        server: where. A vLLM server must have been started with `VLLM_SERVER_DEV_MODE=1`, behind a wall: this opens
            what anyone who reaches it can use.
        directory: of a Hugging Face checkpoint of the very model that is served, as `models.save_pretrained` writes
            it, under the name by which the server finds it.

    Raises:
        ServerError: if the server refuses, fails or cannot be reached.
        ValueError: for a server as `served` refuses it.

    Example:
        >>> update_weights(Server("http://127.0.0.1:1/v1", retries=0), "/shared/policy")
        Traceback (most recent call last):
        jaxrl_post.rollout.served.ServerError: http://127.0.0.1:1/collective_rpc: ConnectionRefusedError: ...
    """
    kind = check_server(server, SamplingParams())[1]
    root = server.url.rstrip("/").removesuffix("/v1")
    for path, body in kind.update(directory):
        try:
            answer = _answered(server, root + path, json.dumps(body).encode())
        except ServerError as error:
            raise ServerError(f"{error}; {kind.update_hint}") from None
        if isinstance(answer, str):
            raise ServerError(f"{root}{path}: {answer}")
        try:
            said = json.loads(answer or b"null")
        except ValueError:
            said = None
        if isinstance(said, dict) and said.get("success") is False:
            raise ServerError(f"{root}{path} did not load {directory}: {_beginning(answer)}; {kind.update_hint}")


def recompute_logp(score: Score, params: Params, rollouts: Rollouts, key: Array) -> Rollouts:
    """The policy's own log-probs in `logp`, in the place of a sampler's, which stay in `extras["sampler_logp"]`.

    Args:
        score: of the policy, at the temperature that was sampled with: `models.score(policy, temperature=...)`.
        params: of the version that sampled.
        rollouts: `[B, T]` as sampled elsewhere.
        key: for the score.

    Returns:
        The rollouts with `logp` 0 where the policy chose nothing.

    Example:
        >>> from jaxrl_post import models
        >>> from jaxrl_post.data import to_rollouts
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> rollouts = to_rollouts([[2]], [[[3]]], length=2)
        >>> key = jax.random.key(0)
        >>> params = jax.eval_shape(policy.init, key)
        >>> out = jax.eval_shape(lambda *args: recompute_logp(models.score(policy), *args), params, rollouts, key)
        >>> out.logp.shape, sorted(out.extras)
        ((1, 2), ['sampler_logp'])
    """
    score = getattr(score, "still", score)  # without dropout, as tokens are sampled
    own = score(params, rollouts, frozenset({"logp"}), key).logp
    given = rollouts.extras.get("sampler_logp", rollouts.logp)
    return rollouts.replace(
        logp=jnp.where(rollouts.mask > 0, own, 0.0), extras={**rollouts.extras, "sampler_logp": given}
    )


def _plain(sampling: SamplingParams) -> SamplingParams:
    """The options as Python's numbers."""
    named = [name for name in _UNSUPPORTED if not is_off(name, getattr(sampling, name))]
    if named:
        raise ValueError(f"sampling.{named[0]} cannot be asked of a server; sample with rollout.generate, or leave it")
    plain: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "greedy"):
        value = np.asarray(getattr(sampling, name))
        if value.ndim:
            raise ValueError(f"sampling.{name} must be one number for all sequences of a server, got {value.shape}")
        plain[name] = value.item()
    if np.ndim(sampling.stop_tokens) > 1:
        raise ValueError("sampling.stop_tokens must be the same for all sequences of a server, a tuple or [K]")
    stops = tuple(int(token) for token in np.asarray(sampling.stop_tokens) if token >= 0)
    sampling = SamplingParams(**plain, stop_tokens=stops)
    check(sampling)
    if not sampling.greedy:
        return sampling
    if sampling.temperature != 1:
        raise ValueError(
            f"servers take the most probable token by a temperature of 0, whose log-probs are those at temperature 1: "
            f"with greedy=True leave sampling.temperature at 1, got {sampling.temperature}"
        )
    return SamplingParams(greedy=True, stop_tokens=stops)


def check_server(server: Server, sampling: SamplingParams) -> tuple[SamplingParams, ServerFormat, str]:
    """What `served` makes of its arguments: options as Python's numbers, the format, and what log-probs are of.

    Raises:
        ValueError: as `served`.
    """
    sampling = _plain(sampling)
    if server.kind not in FORMATS:
        raise ValueError(f"server.kind must be one of {', '.join(FORMATS)}, got {server.kind!r}")
    kind = FORMATS[server.kind]
    log_probs = kind.log_probs[0] if server.log_probs is None else server.log_probs
    if log_probs not in kind.log_probs:
        raise ValueError(
            f"server.log_probs of kind {server.kind!r} must be one of {', '.join(kind.log_probs)}, got {log_probs!r}"
        )
    if urllib.parse.urlsplit(server.url).scheme not in ("http", "https"):
        raise ValueError(f"server.url must begin with http:// or https://, got {server.url!r}")
    if server.concurrency < 1 or server.retries < 0 or server.timeout <= 0 or server.backoff < 0:
        raise ValueError(f"need concurrency >= 1, retries >= 0, timeout > 0 and backoff >= 0, got {server}")
    if log_probs == "raw" and sampling.temperature != 1:
        better = {
            "vllm": "start vLLM with --logprobs-mode processed_logprobs and give log_probs='processed'",
            "sglang": "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB and give log_probs='tempered'",
        }[server.kind]
        raise ValueError(
            f"raw log-probs are those at temperature 1, but sampling.temperature is {sampling.temperature}: they would "
            f"not be of what was sampled; {better}"
        )
    return sampling, kind, log_probs


def _asks(
    server: Server, prompts: Prompts, key: Array, sampling: SamplingParams, max_new_tokens: int, group_size: int
) -> list[Ask]:
    requests = check_requests(prompts, max_new_tokens, group_size)
    tokens, length = np.asarray(requests.tokens), np.asarray(requests.length)
    limits = np.full(len(tokens) * group_size, max_new_tokens) if requests.limit is None else np.asarray(requests.limit)
    keys = row_keys(key, jnp.asarray(requests.id), jnp.zeros(len(limits), jnp.int32))
    seeds = np.asarray(jax.vmap(jax.random.bits)(keys)) >> 2  # room for the group's numbers below 2**31
    limits, seeds = limits.reshape(-1, group_size), seeds.reshape(-1, group_size)
    return [
        Ask(
            prompt=tuple(tokens[p, : length[p]].tolist()),
            seeds=tuple(seeds[p].tolist()),
            limits=tuple(limits[p].tolist()),
            temperature=0.0 if sampling.greedy else float(sampling.temperature),
            top_k=int(sampling.top_k),
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            stop_tokens=sampling.stop_tokens,  # type: ignore[arg-type]
            model=server.model,
        )
        for p in range(len(tokens))
    ]


def _ask(server: Server, kind: ServerFormat, ask: Ask, body: bytes) -> list[Completion] | str:
    """The completions of one prompt, or why there are none although nothing is wrong with the request."""
    address = server.url.rstrip("/") + kind.path
    text = _answered(server, address, body)
    if isinstance(text, str):
        return text
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{address} answered with what is not JSON ({error}): {_beginning(text)}") from error
    try:
        return kind.read(answer, ask)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ServerError(f"the answer of {address} cannot be used: {error}") from error


def _answered(server: Server, address: str, body: bytes) -> bytes | str:
    """What the server says to a request, or why it said nothing although nothing is wrong with that."""
    failure = ""
    for attempt in range(server.retries + 1):
        if attempt:
            time.sleep(min(server.backoff * 2 ** (attempt - 1), _LONGEST_WAIT))
        try:
            status, text = _post(server, address, body)
        except TimeoutError:
            return f"no answer within {server.timeout} seconds"  # nor would there be one to the same question
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        if status == 429 or status >= 500:
            failure = f"HTTP {status}: {_beginning(text)}"
            continue
        if status != 200:
            raise ServerError(f"{address} refused a request with HTTP {status}: {_beginning(text)}")
        return text
    return f"{failure} (tries: {server.retries + 1})"


def _post(server: Server, address: str, body: bytes) -> tuple[int, bytes]:
    parts = urllib.parse.urlsplit(address)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if server.api_key is not None:
        headers["Authorization"] = f"Bearer {server.api_key}"
    connection = connect(parts.netloc.rpartition("@")[2], timeout=server.timeout)
    try:
        try:
            connection.connect()
        except TimeoutError as error:  # nothing has been asked yet
            raise ConnectionError(f"cannot be reached within {server.timeout} seconds") from error
        connection.request("POST", parts.path, body, headers)
        response = connection.getresponse()
        begun, pieces = time.monotonic(), []
        while piece := response.read1(2**16):
            pieces.append(piece)
            if time.monotonic() - begun > server.timeout:
                raise TimeoutError
        if response.length:  # the connection has ended before
            raise http.client.IncompleteRead(b"".join(pieces), response.length)
        return response.status, b"".join(pieces)
    finally:
        connection.close()


def _beginning(text: bytes) -> str:
    return text[:500].decode(errors="replace")


def _rollouts(
    asks: list[Ask], completions: list[Completion], prompts: Prompts, max_new_tokens: int, version: Array | int
) -> Rollouts:
    """Everything in the layout of `generate`."""
    grouped = (len(asks), len(asks[0].seeds))
    batch, width = len(completions), prompts.tokens.shape[1] + max_new_tokens
    tokens, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), np.float32)
    logp, total = np.zeros((batch, width), np.float32), np.zeros(batch, np.int32)
    for row, completion in enumerate(completions):
        prompt = asks[row // grouped[1]].prompt
        begin, end = len(prompt), len(prompt) + len(completion.tokens)
        tokens[row, :end] = [*prompt, *completion.tokens]
        mask[row, begin:end] = 1.0
        logp[row, begin:end] = completion.logp
        total[row] = end
    finish = np.array([completion.finish for completion in completions], np.int8).reshape(grouped)

    def or_count(given: Array | None, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        count = np.arange(np.prod(shape)).reshape(shape) if given is None else np.asarray(given)
        return count.astype(dtype)

    sampled = jnp.asarray(mask > 0)
    return Rollouts(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        logp=jnp.asarray(logp),
        step=jnp.where(sampled, 0, -1).astype(jnp.int32),
        version=jnp.where(sampled, version, -1).astype(jnp.int32),
        reward=jnp.zeros(grouped, jnp.float32),
        rewards={},
        valid=jnp.asarray(finish != FINISH_ABORT),
        length=jnp.asarray(total.reshape(grouped)),
        finish=jnp.asarray(finish),
        id=jnp.asarray(or_count(prompts.id, grouped, np.uint32)),
        prompt_id=jnp.asarray(or_count(prompts.prompt_id, grouped[:1], np.int32)),
    )

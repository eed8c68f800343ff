"""`rollout.served` against an HTTP server in a thread, which answers from a tiny model and fails as it is told to."""

import functools
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data, methods, models
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.rollout.served import Server, ServerError, recompute_logp, served, update_weights
from jaxrl_post.rollout.server_formats import Ask, Completion, read_sglang, read_vllm, sglang_request, vllm_request
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, TokenStats
from tests.servers import running
from tests.tiny import NEW, PROMPT, VOCAB, policy

G, STOP = 2, 1
KEY = jax.random.key(3)
PLAIN = SamplingParams(stop_tokens=(STOP,))
PROMPTS = ((5, 3, 2), (4,), (7, 6))
FIELDS = frozenset({"logp"})


@functools.cache
def params():
    return jax.jit(policy().init)(jax.random.key(0))


@jax.jit
def sample(params, tokens, length, seed, temperature, top_k):
    sampling = SamplingParams(temperature=temperature, top_k=top_k, stop_tokens=(STOP,))
    prompt = Prompts(tokens[None], length[None])
    key = jax.random.key(seed)
    return generate(policy(), params, prompt, key, sampling=sampling, max_new_tokens=NEW, group_size=G)


@functools.cache
def scored():
    def at(params, rollouts, temperature):
        return models.score(policy(), temperature=temperature)(params, rollouts, FIELDS, KEY).logp

    return jax.jit(at)


def own_logp(rollouts, temperature=1.0):
    return np.asarray(scored()(params(), rollouts, temperature) * rollouts.mask)


def prompts(rows=(0, 1, 2), ids=None):
    tokens = np.full((len(rows), PROMPT), 10**6)
    for row, prompt in enumerate(rows):
        tokens[row, : len(PROMPTS[prompt])] = PROMPTS[prompt]
    ids = [[10 * prompt, 10 * prompt + 1] for prompt in rows] if ids is None else ids
    length = jnp.array([len(PROMPTS[prompt]) for prompt in rows])
    return Prompts(jnp.asarray(tokens), length, jnp.asarray(rows) + 100, jnp.asarray(ids, jnp.uint32))


def answer_completions(prompt, seed, temperature, top_k, shift):
    """`G` completions of the model: ids, what it says of them under each name, and how they end."""
    padded = jnp.asarray(np.pad(prompt, (0, PROMPT - len(prompt))))
    out = sample(params(), padded, jnp.asarray(len(prompt)), seed, jnp.asarray(temperature), jnp.asarray(top_k))
    ends = {FINISH_STOP: "stop", FINISH_LENGTH: "length"}
    for g in range(G):
        places = slice(len(prompt), int(out.length[0, g]))
        tokens, tempered = np.asarray(out.tokens[g, places]), np.asarray(out.logp[g, places])
        processed = np.asarray(out.extras["sampler_logp"][g, places])
        logp = {"tempered": tempered + shift, "processed": processed + shift}
        yield tokens.tolist(), logp, ends[int(out.finish[0, g])]


def vllm_answer(body, names="token_ids", log_probs="processed", shift=0.0):
    top_k = max(body["top_k"], 0)
    choices = []
    for tokens, logp, end in answer_completions(body["prompt"], body["seed"], body["temperature"], top_k, shift):
        text = [f"token_id:{token}" if names == "strings" else "ab"[token % 2] for token in tokens]
        choice = {"index": len(choices), "finish_reason": end, "stop_reason": STOP if end == "stop" else None}
        choice["logprobs"] = {"tokens": text, "token_logprobs": logp[log_probs].tolist()}
        if names == "token_ids":
            choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
        choices.append(choice)
    return {"choices": choices[::-1]}  # their order is what index says


def sglang_answer(body, shift=0.0):
    own = body["sampling_params"]
    shared, top_k = body["input_ids"][0], max(own[0]["top_k"], 0)
    outputs = []
    for tokens, logp, end in answer_completions(shared, own[0]["sampling_seed"], own[0]["temperature"], top_k, shift):
        triples = [[float(x), token, None] for x, token in zip(logp["tempered"], tokens, strict=True)]
        finish = {"type": end, "matched": STOP} if end == "stop" else {"type": end, "length": NEW}
        meta = {"finish_reason": finish, "prompt_tokens": len(shared), "output_token_logprobs": triples}
        outputs.append({"text": "?", "output_ids": tokens, "meta_info": meta})
    return outputs


def from_vllm(url, *, sampling=PLAIN, some=None, key=KEY, **options):
    server = Server(f"{url}/v1", **{"backoff": 0.01, **options})
    some = prompts() if some is None else some
    return served(server, some, key, sampling=sampling, max_new_tokens=NEW, group_size=G, version=7)


@functools.cache
def plain_vllm():
    with running(lambda number, path, body: vllm_answer(body)) as (url, _):
        return from_vllm(url)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("kind", ["vllm", "vllm with ids as text", "sglang"])
def test_every_format_gives_what_the_model_sampled_with_the_models_own_log_probs(kind):
    def respond(number, path, body):
        if kind == "sglang":
            assert path == "/generate"
            return sglang_answer(body)
        assert path == "/v1/completions"
        return vllm_answer(body, names="token_ids" if kind == "vllm" else "strings")

    with running(respond) as (url, log):
        server = Server(url if kind == "sglang" else f"{url}/v1/", kind=kind.split()[0], api_key="secret")
        out = served(server, prompts(), KEY, sampling=PLAIN, max_new_tokens=NEW, group_size=G, version=7)
    assert len(log) == len(PROMPTS)
    assert {entry["key"] for entry in log} == {"Bearer secret"}

    # The layout is that of data.to_rollouts of the same completions.
    sent = {tuple(np.ravel(entry["body"].get("prompt") or entry["body"]["input_ids"][0])): entry for entry in log}
    completions, ends = [], []
    for prompt in PROMPTS:
        body = sent[prompt]["body"]
        seed = body["seed"] if "seed" in body else body["sampling_params"][0]["sampling_seed"]
        group = list(answer_completions(prompt, seed, 1.0, 0, 0.0))
        completions.append([tokens for tokens, _, _ in group])
        ends.append([{"stop": FINISH_STOP, "length": FINISH_LENGTH}[end] for _, _, end in group])
    expected = data.to_rollouts(PROMPTS, completions, length=PROMPT + NEW, prompt_id=[100, 101, 102])
    for name in ("tokens", "mask", "step", "length", "valid", "reward", "prompt_id"):
        got, want = getattr(out, name), getattr(expected, name)
        np.testing.assert_array_equal(got, want, err_msg=name)
        assert got.dtype == want.dtype, name
    np.testing.assert_array_equal(out.finish, ends)
    np.testing.assert_array_equal(out.version, np.where(expected.mask > 0, 7, -1))
    np.testing.assert_array_equal(out.id, [[0, 1], [10, 11], [20, 21]])
    assert {FINISH_STOP, FINISH_LENGTH} == set(out.finish.ravel().tolist())  # else one end is not tested

    np.testing.assert_allclose(out.logp, own_logp(out), atol=1e-5)
    np.testing.assert_array_equal(out.extras["sampler_logp"], out.logp)


def test_tempered_log_probs_are_those_of_the_policy_at_the_temperature():
    with running(lambda number, path, body: sglang_answer(body)) as (url, _):
        sampling = PLAIN._replace(temperature=0.6)
        server = Server(url, kind="sglang")
        out = served(server, prompts(), KEY, sampling=sampling, max_new_tokens=NEW, group_size=G)
    np.testing.assert_allclose(out.logp, own_logp(out, 0.6), atol=1e-5)
    assert np.abs(out.logp - own_logp(out, 1.0)).max() > 0.05


def test_processed_log_probs_are_of_the_truncated_distribution_and_recompute_logp_gives_the_policys():
    sampling = PLAIN._replace(temperature=jnp.asarray(0.6), top_k=3)
    with running(lambda number, path, body: vllm_answer(body)) as (url, _):
        out = from_vllm(url, sampling=sampling, log_probs="processed")
    # Of the three best in float64, from the logits of the whole sequences.
    tokens = jnp.where(jnp.arange(PROMPT + NEW) < out.length.reshape(-1, 1), out.tokens, 0)
    places = jnp.broadcast_to(jnp.arange(PROMPT + NEW), tokens.shape)
    hidden = policy().hidden(params(), tokens, places)[0]
    logits = np.asarray(models.logits(policy().unembed(params()), hidden), np.float64)[:, :-1] / 0.6
    kept = np.where(logits >= np.sort(logits)[..., -3:-2], np.exp(logits), 0)
    chosen = np.take_along_axis(kept / kept.sum(-1, keepdims=True), np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    expected = np.log(np.where(out.mask[:, 1:] > 0, chosen, 1.0))
    np.testing.assert_allclose(out.extras["sampler_logp"][:, 1:], expected, atol=1e-5)

    score = models.score(policy(), temperature=0.6)
    own = jax.jit(functools.partial(recompute_logp, score))(params(), out, KEY)
    np.testing.assert_allclose(own.logp, own_logp(out, 0.6), atol=1e-6)
    np.testing.assert_array_equal(own.extras["sampler_logp"], out.extras["sampler_logp"])
    assert same(own.replace(logp=out.logp), out)


def test_truncation_that_the_log_probs_do_not_show_leaves_no_sampler_logp():
    with running(lambda number, path, body: vllm_answer(body, log_probs="tempered")) as (url, log):
        out = from_vllm(url, sampling=PLAIN._replace(top_k=3))
    assert {entry["body"]["top_k"] for entry in log} == {3}
    assert "sampler_logp" not in out.extras
    np.testing.assert_allclose(out.logp, own_logp(out), atol=1e-5)


def test_tis_weighs_out_what_the_server_is_wrong_by():
    with running(lambda number, path, body: vllm_answer(body, shift=-0.25)) as (url, _):
        out = from_vllm(url)
    method = methods.grpo(old_logp="recompute", correction="tis", beta=0.0)
    stats = {"policy": TokenStats(logp=jnp.asarray(own_logp(out)))}
    targets, _ = method.targets(method.init(out, 3), out, stats, KEY)
    np.testing.assert_allclose(targets.extras["weights"][out.mask > 0], np.exp(0.25), rtol=1e-4)


def test_a_sequences_seed_depends_on_the_key_and_its_id_alone():
    whole = plain_vllm()
    with running(lambda number, path, body: vllm_answer(body)) as (url, log):
        alone = from_vllm(url, some=prompts((2,)))
        from_vllm(url, some=prompts((2,)), key=jax.random.key(4))
        from_vllm(url, some=prompts((2,), ids=[[7, 8]]))
    assert same(alone.tokens, whole.tokens[4:])
    assert len({entry["body"]["seed"] for entry in log}) == 3


@pytest.mark.parametrize("fault", [(500, b"out of memory"), (429, b"later"), (503, b"loading")])
def test_a_server_that_fails_twice_is_asked_again(fault):
    with running(lambda number, path, body: fault if number in (0, 2) else vllm_answer(body)) as (url, log):
        out = from_vllm(url, concurrency=1)
    assert len(log) == len(PROMPTS) + 2
    assert same(out, plain_vllm())


def test_a_prompt_that_fails_for_good_has_invalid_empty_sequences_and_a_warning():
    def respond(number, path, body):
        return (500, b"cannot allocate") if len(body["prompt"]) == 1 else vllm_answer(body)

    with running(respond) as (url, log), pytest.warns(UserWarning, match=r"1 of 3 requests failed.*cannot allocate"):
        out = from_vllm(url, retries=2)
    assert len(log) == 2 + 3
    np.testing.assert_array_equal(out.valid, [[True, True], [False, False], [True, True]])
    np.testing.assert_array_equal(out.finish[1], [FINISH_ABORT, FINISH_ABORT])
    np.testing.assert_array_equal(out.length[1], [1, 1])
    assert float(out.mask[2:4].sum()) == 0
    assert same(out.tokens[4:], plain_vllm().tokens[4:])


def test_a_request_that_hangs_ends_at_its_time_out_and_is_not_sent_again():
    release = threading.Event()

    def respond(number, path, body):
        if len(body["prompt"]) == 2:
            release.wait(20)
        return vllm_answer(body)

    plain_vllm()  # compiled, so that the other answers are quick
    began = time.monotonic()
    with running(respond) as (url, log):
        with pytest.warns(UserWarning, match="no answer within 3.0 seconds"):
            out = from_vllm(url, timeout=3.0)
        release.set()
    assert time.monotonic() - began < 15
    assert len(log) == 3
    np.testing.assert_array_equal(out.valid, [[True, True], [True, True], [False, False]])


def test_where_no_server_is_the_error_names_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=rf"127.0.0.1:{port}/v1/completions: none of 3 .*Refused.*\(tries: 2\)"):
        from_vllm(f"http://127.0.0.1:{port}", retries=1)


def without(answer, *names):
    choices = [{name: x for name, x in choice.items() if name not in names} for choice in answer["choices"]]
    return {"choices": choices}


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda body: (400, b'{"error": "no such model"}'), "refused a request with HTTP 400: .*no such model"),
        (lambda body: (200, b"<html>gateway"), "not JSON .*<html>gateway"),
        (lambda body: vllm_answer(body, names="text"), "no token ids, only text .*--return-tokens-as-token-ids"),
        (lambda body: without(vllm_answer(body), "logprobs"), "no log-probs"),
        (lambda body: {"choices": vllm_answer(body)["choices"][:1]}, "2 choices were asked for and 1 came"),
        (lambda body: [], "no choices"),
    ],
)
def test_an_answer_that_cannot_be_used_is_an_error_with_the_address_and_is_not_asked_for_again(respond, message):
    with (
        running(lambda number, path, body: respond(body)) as (url, log),
        pytest.raises(ServerError, match=rf"(?s){url}/v1/completions.*{message}"),
    ):
        from_vllm(url, some=prompts((0,)))
    assert len(log) == 1


def test_there_are_no_more_requests_at_a_time_than_allowed():
    busy, most, lock = [0], [0], threading.Lock()
    two = threading.Barrier(2, timeout=20)

    def respond(number, path, body):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        two.wait()
        time.sleep(0.1)
        with lock:
            busy[0] -= 1
        return vllm_answer(body)

    with running(respond) as (url, _):
        from_vllm(url, some=prompts((0, 1, 2, 0), ids=np.arange(8).reshape(4, 2)), concurrency=2)
    assert most[0] == 2


@pytest.mark.parametrize(
    ("server", "sampling", "message"),
    [
        ({}, {"presence_penalty": 0.5}, "sampling.presence_penalty cannot be asked of a server"),
        ({}, {"stop_sequences": ((1, 2),)}, "sampling.stop_sequences cannot"),
        ({}, {"allowed": np.ones(VOCAB, bool)}, "sampling.allowed cannot"),
        ({}, {"temperature": np.ones(3)}, "sampling.temperature must be one number"),
        ({}, {"stop_tokens": np.ones((4, 1), int)}, "sampling.stop_tokens must be the same for all sequences"),
        ({}, {"temperature": 0.0}, "temperature must be positive"),
        ({}, {"temperature": 0.7}, "raw log-probs are those at temperature 1, .* 0.7.*processed_logprobs"),
        ({"log_probs": "processed"}, {"temperature": 0.7, "greedy": True}, "leave sampling.temperature at 1, got 0.7"),
        ({"kind": "sglang", "log_probs": "raw"}, {"temperature": 0.7}, "without SGLANG_RETURN_ORIGINAL_LOGPROB"),
        ({"log_probs": "tempered"}, {}, "of kind 'vllm' must be one of raw, processed, got 'tempered'"),
        ({"kind": "tgi"}, {}, "kind must be one of vllm, sglang, got 'tgi'"),
        ({"url": "localhost:8000"}, {}, "must begin with http"),
        ({"concurrency": 0}, {}, "concurrency >= 1"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_it_is_asked(server, sampling, message):
    server = Server(**{"url": "http://127.0.0.1:9", **server})
    with pytest.raises(ValueError, match=message):
        served(server, prompts(), KEY, sampling=SamplingParams(**sampling), max_new_tokens=NEW, group_size=G)


def test_limits_that_differ_within_a_group_are_each_sent_to_sglang_whose_completions_keep_to_them():
    some = prompts((0,))._replace(max_new_tokens=jnp.array([[2, 4]]))

    def respond(number, path, body):
        own = [each["max_new_tokens"] for each in body["sampling_params"]]
        metas = [{"output_token_logprobs": [[-1.0, 5, None]] * n, "finish_reason": {"type": "length"}} for n in own]
        return [{"output_ids": [5] * n, "meta_info": meta} for n, meta in zip(own, metas, strict=True)]

    with running(respond) as (url, _):
        out = served(Server(url, kind="sglang"), some, KEY, max_new_tokens=NEW, group_size=G)
    assert out.length.tolist() == [[5, 7]]
    longer = [sglang_output({"type": "length"}, ((-1.0, 5, None),) * n, (5,) * n) for n in (3, 3)]
    with pytest.raises(ValueError, match="3 tokens, more than the 2 that were allowed"):
        read_sglang(longer, Ask((5,), (1, 2), (2, 4)))


def test_limits_that_differ_within_a_group_cut_what_vllm_gives_of_the_largest():
    limits = np.array([[1, NEW], [NEW, 2], [NEW - 1, NEW]])
    whole = plain_vllm()
    with running(lambda number, path, body: vllm_answer(body)) as (url, log):
        out = from_vllm(url, some=prompts()._replace(max_new_tokens=jnp.asarray(limits)))
    assert [entry["body"]["max_tokens"] for entry in log] == [NEW] * 3
    own = np.asarray(whole.length) - [[len(prompt)] for prompt in PROMPTS]
    cut = own > limits
    assert 0 < cut.sum() < cut.size
    np.testing.assert_array_equal(out.length, np.where(cut, whole.length - own + limits, whole.length))
    np.testing.assert_array_equal(out.finish, np.where(cut, FINISH_LENGTH, whole.finish))
    there = np.arange(PROMPT + NEW) < np.asarray(out.length).reshape(-1, 1)
    for name in ("tokens", "mask", "logp"):
        np.testing.assert_array_equal(getattr(out, name), np.where(there, getattr(whole, name), 0), err_msg=name)


def test_greedy_is_asked_for_by_a_temperature_of_zero_without_truncations():
    asked = []

    def respond(number, path, body):
        asked.append(body)
        choice = {"token_ids": [4], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "length"}
        return {"choices": [choice] * G}

    with running(respond) as (url, _):
        out = from_vllm(url, sampling=SamplingParams(greedy=True, top_k=5, top_p=0.5))
    assert {(body["temperature"], body["top_k"], body["top_p"]) for body in asked} == {(0.0, -1, 1.0)}
    assert "sampler_logp" in out.extras


ASK = Ask((5, 6), (1,), (3,), stop_tokens=(2,))


def vllm_choice(tokens=(4, 2), logp=(-1.0, -2.0), **more):
    return {"token_ids": list(tokens), "logprobs": {"token_logprobs": list(logp)}, "finish_reason": "stop", **more}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (vllm_choice(), ((4, 2), (-1.0, -2.0), FINISH_STOP)),
        (vllm_choice(finish_reason="length"), ((4, 2), (-1.0, -2.0), FINISH_LENGTH)),
        (vllm_choice(finish_reason="abort"), ((4, 2), (-1.0, -2.0), FINISH_ABORT)),
        (vllm_choice(finish_reason=None), ((4, 2), (-1.0, -2.0), FINISH_ABORT)),
        (vllm_choice(stop_reason="repetition"), ((4, 2), (-1.0, -2.0), FINISH_ABORT)),
        (vllm_choice(logp=(-1.0, float("nan"))), ((4,), (-1.0,), FINISH_ABORT)),
        (vllm_choice(logp=(None, -2.0)), ((), (), FINISH_ABORT)),
        (vllm_choice(logp=(-1e300, -2.0)), ((), (), FINISH_ABORT)),
        (vllm_choice((), ()), ((), (), FINISH_ABORT)),
    ],
)
def test_how_a_completion_ends_says_its_finish_reason_and_the_first_log_prob_that_is_none(choice, expected):
    assert read_vllm({"choices": [choice]}, ASK) == [Completion(*expected)]


def test_what_vllm_has_said_beyond_a_completions_own_limit_says_nothing_of_it():
    ask = Ask((5, 6), (1, 2), (1, 3), stop_tokens=(2,))
    broken = vllm_choice((4, 4, 7), (-1.0, None, -3.0), finish_reason="abort", index=0)
    found = read_vllm({"choices": [vllm_choice(index=1), broken]}, ask)
    assert found == [Completion((4,), (-1.0,), FINISH_LENGTH), Completion((4, 2), (-1.0, -2.0), FINISH_STOP)]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (vllm_choice(prompt_token_ids=[1, 5, 6]), "read a prompt of 3 tokens, .* not the 2"),
        (vllm_choice((4, 7)), r"ended a completion at token 7, which is not in sampling.stop_tokens \(2,\)"),
        (vllm_choice((4, 5, 5, 2), (-1.0,) * 4), "4 tokens, more than the 3"),
        (vllm_choice((4, 2), (-1.0,)), "2 token ids but 1 log-probs"),
        (vllm_choice((4, -2)), r"whole numbers of 0 to 2\*\*31"),
        (vllm_choice((4, True)), r"whole numbers of 0 to 2\*\*31"),
        (vllm_choice((10**10, 2)), r"whole numbers of 0 to 2\*\*31"),
        (vllm_choice(logp=(3.0, -2.0)), "must not be above 0, got 3.0"),
        (vllm_choice((2, 4), finish_reason="length"), "went on behind token 2, which is in sampling.stop_tokens"),
        (vllm_choice((4, 2), ("-1", -2.0)), "log-probs must be numbers"),
    ],
)
def test_a_choice_that_is_not_what_was_asked_for_is_an_error(choice, message):
    with pytest.raises(ValueError, match=message):
        read_vllm({"choices": [choice]}, ASK)


def test_choices_of_one_index_are_an_error():
    with pytest.raises(ValueError, match=r"indices \[0, 0\], some of them twice"):
        read_vllm({"choices": [vllm_choice(index=0)] * 2}, Ask((5, 6), (1, 2), (3, 3), stop_tokens=(2,)))


def sglang_output(finish, pairs=((-1.0, 4, None), (-2.0, 2, None)), ids=(4, 2), **more):
    meta = {"finish_reason": finish, "output_token_logprobs": list(pairs), **more}
    return {"output_ids": list(ids), "meta_info": {name: x for name, x in meta.items() if x != []}}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (sglang_output({"type": "stop", "matched": 2}), ((4, 2), (-1.0, -2.0), FINISH_STOP)),
        (sglang_output({"type": "stop", "matched": "NaN happened"}), ((4, 2), (-1.0, -2.0), FINISH_ABORT)),
        (sglang_output({"type": "abort", "message": "cancelled"}, (), ()), ((), (), FINISH_ABORT)),
    ],
)
def test_sglang_ends_by_a_stop_token_or_gives_up(output, expected):
    assert read_sglang([output], ASK) == [Completion(*expected)]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (sglang_output({"type": "length"}, ()), "no output_token_logprobs"),
        (sglang_output({"type": "length"}, ((-1.0,),)), r"not \[log-prob, id, text\]"),
        (sglang_output({"type": "length"}, ids=(4, 3)), "are not the tokens that log-probs are given of"),
        (sglang_output({"type": "length"}, prompt_tokens=3), "read a prompt of 3 tokens, not the 2"),
        ({"text": "?"}, "no meta_info"),
    ],
)
def test_an_output_of_sglang_that_is_not_what_was_asked_for_is_an_error(output, message):
    with pytest.raises(ValueError, match=message):
        read_sglang([output], ASK)


def test_a_request_names_the_model_only_if_there_is_a_name():
    assert "model" not in vllm_request(ASK)
    assert vllm_request(ASK._replace(model="qwen"))["model"] == "qwen"


def test_both_kinds_are_asked_for_the_same_distribution():
    ask = Ask((5,), (1, 2), (3, 4), temperature=0.6, top_p=0.9, min_p=0.1, stop_tokens=(2,))
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    expected = {"temperature": 0.6, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "stop_token_ids": [2], **penalties}
    for asked in (vllm_request(ask), *sglang_request(ask)["sampling_params"]):
        assert expected.items() <= asked.items()


def test_new_weights_are_asked_for_at_the_servers_root_and_a_busy_one_is_asked_again():
    answers = {"/collective_rpc": {"results": [None]}, "/update_weights_from_disk": {"success": True, "message": ""}}

    def respond(number, path, body):
        return (503, b"") if number == 0 else answers.get(path, (200, b""))

    with running(respond) as (url, log):
        update_weights(Server(f"{url}/v1/", backoff=0.01, api_key="secret"), "/shared/one")
        update_weights(Server(url, kind="sglang"), "/shared/two")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": "/shared/one"}}
    assert [(one["path"], one["body"]) for one in log] == [
        ("/collective_rpc", reload),
        ("/collective_rpc", reload),
        ("/reset_prefix_cache", {}),
        ("/update_weights_from_disk", {"model_path": "/shared/two"}),
    ]
    assert [one["key"] for one in log] == ["Bearer secret"] * 3 + [None]


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("sglang", {"success": False, "message": "no such file"}, "did not load /shared: .*no such file"),
        (
            "sglang",
            (400, b"no such file"),
            "refused .* 400: no such file; the directory must be",
        ),
        ("vllm", (404, b"Not Found"), "collective_rpc refused .* 404.*VLLM_SERVER_DEV_MODE=1"),
        ("vllm", (500, b"out of memory"), r"collective_rpc: HTTP 500: out of memory \(tries: 1\)"),
    ],
)
def test_weights_that_a_server_does_not_load_are_an_error(kind, answer, message):
    with running(lambda number, path, body: answer) as (url, _), pytest.raises(ServerError, match=message):
        update_weights(Server(url, kind=kind, retries=0), "/shared")

"""The benchmark compares like with like and runs; how fast is not asked here."""

import jax
import numpy as np

from tests.benchmarks.token_logprob import arguments, contenders, run

SMALL = {"tokens": 256, "width": 32, "vocabulary": 512, "dtype": "float32"}


def test_all_contenders_of_a_task_give_the_same_numbers():
    given = arguments(**SMALL)
    for named in contenders().values():
        plain, *others = [jax.tree.leaves(jax.jit(function)(*given)) for function in named.values()]
        assert others
        for other in others:
            for expected, found in zip(plain, other, strict=True):
                np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))


def test_a_record_names_the_device_and_compares_with_the_plain_form():
    records = run(**SMALL, rounds=1)
    assert {r["device"] for r in records} == {jax.devices()[0].device_kind}
    assert {r["task"] for r in records} == {"forward", "forward and backward"}
    assert [r["time_ratio"] for r in records if r["contender"] == "plain"] == [1.0, 1.0]
    assert all(r["milliseconds"] > 0 for r in records)

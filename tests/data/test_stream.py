"""Order, filtering, counting and exact resumption of batches."""

import json

import pytest

from jaxrl_post.data import CharTokenizer, ReasoningGymSource, open_source, prompt_fits, stream

# Grain's shuffle costs milliseconds per item for sources of a few items, hence the modest numbers of draws.
SOURCE = [{"prompt": f"{i}", "answer": i} for i in range(40)]


def prompts(batch):
    return [problem["prompt"] for problem in batch]


def joined(batches):
    return [prompt for batch in batches for prompt in batch]


def take(batches, count):
    return [prompts(next(batches)) for _ in range(count)]


def test_each_epoch_holds_every_problem_once_in_an_order_of_its_own():
    batches = stream(SOURCE, batch_size=8, seed=0)
    epochs = [joined(take(batches, 5)) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == prompts(SOURCE)
    assert epochs[0] != epochs[1]


def test_a_seed_fixes_the_order_and_another_seed_changes_it():
    first = take(stream(SOURCE, batch_size=8, seed=3), 7)
    assert first == take(stream(SOURCE, batch_size=8, seed=3), 7)
    assert first != take(stream(SOURCE, batch_size=8, seed=4), 7)


def test_the_next_seed_does_not_start_with_this_seeds_second_epoch():
    second_epoch = take(stream(SOURCE, batch_size=40, seed=0), 2)[1]
    assert second_epoch != take(stream(SOURCE, batch_size=40, seed=1), 1)[0]


@pytest.mark.parametrize("done", [0, 1, 4, 9])
def test_a_restored_stream_gives_the_batches_that_were_left(done):
    def fresh():
        return stream(SOURCE, batch_size=6, seed=5, exclude={"3"}, keep=lambda p: p["answer"] % 5 > 0)

    whole = fresh()
    take(whole, done)
    state = json.loads(json.dumps(whole.get_state()))
    expected, counts = take(whole, 8), whole.counts

    restored = fresh()
    take(restored, 2)
    restored.set_state(state)
    assert take(restored, 8) == expected
    assert restored.counts == counts


def test_a_state_does_not_move_with_the_stream_that_gave_it():
    batches = stream(SOURCE, batch_size=6, seed=5)
    state = batches.get_state()
    before = json.dumps(state)
    first = take(batches, 1)
    assert json.dumps(state) == before
    batches.set_state(state)
    assert take(batches, 1) == first


def test_the_state_stays_small_however_far_the_stream_is():
    batches = stream(SOURCE, batch_size=40, seed=5)
    take(batches, 10)
    assert len(json.dumps(batches.get_state())) < 200


def test_generated_problems_resume_exactly():
    source = ReasoningGymSource("spell_backward", seed=0, size=100_000, prompt="{word}>")
    batches = stream(source, batch_size=4, seed=0)
    take(batches, 3)
    state = batches.get_state()
    expected = next(batches)
    again = stream(source, batch_size=4, seed=0)
    again.set_state(state)
    assert next(again) == expected


def test_a_state_may_be_restored_with_another_batch_size():
    batches = stream(SOURCE, batch_size=6, seed=5)
    take(batches, 2)
    larger = stream(SOURCE, batch_size=12, seed=5)
    larger.set_state(batches.get_state())
    assert take(larger, 1)[0] == joined(take(batches, 2))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (SOURCE, {"seed": 1}, "seed was 0 and is 1"),
        (SOURCE[:30], {"seed": 0}, "length was 40 and is 30"),
        (SOURCE, {"seed": 0, "shuffle": False}, "shuffle was True and is False"),
    ],
)
def test_the_state_of_other_data_is_refused(source, options, message):
    state = stream(SOURCE, batch_size=4, seed=0).get_state()
    with pytest.raises(ValueError, match=message):
        stream(source, batch_size=4, **options).set_state(state)


@pytest.mark.parametrize("damage", [{"items": 3}, {"items": {"next_index": -1}}, {"items": {}}, {"kept": None}])
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    batches = stream(SOURCE, batch_size=4, seed=0)
    expected = take(batches, 3)[2]
    other = stream(SOURCE, batch_size=4, seed=0)
    take(other, 2)
    with pytest.raises(ValueError, match="damaged"):
        other.set_state({**batches.get_state(), **damage})
    assert take(other, 1)[0] == expected


def test_something_that_is_no_state_is_refused():
    with pytest.raises(ValueError, match="not the state of a problem stream"):
        stream(SOURCE, batch_size=4, seed=0).set_state({"step": 3})


def test_excluded_and_filtered_problems_are_stepped_over_and_counted():
    batches = stream(
        SOURCE, batch_size=10, seed=0, shuffle=False, exclude={"2", "7"}, keep=lambda problem: problem["answer"] != 5
    )
    assert take(batches, 1)[0] == ["0", "1", "3", "4", "6", "8", "9", "10", "11", "12"]
    assert batches.counts == {"kept": 10, "filtered": 1, "excluded": 2}


def test_long_prompts_are_filtered_or_an_error_as_asked():
    tokenizer = CharTokenizer("0123456789")
    batches = stream(SOURCE, batch_size=10, seed=0, shuffle=False, keep=prompt_fits(tokenizer, 1))
    assert take(batches, 2) == [[str(i) for i in range(10)]] * 2
    assert batches.counts["filtered"] == 30

    strict = stream(SOURCE, batch_size=6, seed=0, shuffle=False, keep=prompt_fits(tokenizer, 1, on_long_prompt="error"))
    take(strict, 1)
    state = strict.get_state()
    with pytest.raises(ValueError, match=r"prompt '10' has 2 tokens, more than max_prompt_length=1; raise the limit"):
        next(strict)
    assert strict.get_state() == state
    with pytest.raises(ValueError, match="prompt '10'"):  # the failed batch is tried again, not skipped
        next(strict)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, "filter"), "at least 1"), ((4, "drop"), "'filter' or 'error', got 'drop'")]
)
def test_prompt_fits_refuses_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_fits(CharTokenizer("a"), arguments[0], on_long_prompt=arguments[1])


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="the data set is empty"):
        stream([], batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"keep": lambda problem: False}, "raise the limit on prompt lengths"),
        ({"exclude": frozenset(prompts(SOURCE))}, r"the prompts of held-out problems \(data.eval_files\)"),
    ],
    ids=["filtered", "excluded"],
)
@pytest.mark.parametrize("repeat", [True, False])
def test_a_data_set_without_one_usable_problem_is_an_error_and_does_not_spin(options, remedy, repeat):
    batches = stream(SOURCE, batch_size=2, seed=0, repeat=repeat, **options)
    with pytest.raises(ValueError, match=rf"usable.*{remedy}" if repeat else "usable"):
        next(batches)


def test_a_single_usable_problem_is_always_found():
    batches = stream(SOURCE, batch_size=3, seed=0, keep=lambda problem: problem["answer"] == 17)
    assert take(batches, 2) == [["17"] * 3] * 2


def test_one_pass_ends_and_leaves_out_the_remainder():
    batches = stream(SOURCE, batch_size=12, seed=0, repeat=False)
    seen = [prompts(batch) for batch in batches]
    assert [len(batch) for batch in seen] == [12, 12, 12]
    assert len(set(joined(seen))) == 36
    assert next(batches, None) is None


def test_one_pass_over_less_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match="only 40 usable problems for a batch of 41"):
        next(stream(SOURCE, batch_size=41, seed=0, repeat=False))


def test_processes_together_make_the_batches_and_the_state_of_one():
    alone = stream(SOURCE, batch_size=6, seed=2, exclude={"1"})
    shares = [stream(SOURCE, batch_size=6, seed=2, exclude={"1"}, process_index=i, process_count=3) for i in range(3)]
    for _ in range(8):
        assert joined(prompts(next(share)) for share in shares) == prompts(next(alone))
    assert [share.get_state() for share in shares] == [alone.get_state()] * 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_files_reach_one_process_each_also_when_their_number_changes(suffix, tmp_path):
    rows = [{"prompt": f"{i}", "answer": "a"} for i in range(24)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)

    def shares(count):
        options = {"batch_size": 4, "seed": 5, "process_count": count}
        return [stream(open_source(path), process_index=i, **options) for i in range(count)]

    four = shares(4)
    first = [[prompts(next(share)) for share in four] for _ in range(3)]
    two = shares(2)
    for share in two:
        share.set_state(json.loads(json.dumps(four[-1].get_state())))
    second = [[prompts(next(share)) for share in two] for _ in range(3)]
    assert [len(rows) for step in first + second for rows in step] == [1] * 12 + [2] * 6
    seen = [prompt for step in first + second for rows in step for prompt in rows]
    assert sorted(seen, key=int) == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "positive multiple of process_count"),
        ({"batch_size": 4, "process_count": 3}, "positive multiple of process_count"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, r"process_index must be in 0\.\.1, got 2"),
        ({"batch_size": 4, "seed": -1}, "seed must be at least 0"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stream(SOURCE, **{"seed": 0, **options})

"""Problems from files: mapped columns, malformed rows, and streams over them."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxrl_post.data import JsonlSource, open_source, stream


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def lines(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def table(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


# columns


def test_lines_of_several_files_become_problems_with_all_their_columns(tmp_path):
    first = write(tmp_path / "a.jsonl", '\ufeff{"q": "1+1", "a": 2, "level": 3}\n\n')
    second = write(tmp_path / "b.jsonl", '{"q": "Zwei\u2028", "a": [1, 2], "hint": "x"}')
    source = open_source([first, str(second)], columns={"prompt": "{q}=", "answer": "{a}"}, lowercase=True)
    assert source[0] == {"q": "1+1", "a": 2, "level": 3, "prompt": "1+1=", "answer": "2", "prompt_id": 0}
    assert source[1] == {
        "q": "Zwei\u2028",
        "a": [1, 2],
        "hint": "x",
        "prompt": "zwei\u2028=",
        "answer": "1,2",
        "prompt_id": 1,
    }
    assert len(source) == len(list(source)) == 2
    assert set(source.columns) == {"q", "a", "level", "hint", "prompt", "answer", "prompt_id"}


def test_lowercase_reaches_the_text_columns_of_a_file_and_refuses_messages(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question": "Q", "answer": "A", "note": "N"})
    assert open_source(path, lowercase=True)[0] == {
        "question": "Q",
        "answer": "a",
        "note": "N",
        "prompt": "q",
        "prompt_id": 0,
    }
    talk = lines(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: only text can be lower-cased"):
        open_source(talk, lowercase=True)


def test_columns_may_lie_deeper_in_a_row_and_make_any_kind(tmp_path):
    rows = [{"in": {"text": "hi", "good": "hello", "bad": "no"}}]
    pairs = {"prompt": "{in.text}", "chosen": "{in.good}!", "rejected": "{in.bad}"}
    source = open_source(table(tmp_path / "a.parquet", rows), columns=pairs)
    assert source[0] == {**rows[0], "prompt": "hi", "chosen": "hello!", "rejected": "no", "prompt_id": 0}
    assert source.row_type.kind == "preference"
    assert open_source(tmp_path / "a.parquet", columns=pairs, kind="prompt").row_type.kind == "prompt"


def test_a_field_alone_passes_on_messages_and_values_that_are_not_text(tmp_path):
    talk = [{"role": "user", "content": "Hi"}]
    path = lines(tmp_path / "a.jsonl", {"talk": talk, "said": "hello", "good": False, "n": [1, 2]})
    columns = {"prompt": "{talk}", "completion": "{said}", "label": "{good}", "numbers": "{n}", "joined": "{n:+}"}
    problem = open_source(path, columns=columns)[0]
    assert problem["prompt_messages"] == talk
    assert (problem["prompt"], problem["label"]) == ("Hi", False)
    assert (problem["numbers"], problem["joined"]) == ([1, 2], "1+2")
    assert problem["completion_messages"] == [{"role": "assistant", "content": "hello"}]


def test_verls_files_need_no_mapping(tmp_path):
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{n}+1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
            "extra_info": {"index": n},
        }
        for n in range(3)
    ]
    source = open_source(table(tmp_path / "train.parquet", rows), require=("answer",))
    assert str(source.row_type).startswith("verl's prompts with a ground truth")
    assert [(problem["prompt"], problem["answer"]) for problem in source] == [
        ("0+1?", "1"),
        ("1+1?", "2"),
        ("2+1?", "3"),
    ]
    assert source[2]["extra_info"] == {"index": 2}


def test_changing_a_problem_does_not_change_the_source(tmp_path):
    source = open_source(lines(tmp_path / "a.jsonl", {"prompt": "p"}))
    source[0]["prompt"] = "changed"
    assert source[0]["prompt"] == "p"
    with pytest.raises(IndexError):
        source[1]


# malformed rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bad.jsonl is empty"),
        ("\n  \n", r"bad.jsonl is empty"),
        ('{"prompt": "a"}\n{"prompt": ', r"bad.jsonl, line 2: not valid JSON \(Expecting value, column 12\)"),
        ('{"prompt": "a"}\n\n[1]', r"bad.jsonl, line 3: expected a JSON object .* got list"),
        ('{"prompt": "a"}\n{"text": "b"}', r"bad.jsonl, line 2: column 'prompt' is missing; the columns are text"),
        ('{"prompt": "a"}\n{"prompt": 3}', r"bad.jsonl, line 2: column 'prompt' must be text .* got int 3"),
        ('{"prompt": "a", "prompt_id": 3}', r"bad.jsonl, line 1: the column 'prompt_id' is set by the library"),
        ("[" * 100_000, r"bad.jsonl, line 1: not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_line_is_named_with_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        open_source(write(tmp_path / "bad.jsonl", text))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: not UTF-8 text \(invalid start byte, byte 0"):
        open_source(tmp_path / "bad.jsonl")


def test_a_malformed_row_of_a_table_is_named_with_file_and_row(tmp_path):
    path = table(tmp_path / "bad.parquet", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"bad.parquet, row 1 \(counted from 0\): column 'prompt' is null"):
        open_source(path)


def test_a_field_that_is_missing_or_null_is_named_with_the_columns_there_are(tmp_path):
    path = lines(tmp_path / "bad.jsonl", {"q": "a", "a": None})
    with pytest.raises(ValueError, match=r"line 1: the prompt template '\{p\}' cannot be filled .*its keys are a, q"):
        open_source(path, columns={"prompt": "{p}"})
    with pytest.raises(ValueError, match=r"line 1: the answer template '\{a\}' cannot be filled .*'a' is null"):
        open_source(path, columns={"prompt": "{q}", "answer": "{a}"})


def test_a_column_that_is_needed_must_be_there_as_text(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": 1}, {"prompt": "b"})
    with pytest.raises(ValueError, match=r"line 2: column 'answer' is missing; the columns are prompt; make it by"):
        open_source(path, require=("answer",))
    assert len(open_source(path)) == 2
    with pytest.raises(ValueError, match=r"line 1: column 'answer' is not text but \['x'\]"):
        open_source(lines(tmp_path / "b.jsonl", {"prompt": "a", "answer": ["x"]}), require=("answer",))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_malformed_rows_are_left_out_and_counted_where_asked(tmp_path, suffix):
    rows = [{"prompt": None}, *({"prompt": f"p{n}"} for n in range(3)), {"prompt": ""}, {"prompt": "p3"}]
    path = (lines(tmp_path / "a.jsonl", *rows)) if suffix == "jsonl" else table(tmp_path / "a.parquet", rows)
    source = open_source(path, on_bad_row="skip")
    assert [(problem["prompt_id"], problem["prompt"]) for problem in source] == [(n, f"p{n}") for n in range(4)]
    assert source.skipped == 2
    places = (f"{path}, line 1:", f"{path}, line 5:")
    if suffix == "parquet":
        places = (f"{path}, row 0 (counted from 0):", f"{path}, row 4 (counted from 0):")
    assert all(message.startswith(place) for message, place in zip(source.bad_rows, places, strict=True))


def test_only_the_first_malformed_rows_are_told(tmp_path):
    source = open_source(write(tmp_path / "a.jsonl", "{\n" * 30 + '{"prompt": "p"}'), on_bad_row="skip")
    assert (len(source), source.skipped, len(source.bad_rows)) == (1, 30, 10)


def test_a_file_of_malformed_rows_only_is_an_error_even_then(tmp_path):
    with pytest.raises(ValueError, match=r"all 2 rows are malformed; the first is .*a.jsonl, line 1: no known kind"):
        open_source(write(tmp_path / "a.jsonl", '{"x": 1}\n{'), on_bad_row="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "drop"}, "on_bad_row must be 'error' or 'skip', got 'drop'"),
        ({"columns": {"prompt_id": "{n}"}}, "'prompt_id' is set by the library"),
        ({"kind": "pairs"}, "kind must be one of"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(lines(tmp_path / "a.jsonl", {"prompt": "p"}), **options)


def test_a_file_that_changed_after_it_was_opened_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "two"})
    source = open_source(path)
    write(path, "something else")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*; the file was in order when it was opened"):
        source[1]


# streams


@pytest.fixture(params=["jsonl", "parquet"])
def numbered(request, tmp_path):
    rows = [{"prompt": f"p{n}", "n": n} for n in range(30)]
    if request.param == "jsonl":
        lines(tmp_path / "a.jsonl", *rows[:13])
        write(tmp_path / "b.jsonl", "{\n" + "".join(json.dumps(row) + "\n" for row in rows[13:]))
        return open_source(f"{tmp_path}/*.jsonl", on_bad_row="skip")
    table(tmp_path / "a.parquet", rows[:13])
    return open_source([tmp_path / "a.parquet", table(tmp_path / "b.parquet", rows[13:])])


def test_an_epoch_over_files_holds_every_row_once(numbered):
    batches = stream(numbered, batch_size=10, seed=1)
    seen = [problem["n"] for _ in range(3) for problem in next(batches)]
    assert sorted(seen) == list(range(30)) != seen


def test_a_stream_over_files_resumes_with_the_rows_that_were_left(numbered):
    whole = stream(numbered, batch_size=4, seed=1, exclude={"p7"})
    for _ in range(5):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [next(whole) for _ in range(6)]
    again = stream(numbered, batch_size=4, seed=1, exclude={"p7"})
    again.set_state(state)
    assert [next(again) for _ in range(6)] == expected


def test_two_hosts_see_different_rows_and_together_all(numbered):
    hosts = [stream(numbered, batch_size=10, seed=1, process_index=i, process_count=2) for i in range(2)]
    seen = [{problem["n"] for _ in range(3) for problem in next(host)} for host in hosts]
    assert [len(rows) for rows in seen] == [15, 15]
    assert seen[0] | seen[1] == set(range(30))


# the source of earlier configurations


def test_the_jsonl_source_takes_templates_by_name_and_any_suffix(tmp_path):
    path = lines(tmp_path / "pairs.txt", {"prompt": "hi", "good": "hello", "bad": "no"})
    source = JsonlSource([path], chosen="{good}!", rejected="{bad}")
    assert (source[0]["chosen"], source[0]["rejected"], "answer" in source[0]) == ("hello!", "no", False)
    with pytest.raises(ValueError, match="at least one JSONL file"):
        JsonlSource([])
    with pytest.raises(ValueError, match=r"pairs.txt, line 1: the answer template '\{answer\}' cannot be filled"):
        JsonlSource(path, answer="{answer}")

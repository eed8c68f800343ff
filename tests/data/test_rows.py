"""Rows by number out of files of every format, and directories of them."""

import datetime
import json
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from jaxrl_post.data import ArrowRows, JsonlRows, open_rows, open_source

ROWS = [{"prompt": f"{n}+1=", "level": n, "tags": [{"a": n}]} for n in range(700)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def stream_file(path, rows):
    table = pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return path


def arrow_file(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return path


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def feather(path, rows):
    pa.feather.write_feather(pa.Table.from_pylist(rows), str(path), compression="lz4")
    return path


WRITERS = {
    "a.jsonl": jsonl,
    "a.json": jsonl,
    "a.parquet": lambda path, rows: parquet(path, rows, row_group_size=200),
    "a.arrow": arrow_file,
    "b.arrow": stream_file,
    "a.feather": feather,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_that_were_written_in_any_order(tmp_path, name):
    rows = open_rows(WRITERS[name](tmp_path / name, ROWS))
    assert len(rows) == 700
    for index in (699, 0, 299, 300, 301, 600):
        assert rows.read(index) == ROWS[index]
    assert list(rows.scan()) == ROWS


def test_dictionaries_that_differ_between_row_groups_are_read(tmp_path):
    table = pa.concat_tables(
        pa.table({"prompt": pa.array([word, word], pa.string()).dictionary_encode()}) for word in ("one", "two")
    )
    with pa.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for start in (0, 2):
            writer.write_table(table.slice(start, 2))
    assert [row["prompt"] for row in open_rows(tmp_path / "a.parquet").scan()] == ["one", "one", "two", "two"]


def test_the_copy_of_a_parquet_file_does_not_stay(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    rows = ArrowRows(parquet(tmp_path / "a.parquet", ROWS))
    assert list(scratch.iterdir()) == []
    assert rows.read(650) == ROWS[650]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_times_of_nanoseconds_are_cut_to_what_python_can_say(tmp_path, name):
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC"))
    table, path = pa.table({"time": times, "prompt": ["a", "b"]}), tmp_path / name
    if name == "a.parquet":
        pa.parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    rows = ArrowRows(path)
    assert rows.read(0)["time"] == datetime.datetime(2023, 11, 14, 22, 13, 20, 123456, datetime.UTC)
    assert rows.read(1) == {"time": None, "prompt": "b"}


def test_lines_end_at_newlines_only_and_blank_ones_and_the_byte_order_mark_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"q": "Zwei\u2028"}\r\n\n  \n{"q": "\x85"}'.encode())
    rows = JsonlRows(path)
    assert [rows.read(i) for i in range(len(rows))] == [{"q": "Zwei\u2028"}, {"q": "\x85"}] == list(rows.scan())
    assert [rows.where(i) for i in (0, 1)] == [f"{path}, line 1", f"{path}, line 4"]


def test_rows_of_several_files_follow_each_other_and_know_their_place(tmp_path):
    paths = [jsonl(tmp_path / "b.jsonl", ROWS[:2]), parquet(tmp_path / "a.parquet", ROWS[2:5])]
    rows = open_rows(paths)
    assert [rows.read(i) for i in range(5)] == ROWS[:5]
    assert rows.where(1) == f"{paths[0]}, line 2"
    assert rows.where(4) == f"{paths[1]}, row 2 (counted from 0)"


def test_a_pattern_stands_for_its_files_in_alphabetical_order(tmp_path):
    for name in ("c/2", "b/10", "b/1"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    assert [row["prompt"] for row in open_rows(f"{tmp_path}/**/*.jsonl").scan()] == ["b/1", "b/10", "c/2"]
    odd = jsonl(tmp_path / "[1].jsonl", [{"prompt": "literal"}])
    assert open_rows(odd).read(0) == {"prompt": "literal"}


def saved(directory, rows, shards=2):
    """What `datasets.Dataset.save_to_disk` writes."""
    names = [f"data-{shard:05}-of-{shards:05}.arrow" for shard in range(shards)]
    size = -(-len(rows) // shards)
    for shard, name in enumerate(names):
        stream_file(directory / name, rows[shard * size : (shard + 1) * size])
    write(directory / "dataset_info.json", "{}")
    write(directory / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return directory


def test_a_saved_data_set_is_read_in_the_order_of_its_shards(tmp_path):
    assert list(open_rows(saved(tmp_path / "saved", ROWS, shards=3)).scan()) == ROWS


def test_a_saved_dictionary_of_data_sets_needs_the_name_of_a_split(tmp_path):
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    saved(tmp_path / "train", ROWS[:6])
    saved(tmp_path / "test", ROWS[6:9])
    assert list(open_rows(tmp_path, split="test").scan()) == ROWS[6:9] == list(open_rows(tmp_path / "test").scan())
    with pytest.raises(ValueError, match="holds the splits train, test: one must be named"):
        open_rows(tmp_path)
    with pytest.raises(ValueError, match="holds the splits train, test: there is no 'dev'"):
        open_rows(tmp_path, split="dev")


def test_a_saved_dictionary_of_one_split_needs_no_name(tmp_path):
    write(tmp_path / "dataset_dict.json", '{"splits": ["train"]}')
    saved(tmp_path / "train", ROWS[:3])
    assert list(open_rows(tmp_path).scan()) == ROWS[:3]


def test_a_repository_of_a_data_set_has_splits_in_the_names_of_its_files(tmp_path):
    write(tmp_path / "README.md", "about")
    parquet(tmp_path / "data/train-00001-of-00002.parquet", ROWS[3:6])
    parquet(tmp_path / "data/train-00000-of-00002.parquet", ROWS[:3])
    parquet(tmp_path / "data/test-00000-of-00001.parquet", ROWS[6:])
    assert list(open_rows(tmp_path, split="train").scan()) == ROWS[:6]
    with pytest.raises(ValueError, match="splits test, train: one must be named"):
        open_rows(tmp_path)


def test_a_directory_of_files_without_splits_is_read_whole(tmp_path):
    jsonl(tmp_path / "b.jsonl", ROWS[2:4])
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    assert list(open_rows(tmp_path).scan()) == ROWS[:4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "gone.jsonl cannot be read: No such file"),
        ("gone.parquet", "gone.parquet cannot be read: No such file"),
        ("gone.arrow", "gone.arrow cannot be read: No such file"),
        ("a.csv", r"a.csv has a suffix that says no known format; known are .jsonl.* .parquet.* .arrow"),
        ("a.jsonl.gz", r"\(unpack it first\)"),
        ("*.jsonl", r"no data file matches '.*\*.jsonl'"),
        ("", "holds no data: expected what datasets' save_to_disk writes"),
    ],
)
def test_what_is_not_there_or_not_known_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        open_rows(f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match="at least one data file"):
        open_rows([])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
def test_a_file_cut_in_the_middle_is_named(tmp_path, name):
    path = WRITERS[name](tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*; is it damaged"):
        open_rows(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
def test_a_table_without_rows_is_refused(tmp_path, name):
    writers = {"a.parquet": pa.parquet.write_table, "a.arrow": pa.feather.write_feather}
    table = pa.table({"prompt": pa.array([], pa.string())})
    if name in writers:
        writers[name](table, str(tmp_path / name))
    else:
        pa.ipc.new_stream(str(tmp_path / name), table.schema).close()
    with pytest.raises(ValueError, match="is empty: it holds no rows"):
        open_rows(tmp_path / name)


def test_a_split_of_what_has_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"split='train' chooses a part of a directory, but .*a.jsonl' is none"):
        open_rows(jsonl(tmp_path / "a.jsonl", ROWS[:1]), split="train")
    with pytest.raises(ValueError, match=r"split='train', but .*saved holds one data set without splits"):
        open_rows(saved(tmp_path / "saved", ROWS[:2]), split="train")


def test_a_damaged_description_of_a_saved_data_set_is_named(tmp_path):
    write(tmp_path / "state.json", "{")
    with pytest.raises(ValueError, match=r"state.json cannot be read as JSON"):
        open_rows(tmp_path)
    write(tmp_path / "state.json", '{"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{}]}')
    with pytest.raises(ValueError, match="load and save it again"):
        open_rows(tmp_path)


def test_without_pyarrow_jsonl_works_and_the_rest_says_what_to_install(tmp_path, monkeypatch):
    lines, table = jsonl(tmp_path / "a.jsonl", ROWS[:1]), parquet(tmp_path / "a.parquet", ROWS[:1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(open_rows(lines)) == 1
    with pytest.raises(ImportError, match=r'a.parquet needs pyarrow: pip install "jaxrl-post\[parquet\]"'):
        open_rows(table)


def test_fifty_thousand_lines_are_not_kept_in_memory(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(f'{{"prompt": "{n:0200}"}}\n' for n in range(50_000)))
    tracemalloc.start()
    source = open_source(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source[49_999]["prompt"] == f"{49_999:0200}"
    assert path.stat().st_size > 10e6
    assert kept < 3e6  # the index


def test_a_large_parquet_file_is_not_kept_in_memory(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"prompt": f"{n:01000}"} for n in range(10_000)])
    before = pa.total_allocated_bytes()
    source = open_source(path)
    assert source[9_999]["prompt"] == f"{9_999:01000}"
    assert pa.total_allocated_bytes() - before < 2e6  # of 10


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_file_may_be_one_array(mark, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(mark + json.dumps([{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(3)], indent=2))
    source = open_source(path)
    source[1]["answer"] = "changed"
    assert [source[n]["answer"] for n in range(3)] == ["1", "2", "3"]
    lines = tmp_path / "lines.json"
    lines.write_text('{"prompt": "9+1=", "answer": "10"}\n')
    assert [row["prompt"] for row in open_rows([path, lines]).scan()] == ["0+1=", "1+1=", "2+1=", "9+1="]


def test_an_array_with_rows_that_are_no_objects_names_them_and_a_broken_one_its_place(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('[{"prompt": "a"}, 3]')
    with pytest.raises(ValueError, match=r"pairs.json, row 1 \(counted from 0\).*got int"):
        open_source(path)
    assert len(open_source(path, on_bad_row="skip")) == 1
    path.write_text('[{"prompt": "a"},\n {"prompt": "b"')
    with pytest.raises(ValueError, match=r"pairs.json begins as a JSON array, but cannot be read \(.*line 2"):
        open_rows(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"pairs.json is empty"):
        open_rows(path)

"""Characters and `transformers` tokenizers behind one protocol."""

import json
import sys

import pytest

from jaxrl_post.data import PRINTABLE, CharTokenizer, HFTokenizer, encode_completion, encode_prompt, load_tokenizer


@pytest.fixture
def fast():
    """A word-level tokenizer of four words, without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "one": 2, "two": 3, "<stop>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")


def test_ids_are_pad_end_then_the_characters_in_order():
    tokenizer = CharTokenizer("ba")
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1,), 4)
    assert tokenizer.encode("abba") == [3, 2, 2, 3]


def test_every_character_of_the_default_alphabet_survives_a_round_trip():
    tokenizer = CharTokenizer()
    assert len(PRINTABLE) == 96
    assert tokenizer.decode(tokenizer.encode(PRINTABLE)) == PRINTABLE


def test_decode_drops_the_end_but_shows_a_pad_that_was_sampled():
    assert CharTokenizer("ab").decode([2, 1, 3, 1]) == "ab"
    assert CharTokenizer("ab").decode([2, 0, 1]) == "a\ufffd"


def test_encode_names_the_character_and_its_position():
    with pytest.raises(ValueError, match=r"character 'x' at position 2 of 'abx'.*add it to the alphabet"):
        CharTokenizer("ab").encode("abx")


def test_encode_points_out_that_only_the_case_is_wrong():
    with pytest.raises(ValueError, match=r"does have 'a'.*lower-cased"):
        CharTokenizer("ab").encode("bA")


@pytest.mark.parametrize("token", [-1, 4])
def test_decode_refuses_an_id_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=rf"token id {token} is outside 0\.\.3"):
        CharTokenizer("ab").decode([token])


@pytest.mark.parametrize(("alphabet", "message"), [("", "at least one"), ("abca", r"repeats \['a'\]")])
def test_an_alphabet_that_is_empty_or_repeats_is_refused(alphabet, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(alphabet)


def test_a_saved_character_tokenizer_is_recognised_and_equal(tmp_path):
    CharTokenizer("zyé\n").save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert isinstance(loaded, CharTokenizer)
    assert loaded.alphabet == "zyé\n"
    assert not list((tmp_path / "new" / "folder").glob("*partial"))


def test_a_saved_character_tokenizer_is_one_of_transformers_too(tmp_path):
    ours = CharTokenizer("abpd <>\n\té\u200d2")
    ours.save(tmp_path)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a  b", "<a>\n\t", " é\u200d22 ", "<pad", ""):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode([*ids, *ours.eos_ids], skip_special_tokens=True) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    assert len(theirs) == ours.vocab_size
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("c")


@pytest.mark.parametrize("text", ["", '{"alphabet": ', "[1]", '{"letters": "ab"}', '{"alphabet": "aa"}'])
def test_a_damaged_character_tokenizer_is_named(tmp_path, text):
    (tmp_path / "char_tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"char_tokenizer.json is damaged"):
        load_tokenizer(tmp_path)


def test_character_load_from_a_directory_without_one_says_so(tmp_path):
    with pytest.raises(ValueError, match="no character tokenizer in"):
        CharTokenizer.load(tmp_path)


def test_a_missing_tokenizer_directory_is_named():
    with pytest.raises(ValueError, match=r"'./no/such/folder' must be a directory or a hub id"):
        load_tokenizer("./no/such/folder")


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer could be loaded from the directory"):
        load_tokenizer(tmp_path)


def test_a_transformers_tokenizer_adds_nothing_and_pads_with_its_stop_token(fast):
    tokenizer = HFTokenizer(fast)
    assert tokenizer.encode("one two") == [2, 3]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_ids) == (5, 1, (1,))
    assert tokenizer.decode([2, 3, 1, 1]) == "one two"


def test_a_plain_prompt_begins_as_the_tokenizer_begins_a_text_and_nothing_else_does(fast):
    from tokenizers.processors import TemplateProcessing

    plain = HFTokenizer(fast)
    assert plain.prefix_ids == ()
    assert encode_prompt(plain, {"prompt": "one two"}) == [2, 3]
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 4), ("<end>", 1)]
    )
    tokenizer = HFTokenizer(fast)
    assert tokenizer.tokenizer.encode("one two") == [4, 2, 3, 1]
    assert tokenizer.prefix_ids == (4,)
    assert tokenizer.encode("one two") == [2, 3]
    problem = {"prompt": "one two", "answer": "two"}
    assert encode_prompt(tokenizer, problem) == [4, 2, 3]
    assert encode_completion(tokenizer, problem, "answer") == [3, 1]
    start = fast.convert_ids_to_tokens(4)
    assert encode_prompt(tokenizer, {"prompt": f"{start} one"}) == [4, 2]  # written out, it does not come twice


def test_a_pad_token_of_the_tokenizer_is_kept(fast):
    fast.pad_token = "<unk>"
    assert HFTokenizer(fast).pad_id == 0


def test_stop_tokens_of_the_generation_config_come_after_the_tokenizers_own(fast, tmp_path):
    fast.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, HFTokenizer)
    assert loaded.eos_ids == (1, 4)
    assert loaded.decode([2, 4]) == "one"


@pytest.mark.parametrize("config", [{"eos_token_id": [1, 4]}, {"text_config": {"eos_token_id": 4}}])
def test_stop_tokens_of_a_model_without_a_generation_config_are_those_of_its_config(fast, tmp_path, config):
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    assert load_tokenizer(tmp_path).eos_ids == (1, 4)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load_tokenizer(tmp_path).eos_ids == (1,)


def test_a_vocabulary_that_leaves_ids_out_is_as_large_as_its_largest_id():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 2, "<end>": 9}, unk_token="<unk>"))
    inner = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    assert len(inner) == 3
    assert HFTokenizer(inner).vocab_size == 10


def test_a_saved_transformers_tokenizer_keeps_its_stop_tokens(fast, tmp_path):
    HFTokenizer(fast, eos_ids=[4]).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_ids == (1, 4)
    assert loaded.encode("two one") == [3, 2]


def test_saving_leaves_a_models_generation_config_alone(fast, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4, "top_k": 7}')
    HFTokenizer(fast).save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 4, "top_k": 7}


def test_a_tokenizer_without_any_stop_token_is_refused(fast):
    fast.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        HFTokenizer(fast)


def test_without_transformers_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        load_tokenizer(tmp_path)

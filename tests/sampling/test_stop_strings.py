"""Stop strings against Python's own search in the text, for vocabularies of many kinds."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import data
from jaxrl_post.sampling import StopStrings, stop_strings


def ends(machine, tokens):
    """Whether a text has come up in each of the tokens."""
    return np.asarray(jax.lax.scan(machine.read, jnp.zeros((), jnp.int32), jnp.asarray(tokens, jnp.int32))[1]).tolist()


def expected(texts, pieces):
    """The same, by looking for the texts in all that was said: a text comes up in the token that has its last byte."""
    said, found = b"", []
    for piece in pieces:
        before, said = len(said), said + piece
        places = (end for text in texts for end in range(before + 1, len(said) + 1) if said[:end].endswith(text))
        found.append(any(True for _ in places))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_texts_are_found_wherever_tokens_begin_and_end(seed):
    draw = random.Random(seed)
    letters = "ab"
    vocabulary = [b""] + [bytes(draw.choices(letters.encode(), k=draw.randint(1, 5))) for _ in range(12)] + [b"a", b"b"]
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(3)]
    machine = stop_strings(texts, vocabulary)
    tokens = draw.choices(range(len(vocabulary)), k=60)
    found = ends(machine, tokens)
    assert found == expected([text.encode() for text in texts], [vocabulary[token] for token in tokens])
    assert len(set(found)) == 2 or seed  # the first seed has both


def test_a_text_in_other_letters_and_tokens_that_nobody_knows():
    text = "né→"
    vocabulary = [bytes([byte]) for byte in text.encode()] + [b"x" + text.encode()[:2]]
    machine = stop_strings([text], vocabulary)
    assert ends(machine, [0, 1, 2, 3, 4, 5]) == [False] * 5 + [True]
    assert ends(machine, [6, 2, 3, 4, 5]) == [False] * 4 + [True]
    # Of a token beyond the vocabulary, as models have some whose tokenizer is smaller, it is not known what it says.
    assert not any(ends(machine, [6, 99, 2, 3, 4, 5]))


def test_what_can_never_come_up_is_refused():
    for texts in ((), [""], ["a", ""], "a"):
        with pytest.raises(ValueError, match="must be a list of texts, none of them empty"):
            stop_strings(texts, [b"a"])
    with pytest.raises(ValueError, match=r"'ab' can never come up: no token of the vocabulary has the byte 98 \('b'\)"):
        stop_strings(["ab"], [b"a", b""])


def test_machines_are_equal_where_they_do_the_same():
    one, same, other = (stop_strings([text], [b"a", b"b"]) for text in ("ab", "ab", "ba"))
    assert one == same
    assert hash(one) == hash(same)
    assert repr(one) == repr(same) != repr(other)
    assert one != other
    assert one != StopStrings(one.table[:, :1])


CORPUS = ["spelling backwards <answer>tac</answer>\n", "naïve café → <b>42</b>  x", "def f(x):\n    return x"] * 3


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return fast


def spaced():
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    fast = Tokenizer(models.BPE(byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [f"<0x{byte:02X}>" for byte in range(256)]
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    return fast


def metaspace():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return fast


def word_piece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.decoder = decoders.WordPiece(cleanup=False)
    fast.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"]))
    return fast


@pytest.mark.parametrize("made", [byte_level, spaced, metaspace, word_piece])
def test_bytes_of_tokens_make_up_the_text_of_every_kind_of_tokenizer(made):
    from transformers import PreTrainedTokenizerFast

    inner = PreTrainedTokenizerFast(tokenizer_object=made(), eos_token="<|end|>", clean_up_tokenization_spaces=False)
    inner.add_tokens(["<tool>"])
    tokenizer = data.HFTokenizer(inner)
    pieces = data.token_bytes(tokenizer)
    assert len(pieces) == tokenizer.vocab_size
    for text in (*CORPUS, "call<tool>x<|end|>"):
        # Behind a first token, since some tokenizers begin a text in a way of their own.
        ids = tokenizer.encode(text)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        whole = inner.decode(ids, **options)
        assert b"".join(pieces[token] for token in ids).decode().strip() == whole.strip()
    assert [pieces[tokenizer.encode(text)[-1]].strip() for text in ("<tool>", "<|end|>")] == [b"<tool>", b"<|end|>"]


def test_a_tokenizer_of_ones_own_needs_no_more_than_to_decode():
    class Words:
        vocab_size, pad_id, eos_ids = 4, 0, (1,)

        def decode(self, ids):
            return " ".join(["", "", "stop", "it"][token] for token in ids if token > 1)

    assert data.token_bytes(Words()) == [b"", b"", b" stop", b" it"]
    assert data.token_bytes(data.CharTokenizer("a<"))[1:] == [b"", b"a", b"<"]

"""What each token of a vocabulary adds to a text."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from jaxrl_post.data.tokenizer import HFTokenizer, Tokenizer

_SPACED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
"""Decoders of tokenizers that write a space as U+2581, as SentencePiece does."""


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The UTF-8 bytes of each token in the middle of a text; a token may hold a part of a character.

    Special tokens of `transformers` are written out, as in `<|im_end|>`; of other tokenizers they are what `decode`
    makes of them.

    Args:
        tokenizer: any.

    Returns:
        As many as `vocab_size`.

    Example:
        >>> from jaxrl_post.data import CharTokenizer
        >>> token_bytes(CharTokenizer("ab"))[1:]
        [b'', b'a', b'b']
    """
    if not isinstance(tokenizer, HFTokenizer):
        return _by_decoding(tokenizer.vocab_size, tokenizer.decode)
    inner = tokenizer.tokenizer
    kinds = _decoders(inner)
    if kinds == {"ByteLevel"}:
        read = _of_byte_level
    elif kinds and kinds <= _SPACED:
        read = functools.partial(_of_spaced, bytes_apart="ByteFallback" in kinds)
    else:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return _by_decoding(tokenizer.vocab_size, lambda ids: inner.decode(list(ids), **options))
    found = [
        b"" if piece is None else read(piece)
        for piece in inner.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
    ]
    for number, token in inner.added_tokens_decoder.items():
        if number < len(found):
            found[number] = token.content.encode()
    return found


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of a tokenizer's decoders; empty where that is not known."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _of_byte_level(piece: str) -> bytes:
    """A piece in which each character stands for a byte, as GPT-2's tokenizer writes them."""
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:  # a token that was added as text
        return piece.encode()


def _of_spaced(piece: str, *, bytes_apart: bool) -> bytes:
    if bytes_apart and (found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)):
        return bytes([int(found[1], 16)])
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _by_decoding(size: int, decode: Callable[[Iterable[int]], str]) -> list[bytes]:
    """What a text grows by with each token, behind one that is no special case."""
    before = next((number for number in range(size) if decode([number]).strip().isalnum()), 0)
    start = len(decode([before]))
    return [decode([before, number])[start:].encode() for number in range(size)]


def _byte_alphabet() -> dict[str, int]:
    """The character of each byte: itself where it can be seen, else the next one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()

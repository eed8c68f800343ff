"""Text to token ids and back.

The rest of the library asks of a tokenizer only what the `Tokenizer` protocol lists. Two kinds are here: single
characters, which need no download, and whatever `transformers` can load. Padding and masks are not made here: lengths
are the only truth about padding, so a pad id may coincide with a stop token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PRINTABLE = "".join(chr(code) for code in range(32, 127)) + "\n"
"""The alphabet of printable ASCII, space included, and newline."""

_CHAR_FILE = "char_tokenizer.json"
_PAD, _END = "<pad>", "<end>"  # as other tokenizers know them
_GENERATION_FILE = "generation_config.json"


class Tokenizer(Protocol):
    """What the library needs of a tokenizer.

    Attributes:
        vocab_size: number of token ids; ids are `0 .. vocab_size - 1`.
        pad_id: the id that fills unused positions. It may also be a stop token: masks come from lengths, not from ids.
        eos_ids: the ids that end a sequence, at least one; the first is the one appended to worked examples.
    """

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    @property
    def pad_id(self) -> int: ...  # noqa: D102

    @property
    def eos_ids(self) -> tuple[int, ...]: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no start or end token added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens of a sequence, without padding; an end-of-sequence token gives nothing."""
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write files into `directory` from which `load_tokenizer` makes an equal tokenizer."""
        ...


class CharTokenizer:
    """One token per character: id 0 pads, id 1 ends a sequence, `alphabet[i]` has id `i + 2`.

    Args:
        alphabet: the characters, each once; its order gives the ids.

    Raises:
        ValueError: if the alphabet is empty or repeats a character.

    Example:
        >>> tokenizer = CharTokenizer("ab>")
        >>> tokenizer.encode("ba>")
        [3, 2, 4]
        >>> tokenizer.decode([3, 2, 4, 1])
        'ba>'
    """

    pad_id: int = 0
    eos_ids: tuple[int, ...] = (1,)

    def __init__(self, alphabet: str = PRINTABLE):
        if not alphabet:
            raise ValueError("alphabet must hold at least one character, got an empty string")
        repeated = sorted({character for character in alphabet if alphabet.count(character) > 1})
        if repeated:
            raise ValueError(f"alphabet must hold each character once, but repeats {repeated}; remove the repetitions")
        self.alphabet = alphabet
        self._ids = {character: index + 2 for index, character in enumerate(alphabet)}

    @property
    def vocab_size(self) -> int:
        """Characters of the alphabet, plus pad and end."""
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """One id per character.

        Args:
            text: characters of the alphabet only.

        Returns:
            As many ids as `text` has characters.

        Raises:
            ValueError: names the first character outside the alphabet and its position, counted from 0.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            position = next(i for i, character in enumerate(text) if character not in self._ids)
            character = text[position]
            hint = ""
            if character.swapcase() in self._ids:
                hint = f" (it does have {character.swapcase()!r}: should the data be lower-cased?)"
            raise ValueError(
                f"character {character!r} at position {position} of {_shorten(text)!r} is not in the alphabet of this "
                f"tokenizer{hint}; add it to the alphabet (data.alphabet of a run) or remove it from the data"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of `ids`; end (1) gives nothing, and pad (0) the replacement character U+FFFD.

        Padding has no place among the tokens of a sequence. A policy that samples the pad id must not be able to hide
        behind it: were it invisible, an answer filled up with it would look complete to every reward.

        Raises:
            ValueError: for an id outside `0 .. vocab_size - 1`.
        """
        characters = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is outside 0..{self.vocab_size - 1}; is the model's vocab_size another?"
                )
            if token == self.pad_id:
                characters.append("\N{REPLACEMENT CHARACTER}")
            elif token not in self.eos_ids:
                characters.append(self.alphabet[token - 2])
        return "".join(characters)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `char_tokenizer.json` into `directory`, which is made if it is not there, and the same for others.

        `tokenizer.json` and `tokenizer_config.json` are what `transformers.AutoTokenizer` and whoever serves the model
        read; `load` does not.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _PAD, "eos_token": _END}
        files = {
            "tokenizer.json": self._fast().to_str(pretty=True),
            "tokenizer_config.json": json.dumps({**config, "clean_up_tokenization_spaces": False}, indent=2),
            _CHAR_FILE: json.dumps({"alphabet": self.alphabet}),
        }
        for name, text in files.items():
            target = Path(directory) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Written beside and then renamed, so that a reader never sees half a file.
            partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, target)

    def _fast(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        # Without a token for what is unknown a character outside the alphabet is an error there too.
        fast = Tokenizer(models.WordLevel({_PAD: self.pad_id, _END: self.eos_ids[0], **self._ids}))
        fast.add_special_tokens([_PAD, _END])
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        fast.decoder = decoders.Fuse()
        return fast

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> CharTokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not there or is not what `save` writes.
        """
        path = Path(directory) / _CHAR_FILE
        try:
            return cls(json.loads(path.read_text(encoding="utf-8"))["alphabet"])
        except OSError as error:
            raise ValueError(f"no character tokenizer in {directory}: cannot read {path} ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} is damaged: expected {{"alphabet": "<characters>"}} ({error}); save the tokenizer again'
            ) from error

    def __repr__(self) -> str:
        return f"CharTokenizer(alphabet={self.alphabet!r})"


class HFTokenizer:
    """A tokenizer of `transformers` behind the `Tokenizer` protocol.

    `encode` adds nothing around a text: a chat template puts a start token where it wants one, and `encode_prompt`
    puts `prefix_ids` before a prompt of plain text. Every stop token of the tokenizer and of the generation config
    beside it counts as an end. Where there is no pad token, the first stop token pads; masks are made from lengths, so
    that changes no loss.

    Args:
        tokenizer: what `transformers.AutoTokenizer.from_pretrained` returned.
        eos_ids: stop tokens beside the tokenizer's own, e.g. those of a generation config.

    Raises:
        ValueError: if there is no stop token at all.

    Example:
        >>> from tokenizers import Tokenizer as Fast, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> fast = Fast(models.WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="no"))
        >>> tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>"))
        >>> tokenizer.encode("yes"), tokenizer.eos_ids, tokenizer.pad_id
        ([1], (0,), 0)
    """

    def __init__(self, tokenizer: Any, *, eos_ids: Iterable[int] = ()):
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        merged = tuple(dict.fromkeys([*own, *(int(token) for token in eos_ids)]))
        if not merged:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so no sequence could ever end; set its eos_token"
            )
        self.tokenizer = tokenizer
        self._eos_ids = merged
        self._pad_id = merged[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        text = "a"  # any: of an empty one nothing would part what stands before it from what stands behind
        bare = self.encode(text)
        around = list(tokenizer.encode(text, add_special_tokens=True))
        starts = (place for place in range(len(around)) if around[place : place + len(bare)] == bare)
        self._prefix_ids = tuple(around[: next(starts, 0)])
        # Not their number: some vocabularies leave ids out.
        self._vocab_size = 1 + max(tokenizer.get_vocab().values())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, tokens added after training included."""
        return self._vocab_size

    @property
    def media_ids(self) -> tuple[int, ...]:
        """The ids that stand for a piece of an image or of sound, which no text has."""
        found = (getattr(self.tokenizer, f"{kind}_token_id", None) for kind in ("image", "audio", "video"))
        return tuple(int(number) for number in found if number is not None)

    @property
    def pad_id(self) -> int:
        """The tokenizer's pad token, or its first stop token."""
        return self._pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's stop token first, then those of the generation config."""
        return self._eos_ids

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer by itself puts before a text: a start token, or nothing."""
        return self._prefix_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised, none is added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without pad, stop and other special tokens."""
        dropped = {self._pad_id, *self._eos_ids}
        kept = [token for token in map(int, ids) if token not in dropped]
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_text(self, token: int) -> str:
        """The text of one token, special tokens included."""
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **options: Any,
    ) -> str:
        """Messages as text, by the tokenizer's chat template.

        Args:
            messages: dicts with `role` and `content`.
            tools: descriptions of functions that may be called.
            add_generation_prompt: whether the beginning of the assistant's turn is added.
            continue_final_message: whether the last message is left open.
            **options: further variables of the template, e.g. `enable_thinking`.

        Returns:
            The text, whose special tokens `encode` recognises; a start token is in it if the template wants one.

        Raises:
            ImportError: if jinja2 is not installed.
            ValueError: if there is no chat template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the data holds messages, but the tokenizer has no chat template; take the tokenizer of a chat model, "
                "or set its chat_template (chat_template.jinja beside its files)"
            )
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **options,
            )
        except ImportError as error:
            raise ImportError("chat templates need jinja2: pip install jinja2") from error
        # Jinja's errors have no base in common with Python's own, and templates raise what they like.
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the chat template refuses the messages ({type(error).__name__}: {error}); their roles are {roles}"
            ) from error

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's own files, and a generation config with the stop tokens if there is none yet."""
        self.tokenizer.save_pretrained(str(directory))
        generation = Path(directory) / _GENERATION_FILE
        if not generation.exists():
            generation.write_text(json.dumps({"eos_token_id": list(self._eos_ids)}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> HFTokenizer:
        """Load a tokenizer from a directory or by its hub id (and a branch, tag or commit there).

        Raises:
            ImportError: if `transformers` is not installed.
            ValueError: if there is no such tokenizer, or it cannot be read.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(f"loading {path_or_id} needs transformers: pip install transformers") from error
        is_local = Path(path_or_id).is_dir()
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(path_or_id), local_files_only=is_local, revision=revision or "main"
            )
        except Exception as error:
            where = "directory" if is_local else "hub id"
            raise ValueError(
                f"no tokenizer could be loaded from the {where} {str(path_or_id)!r}: {_shorten(str(error), 300)}"
            ) from error
        return cls(tokenizer, eos_ids=_model_eos_ids(path_or_id, is_local, revision))


def load_tokenizer(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> CharTokenizer | HFTokenizer:
    """Load a tokenizer of either kind from a directory, or one of `transformers` by its hub id.

    Args:
        path_or_id: a directory that a tokenizer's `save` wrote, a directory with the files of a `transformers`
            tokenizer, or the id of one on the hub (`"owner/name"`).
        revision: branch, tag or commit on the hub; None for its main branch.

    Returns:
        A `CharTokenizer` if the directory holds one, otherwise an `HFTokenizer`.

    Raises:
        ValueError: if the directory is missing or holds no tokenizer, the hub id cannot be loaded, or a revision is
            given for a directory.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> CharTokenizer("abc").save(directory)
        >>> load_tokenizer(directory)
        CharTokenizer(alphabet='abc')
    """
    path = Path(path_or_id).expanduser()
    if revision is not None and path.is_dir():
        raise ValueError(f"revision {revision!r} does not apply: {path} is a directory; leave it out")
    if (path / _CHAR_FILE).is_file():
        return CharTokenizer.load(path)
    text = str(path_or_id)
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a path.
    is_path_like = text.startswith((".", "~", os.sep)) or text.endswith("/") or text.count("/") > 1
    if (is_path_like or path.is_file()) and not path.is_dir():
        raise ValueError(f"tokenizer {text!r} must be a directory or a hub id like 'owner/name'; no such directory")
    return HFTokenizer.load(path if path.is_dir() else path_or_id, revision=revision)


def _model_eos_ids(path_or_id: str | os.PathLike[str], is_local: bool, revision: str | None) -> tuple[int, ...]:
    """Stop tokens of the generation config, or of the model's where there is none, as `transformers` has them."""
    from transformers import GenerationConfig, PretrainedConfig

    where: dict[str, Any] = {"local_files_only": is_local, "revision": revision or "main"}
    name, eos = str(path_or_id), None
    if not is_local or (Path(path_or_id) / _GENERATION_FILE).is_file():
        try:
            eos = GenerationConfig.from_pretrained(name, **where).eos_token_id
        except OSError as error:
            if is_local:
                raise ValueError(f"{Path(path_or_id) / _GENERATION_FILE} cannot be read: {error}") from error
            # many models on the hub have none
    if eos is None and (not is_local or (Path(path_or_id) / "config.json").is_file()):
        try:
            config, _ = PretrainedConfig.get_config_dict(name, **where)
        except OSError:  # of a tokenizer alone
            config = {}
        eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    if eos is None:
        return ()
    return (int(eos),) if isinstance(eos, int) else tuple(int(token) for token in eos)


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

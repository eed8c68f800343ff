"""Token ids of problems: plain prompts and conversations, and conversations that go on.

A conversation becomes text by the tokenizer's chat template and then tokens. Once tokens were sampled they are never
made anew from text: what follows is appended, so that the log-probabilities of the past stay those of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_post.data.problems import Problem, Source
from jaxrl_post.data.schemas import Message, as_messages, show_messages
from jaxrl_post.data.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """Token ids of a problem's prompt, up to where the completion begins.

    Text is encoded as it stands, behind the tokenizer's own start token (`prefix_ids`, where it has that) unless the
    text begins with it; `prompt_tokens` are taken as they are. Messages (`prompt_messages`) go through the chat
    template with the problem's `tools` and `chat_template_kwargs`, and the beginning of the assistant's turn is added;
    if the last message is the assistant's, it is left open to be continued.

    Args:
        tokenizer: with a chat template if there are messages.
        problem: one of a `Source`.

    Returns:
        Token ids.

    Raises:
        ValueError: if there are messages and no chat template, or the template refuses them.

    Example:
        >>> from jaxrl_post.data import CharTokenizer
        >>> encode_prompt(CharTokenizer("ab"), {"prompt": "ba"})
        [3, 2]
    """
    if "prompt_tokens" in problem:
        return list(problem["prompt_tokens"])
    if "prompt_messages" not in problem:
        ids, prefix = tokenizer.encode(problem["prompt"]), list(getattr(tokenizer, "prefix_ids", ()))
        return ids if ids[: len(prefix)] == prefix else prefix + ids
    return tokenizer.encode(_prompt_text(tokenizer, problem))


def encode_completion(tokenizer: Tokenizer, problem: Problem, name: str) -> list[int]:
    """Token ids of a given completion, behind those of `encode_prompt`, up to and with its stop token.

    What a chat template writes behind the stop token (a line end, as a rule) is not part of it: sampling would have
    ended before.

    Args:
        tokenizer: as for the prompt.
        problem: one of a `Source`.
        name: column of the completion: `"answer"`, `"completion"`, `"chosen"`, `"rejected"`.

    Returns:
        Token ids, the last one a stop token.

    Raises:
        KeyError: if there is no such column.
        ValueError: if the template writes the prompt differently when an answer follows it.

    Example:
        >>> from jaxrl_post.data import CharTokenizer
        >>> encode_completion(CharTokenizer("ab"), {"prompt": "b", "answer": "ab"}, "answer")
        [2, 3, 1]
    """
    if "prompt_messages" not in problem:
        return [*tokenizer.encode(problem[name]), tokenizer.eos_ids[0]]
    answer = problem.get(f"{name}_messages") or [{"role": "assistant", "content": problem[name]}]
    before = _prompt_text(tokenizer, problem)
    prompt = problem["prompt_messages"]
    if prompt[-1]["role"] == "assistant":  # its continuation
        begun = show_messages([prompt[-1]])
        prompt, answer = prompt[:-1], [{**answer[0], "content": begun + show_messages(answer)}]
    after = _render(tokenizer, [*prompt, *answer], problem.get("tools"), problem.get("chat_template_kwargs"))
    _check_begins(after, before, "prompt when an answer follows it")
    prompt_ids, ids = tokenizer.encode(before), tokenizer.encode(after)
    # Where a token would reach across the border, the border that sampling meets is kept.
    same = ids[: len(prompt_ids)] == prompt_ids
    ids = ids[len(prompt_ids) :] if same else tokenizer.encode(after[len(before) :])
    stops = [place for place, token in enumerate(ids) if token in tokenizer.eos_ids]
    return ids[: stops[-1] + 1] if stops else [*ids, tokenizer.eos_ids[0]]


def continue_chat(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    messages: Sequence[Mapping[str, Any]],
    new_messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """A conversation with more messages behind what was sampled, ready for the assistant's next turn.

    The ids so far are the beginning of the result, token for token, however a tokenizer would cut their text: only what
    the template writes behind the assistant's last turn is encoded. If that turn was cut before its stop token, it is
    closed.

    Args:
        tokenizer: with a chat template.
        ids: tokens so far: the prompt's and the assistant's turn as sampled, with its stop token if it came to one.
        messages: the same as messages; the last is the assistant's, with the text of what it sampled.
        new_messages: what follows, e.g. the results of tools or the user's next question.
        tools: descriptions of functions, as in the prompt.
        chat_template_kwargs: further options of the template, as in the prompt.

    Returns:
        `ids` and the tokens of the new messages and of the beginning of the next turn.

    Raises:
        ValueError: if the template writes the past differently once messages follow (many drop earlier reasoning), so
            that no tokens appended would give what the template means; if it closes turns with no stop token; or if
            the messages are not as said.

    Example:
        >>> from tokenizers import Tokenizer as Fast, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = {"<end>": 0, "user": 1, "assistant": 2, "hi": 3, "and": 4}
        >>> fast = Fast(models.WordLevel(words, unk_token="hi"))
        >>> fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> template = (
        ...     "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
        ...     "{% if add_generation_prompt %}assistant{% endif %}"
        ... )
        >>> from jaxrl_post.data import HFTokenizer
        >>> tokenizer = HFTokenizer(
        ...     PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", chat_template=template)
        ... )
        >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
        >>> continue_chat(tokenizer, [1, 3, 0, 2, 3, 0], talk, [{"role": "user", "content": "and"}])
        [1, 3, 0, 2, 3, 0, 1, 4, 0, 2]
    """
    past, new = as_messages(list(messages), "messages"), as_messages(list(new_messages), "new_messages")
    if past[-1]["role"] != "assistant":
        raise ValueError(f"messages must end with the assistant's turn that ids end with, got {past[-1]['role']!r}")
    before = _render(tokenizer, past, tools, chat_template_kwargs)
    after = _render(tokenizer, [*past, *new], tools, chat_template_kwargs, add_generation_prompt=True)
    _check_begins(after, before, "conversation so far when messages follow it")
    ends = {token: text for token in tokenizer.eos_ids if (text := _token_text(tokenizer, token))}
    found = [(before.rfind(text) + len(text), token) for token, text in ends.items() if text in before]
    position, stop = max(found, default=(0, -1))
    # Between a turn's stop token and the next turn there is at most white space.
    if not found or before[position:].strip():
        raise ValueError(
            f"the chat template ends the assistant's turn with {before[-20:]!r}, which holds none of the stop tokens "
            f"{', '.join(map(repr, ends.values())) or '(none)'}; add the template's own to the generation config's "
            f"eos_token_id"
        )
    # Encoded behind the stop token, for a tokenizer may treat the beginning of a text in a way of its own.
    added = tokenizer.encode(ends[stop] + after[position:])
    if added[:1] != [stop]:
        raise ValueError(f"the tokenizer does not read its stop token {ends[stop]!r} as one token, but as {added[:3]}")
    given = [int(token) for token in ids]
    if not given:
        raise ValueError("ids must hold the conversation so far, got none")
    return given + (added[1:] if given[-1] in tokenizer.eos_ids else added)


class ChatSource:
    """Problems whose prompts of plain text are a user's message.

    Args:
        source: the problems.
        system: a system message before each that does not begin with one; None for none.

    Example:
        >>> ChatSource([{"prompt": "1+1=?"}])[0]["prompt_messages"]
        [{'role': 'user', 'content': '1+1=?'}]
    """

    def __init__(self, source: Source, *, system: str | None = None):
        self._source = source
        self._first = [] if system is None else [{"role": "system", "content": system}]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Problem:
        problem = self._source[index]
        messages = problem.get("prompt_messages") or [{"role": "user", "content": problem["prompt"]}]
        first = [] if messages[0]["role"] == "system" else self._first
        return {**problem, "prompt_messages": [*first, *messages]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def extend_prompt(problem: Problem, text: str) -> Problem:
    """A problem with more text at the end of its prompt: of the last message, if it is a conversation.

    Args:
        problem: one of a `Source`.
        text: e.g. a sentence about the length of the answer.

    Returns:
        A new problem.

    Example:
        >>> extend_prompt({"prompt": "1+1=?", "answer": "2"}, " Be brief.")
        {'prompt': '1+1=? Be brief.', 'answer': '2'}
    """
    extended = {**problem, "prompt": problem["prompt"] + text}
    if "prompt_messages" in problem:
        *first, last = problem["prompt_messages"]
        content = last["content"]
        longer = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
        extended["prompt_messages"] = [*first, {**last, "content": longer}]
    return extended


def _prompt_text(tokenizer: Tokenizer, problem: Problem) -> str:
    messages = problem["prompt_messages"]
    is_open = messages[-1]["role"] == "assistant"
    return _render(
        tokenizer,
        messages,
        problem.get("tools"),
        problem.get("chat_template_kwargs"),
        add_generation_prompt=not is_open,
        continue_final_message=is_open,
    )


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any] | None,
    **turn: bool,
) -> str:
    render = getattr(tokenizer, "render_chat", None)
    if render is None:
        raise ValueError(
            f"the data holds messages, but {type(tokenizer).__name__} has no chat template; take a tokenizer that has "
            f"one, or make the prompt text by a mapping, e.g. prompt: '{{messages[0].content}}'"
        )
    return render(messages, tools=tools, **turn, **(options or {}))


def _check_begins(after: str, before: str, what: str) -> None:
    if after.startswith(before):
        return
    common = next((i for i, (a, b) in enumerate(zip(after, before, strict=False)) if a != b), len(after))
    raise ValueError(
        f"the chat template does not keep the beginning: it changes the {what}. From character {common} on it wrote "
        f"{before[common : common + 40]!r} and now writes {after[common : common + 40]!r}. Tokens that were sampled "
        f"cannot change; take a template that only appends (templates of reasoning models often drop earlier "
        f"reasoning, or trim)"
    )


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    text = getattr(tokenizer, "token_text", None)
    return "" if text is None else text(token)

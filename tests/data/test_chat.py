"""Conversations as tokens: prompts, completions, and turns that follow what was sampled."""

import json

import pytest

from jaxrl_post.data import (
    CharTokenizer,
    ChatSource,
    HFTokenizer,
    continue_chat,
    encode_completion,
    encode_prompt,
    extend_prompt,
    load_tokenizer,
    prompt_fits,
    to_problem,
)

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{%- endif %}{%- endif %}"
)
# As reasoning models have it: earlier thoughts are not shown again once a user speaks.
FORGETS = CHATML.replace(
    "message.content +",
    "(message.content if loop.last or message.role != 'assistant' else message.content.split('</think>')[-1]) +",
)
TRIMS = CHATML.replace("message.content +", "(message.content | trim) +")


def chat_tokenizer(template=CHATML, *, eos_token="<|im_end|>", **options):
    """A byte-level tokenizer with merges that cross words, so that one text can be cut in several ways."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    fast.train_from_iterator(["assistant\nuser\nhello hello assistant\n system\n", "\n\n"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos_token, chat_template=template)
    return HFTokenizer(made, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def turn(role, content):
    return {"role": role, "content": content}


def text(tokenizer, ids):
    return "".join(tokenizer.token_text(token) for token in ids)


def problem(**row):
    return to_problem(row, "preference" if "chosen" in row else "prompt")


QUESTION = [turn("system", "Be brief."), turn("user", "hello")]
ASKED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


# prompts


def test_a_prompt_of_messages_is_the_templates_text_with_the_assistants_turn_begun(tokenizer):
    ids = encode_prompt(tokenizer, problem(prompt=QUESTION))
    assert ids == tokenizer.encode(ASKED)
    assert text(tokenizer, ids) == ASKED
    start, end = tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")
    assert len(start) == len(end) == 1
    assert (ids.count(start[0]), ids.count(end[0])) == (3, 2)


def test_the_ids_are_those_that_transformers_gives(tokenizer):
    theirs = tokenizer.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, problem(prompt=QUESTION)) == list(theirs)


def test_tools_and_options_reach_the_template(tokenizer):
    tool = {"type": "function", "function": {"name": "add"}}
    made = problem(prompt=[turn("user", "hello")], tools=[tool], chat_template_kwargs={"enable_thinking": False})
    rendered = text(tokenizer, encode_prompt(tokenizer, made))
    head, _, rest = rendered.removeprefix("<|im_start|>system\nTools: ").partition("<|im_end|>")
    assert json.loads(head) == [tool]
    assert rest == "\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think></think>"


def test_a_prompt_that_ends_with_the_assistant_stays_open(tokenizer):
    made = problem(prompt=[turn("user", "hello"), turn("assistant", "hello as")])
    assert text(tokenizer, encode_prompt(tokenizer, made)).endswith("<|im_start|>assistant\nhello as")


def test_a_plain_prompt_is_encoded_as_it_stands(tokenizer):
    assert encode_prompt(tokenizer, problem(prompt="hello")) == tokenizer.encode("hello")


def test_the_length_of_a_prompt_is_that_with_the_template(tokenizer):
    made = problem(prompt=QUESTION)
    length = len(tokenizer.encode(ASKED))
    assert prompt_fits(tokenizer, length)(made)
    assert not prompt_fits(tokenizer, length - 1)(made)


def test_a_sentence_is_added_to_the_last_message_and_leaves_the_problem_alone(tokenizer):
    made = problem(prompt=QUESTION)
    longer = extend_prompt(made, " Now.")
    assert text(tokenizer, encode_prompt(tokenizer, longer)) == ASKED.replace("hello", "hello Now.")
    assert longer["prompt"] == made["prompt"] + " Now."
    assert text(tokenizer, encode_prompt(tokenizer, made)) == ASKED
    parts = problem(prompt=[{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    assert extend_prompt(parts, "b")["prompt_messages"][0]["content"][1] == {"type": "text", "text": "b"}


def test_messages_need_a_tokenizer_with_a_chat_template():
    made = problem(prompt=[turn("user", "ab")])
    with pytest.raises(ValueError, match="CharTokenizer has no chat template; take a tokenizer that has one, or make"):
        encode_prompt(CharTokenizer("ab"), made)
    with pytest.raises(ValueError, match="the tokenizer has no chat template; take the tokenizer of a chat model"):
        encode_prompt(chat_tokenizer(None), made)


def test_what_a_template_refuses_is_told_with_its_words_and_the_roles():
    strict = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"roles must alternate.*their roles are user, user"):
        encode_prompt(strict, problem(prompt=[turn("user", "a"), turn("user", "b")]))


def test_a_chat_template_is_saved_and_loaded_with_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert encode_prompt(load_tokenizer(tmp_path), problem(prompt=QUESTION)) == tokenizer.encode(ASKED)


# completions


def test_given_completions_follow_the_prompt_and_end_with_the_stop_token(tokenizer):
    pair = problem(prompt=QUESTION, chosen=[turn("assistant", "hello")], rejected=[turn("assistant", "\n")])
    end = tokenizer.eos_ids[0]
    assert text(tokenizer, encode_completion(tokenizer, pair, "chosen")) == "hello<|im_end|>"
    # "\n\n" is one token, but when an answer is sampled the prompt's own "\n" is already there.
    assert "\n\n" in {tokenizer.token_text(token) for token in range(tokenizer.vocab_size)}
    assert encode_completion(tokenizer, pair, "rejected") == [*tokenizer.encode("\n"), end]


def test_a_text_answer_to_messages_is_the_assistants(tokenizer):
    made = problem(prompt=QUESTION, answer="hello")
    assert text(tokenizer, encode_completion(tokenizer, made, "answer")) == "hello<|im_end|>"
    opened = problem(prompt=[*QUESTION, turn("assistant", "hel")], answer="lo")
    assert text(tokenizer, encode_completion(tokenizer, opened, "answer")) == "lo<|im_end|>"


def test_a_plain_completion_ends_with_the_first_stop_token(tokenizer):
    made = problem(prompt="hello", answer=" user")
    assert encode_completion(tokenizer, made, "answer") == [*tokenizer.encode(" user"), tokenizer.eos_ids[0]]
    with pytest.raises(KeyError):
        encode_completion(tokenizer, made, "chosen")


def test_a_template_that_closes_no_turn_gets_the_stop_token():
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    plain = chat_tokenizer(template, eos_token="<|endoftext|>")
    ids = encode_completion(plain, problem(prompt=[turn("user", "hello")], answer="a"), "answer")
    assert text(plain, ids) == "a<|endoftext|>"


def test_a_template_that_writes_the_prompt_anew_before_an_answer_is_refused():
    changes = chat_tokenizer("{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(ValueError, match=r"changes the prompt when an answer follows it. From character 0 .*'1hello'"):
        encode_completion(changes, problem(prompt=[turn("user", "hello")], answer="a"), "answer")


# conversations that go on


def sampled(tokenizer, pieces, *, stop=True):
    """A prompt and an answer whose tokens are not those that the tokenizer would cut its text into."""
    ids = encode_prompt(tokenizer, problem(prompt=QUESTION))
    for piece in pieces:
        ids += tokenizer.encode(piece)
    return ids + [tokenizer.encode("<|im_end|>")[0]] * stop


MORE = [turn("user", "hello again")]
FOLLOWS = "\n<|im_start|>user\nhello again<|im_end|>\n<|im_start|>assistant\n"


def test_new_messages_are_appended_and_every_sampled_token_stays(tokenizer):
    ids = sampled(tokenizer, ["h", "e", "l", "l", "o"])
    answered = [*QUESTION, turn("assistant", "hello")]
    assert tokenizer.encode(ASKED + "hello<|im_end|>") != ids  # the drift that must not happen
    result = continue_chat(tokenizer, ids, answered, MORE)
    assert result[: len(ids)] == ids
    assert text(tokenizer, result) == ASKED + "hello<|im_end|>" + FOLLOWS
    assert result[len(ids) :] == tokenizer.encode(FOLLOWS)


def test_canonical_tokens_continue_to_what_the_whole_conversation_encodes_to(tokenizer):
    answered = [*QUESTION, turn("assistant", "hello user")]
    result = continue_chat(tokenizer, sampled(tokenizer, ["hello user"]), answered, MORE)
    assert result == encode_prompt(tokenizer, problem(prompt=[*answered, *MORE]))


def test_a_tokenizer_that_marks_the_beginning_of_a_text_marks_none_in_the_middle():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "<end>"], show_progress=False)
    fast.train_from_iterator(["user: hello again assistant: hi"], trainer)
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<end>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    marks = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", chat_template=template))
    assert marks.encode("user:")[0] != marks.encode("<end>user:")[1]

    asked = problem(prompt=[turn("user", "hello")], answer="hi")
    ids = encode_prompt(marks, asked) + encode_completion(marks, asked, "answer")
    answered = [turn("user", "hello"), turn("assistant", "hi")]
    whole = encode_prompt(marks, problem(prompt=[*answered, turn("user", "again")]))
    assert continue_chat(marks, ids, answered, [turn("user", "again")]) == whole
    assert whole[: len(ids)] == ids


def test_a_conversation_continues_more_than_once(tokenizer):
    first = sampled(tokenizer, ["h", "ello"])
    answered = [*QUESTION, turn("assistant", "hello")]
    second = continue_chat(tokenizer, first, answered, [turn("tool", "12"), *MORE])
    second += [*tokenizer.encode("u"), *tokenizer.encode("ser"), tokenizer.eos_ids[0]]
    talk = [*answered, turn("tool", "12"), *MORE, turn("assistant", "user")]
    third = continue_chat(tokenizer, second, talk, [turn("tool", "13")])
    assert third[: len(second)] == second
    assert second[: len(first)] == first
    assert text(tokenizer, third).endswith("user<|im_end|>\n<|im_start|>tool\n13<|im_end|>\n<|im_start|>assistant\n")


def test_a_system_message_is_put_before_what_has_none():
    asked, told = turn("user", "hello"), turn("system", "hi")
    rows = [{"prompt": "hello"}, problem(prompt=[asked]), problem(prompt=[told, asked])]
    source = ChatSource(rows, system="be brief")
    brief = [turn("system", "be brief"), asked]
    assert [source[i]["prompt_messages"] for i in range(3)] == [brief, brief, [told, asked]]
    assert ChatSource(rows)[1]["prompt_messages"] == [asked]


def test_a_turn_that_was_cut_is_closed(tokenizer):
    ids = sampled(tokenizer, ["hel"], stop=False)
    result = continue_chat(tokenizer, ids, [*QUESTION, turn("assistant", "hel")], MORE)
    assert result[: len(ids)] == ids
    assert text(tokenizer, result) == ASKED + "hel<|im_end|>" + FOLLOWS


def test_another_stop_token_than_the_templates_stands_for_it():
    both = chat_tokenizer(eos_token="<|endoftext|>", eos_ids=[2])
    ids = [*sampled(both, ["hello"], stop=False), both.encode("<|endoftext|>")[0]]
    result = continue_chat(both, ids, [*QUESTION, turn("assistant", "hello")], MORE)
    assert text(both, result) == ASKED + "hello<|endoftext|>" + FOLLOWS


def test_white_space_that_the_template_trims_stays_in_the_tokens():
    trims = chat_tokenizer(TRIMS)
    ids = sampled(trims, ["\n", "hello", " \n"])
    result = continue_chat(trims, ids, [*QUESTION, turn("assistant", "\nhello \n")], MORE)
    assert result[: len(ids)] == ids
    assert text(trims, result) == ASKED + "\nhello \n<|im_end|>" + FOLLOWS


def test_a_template_that_forgets_earlier_thoughts_is_refused_with_the_place():
    forgets = chat_tokenizer(FORGETS)
    answer = "<think>hm</think>hello"
    ids, talk = sampled(forgets, [answer]), [*QUESTION, turn("assistant", answer)]
    wrote = r"the conversation so far when messages follow it. From character \d+ on it wrote '<think>hm</think>"
    with pytest.raises(ValueError, match=wrote + r".*and now writes 'hello<\|im_end\|>.*drop earlier reasoning"):
        continue_chat(forgets, ids, talk, MORE)
    talk[-1] = turn("assistant", "hello")
    assert text(forgets, continue_chat(forgets, ids, talk, MORE)).endswith(answer + "<|im_end|>" + FOLLOWS)


def test_a_template_whose_turns_end_with_no_stop_token_is_refused():
    wrong = chat_tokenizer(eos_token="<|endoftext|>")
    ids, talk = sampled(wrong, ["a"]), [*QUESTION, turn("assistant", "a")]
    with pytest.raises(ValueError, match=r"holds none of the stop tokens '<\|endoftext\|>'; add the template's own"):
        continue_chat(wrong, ids, talk, MORE)


def test_options_and_tools_are_those_of_the_prompt(tokenizer):
    options = {"enable_thinking": False}
    ids = encode_prompt(tokenizer, problem(prompt=QUESTION, tools=[{"name": "f"}], chat_template_kwargs=options))
    ids = [*ids, *tokenizer.encode("a"), tokenizer.eos_ids[0]]
    talk = [*QUESTION, turn("assistant", "<think></think>a")]
    result = continue_chat(tokenizer, ids, talk, MORE, tools=[{"name": "f"}], chat_template_kwargs=options)
    assert result[: len(ids)] == ids
    assert text(tokenizer, result[len(ids) :]) == FOLLOWS + "<think></think>"


@pytest.mark.parametrize(
    ("ids", "talk", "new", "message"),
    [
        ([1], QUESTION, MORE, "messages must end with the assistant's turn that ids end with, got 'user'"),
        ([1], [*QUESTION, turn("assistant", "a")], [], "new_messages must be a list of at least one message"),
        ([], [*QUESTION, turn("assistant", "a")], MORE, "ids must hold the conversation so far, got none"),
    ],
)
def test_what_cannot_be_continued_is_refused(tokenizer, ids, talk, new, message):
    with pytest.raises(ValueError, match=message):
        continue_chat(tokenizer, ids, talk, new)

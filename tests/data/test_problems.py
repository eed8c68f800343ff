"""Generated problems, and what is held out of them."""

import sys

import pytest

from jaxrl_post.data import ReasoningGymSource, check_disjoint, columns, held_out, spaced_seed


def spelling(seed=0, size=50, **options):
    return ReasoningGymSource("spell_backward", seed=seed, size=size, prompt="{word}>", **options)


# reasoning-gym


def test_items_are_the_librarys_own_and_the_same_each_time():
    import reasoning_gym

    theirs = reasoning_gym.create_dataset("chain_sum", seed=7, size=5, min_terms=2, max_terms=2)
    ours = ReasoningGymSource("chain_sum", seed=7, size=5, options={"min_terms": 2, "max_terms": 2})
    for index in (4, 0, 4):
        problem, entry = ours[index], theirs[index]
        assert problem["prompt"] == entry["question"]
        assert problem["answer"] == entry["answer"]
        assert problem["entry"] == entry
        assert problem["prompt_id"] == index
    assert tuple(ours[0]) == ours.columns
    assert len(list(ours)) == len(ours) == 5


def test_neighbouring_seeds_give_shifted_copies_which_spaced_seeds_do_not():
    assert spelling(seed=1)[0]["prompt"] == spelling(seed=0)[1]["prompt"]
    size = 50
    seeds = [spaced_seed(seed, part, size=size, parts=3) for seed in range(4) for part in range(3)]
    states = [state for start in seeds for state in range(start, start + size)]
    assert len(set(states)) == len(states)


@pytest.mark.parametrize(("seed", "part", "size"), [(-1, 0, 5), (0, 8, 5), (0, -1, 5), (0, 0, 0)])
def test_spaced_seed_refuses_what_would_overlap(seed, part, size):
    with pytest.raises(ValueError, match="need seed >= 0"):
        spaced_seed(seed, part, size=size)


def test_a_list_is_joined_by_commas_or_by_the_text_after_the_colon():
    source = ReasoningGymSource("countdown", seed=3, size=1, prompt="{numbers}={target}", answer="{numbers: }")
    metadata = source[0]["entry"]["metadata"]
    numbers = [str(number) for number in metadata["numbers"]]
    assert source[0]["prompt"] == ",".join(numbers) + "=" + str(metadata["target"])
    assert source[0]["answer"] == " ".join(numbers)


def test_lowercase_reaches_prompt_answer_and_the_scorers_answer():
    upper = ReasoningGymSource("caesar_cipher", seed=0, size=1)
    lower = ReasoningGymSource("caesar_cipher", seed=0, size=1, lowercase=True)
    assert upper[0]["answer"] != upper[0]["answer"].lower() == lower[0]["answer"]
    assert lower[0]["prompt"] == upper[0]["prompt"].lower()
    assert lower.score_answer(lower[0]["answer"], lower[0]["entry"]) == 1.0
    assert upper.score_answer(lower[0]["answer"], upper[0]["entry"]) < 1.0


def test_an_index_past_the_end_ends_iteration():
    with pytest.raises(IndexError):
        spelling(size=3)[3]


def test_an_unknown_template_key_lists_the_keys():
    with pytest.raises(
        ValueError, match=r"prompt template '\{wrod\}' cannot be filled.*keys are answer, .*question.*word"
    ):
        ReasoningGymSource("spell_backward", seed=0, size=3, prompt="{wrod}")


def test_an_unbalanced_brace_in_a_template_is_explained():
    with pytest.raises(ValueError, match="written twice"):
        ReasoningGymSource("spell_backward", seed=0, size=3, prompt="{word")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("spell_backwards", {}, "no task 'spell_backwards'; did you mean spell_backward"),
        ("spell_backward", {"max_word_length": 5}, "no option 'max_word_length'; did you mean 'max_word_len'"),
        ("spell_backward", {"seed": 5}, "no option 'seed'"),
        ("spell_backward", {"min_word_len": 9, "max_word_len": 5}, "rejects its options"),
    ],
)
def test_an_unknown_task_or_option_or_value_is_named(task, options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGymSource(task, seed=0, size=3, options=options)


def test_a_generator_without_problems_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        spelling(size=0)


def test_without_reasoning_gym_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r'pip install "jaxrl-post\[tasks\]"'):
        spelling()


# held-out problems and columns


def test_held_out_problems_are_distinct_in_order_and_not_excluded():
    source = [{"prompt": prompt, "answer": i} for i, prompt in enumerate("abacbd")]
    assert [(p["prompt"], p["answer"]) for p in held_out(source, 3, exclude={"b"})] == [("a", 0), ("c", 3), ("d", 5)]


def test_too_few_distinct_problems_are_an_error_with_the_number():
    with pytest.raises(ValueError, match=r"3 problems .* among 4 problems only 2"):
        held_out([{"prompt": prompt} for prompt in "abab"], 3)


def test_no_held_out_problem_at_all_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1"):
        held_out([{"prompt": "a"}], 0)


def test_shared_prompts_are_an_error_with_an_example():
    check_disjoint(iter(["a", "b"]), ["c"])
    with pytest.raises(ValueError, match=r"2 held-out prompts are also trained on, e.g. 'a'"):
        check_disjoint(["b", "a", "x"], ["a", "b", "c"])


def test_columns_are_prompt_major_and_none_where_a_problem_lacks_one():
    problems = [{"prompt": "p", "answer": "1", "level": 2}, {"prompt": "q", "answer": "3"}]
    assert columns(problems, repeat=2) == {"answer": ["1", "1", "3", "3"], "level": [2, 2, None, None]}
    with pytest.raises(ValueError, match="repeat must be at least 1"):
        columns(problems, repeat=0)

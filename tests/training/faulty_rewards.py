"""Reward functions that fail in the ways that reward functions fail."""


def raises(completions):
    raise KeyError("no such answer")


def nan(completions):
    return [float("nan")] * len(completions)


def wrong_count(completions):
    return [1.0]


def nothing(completions):
    return [None] * len(completions)


def first_of_four_unscored(completions, answer):
    from tests.training.runs import reward

    return [None if index % 4 == 0 else value for index, value in enumerate(reward(completions, answer))]


def constant(completions):
    return [0.5] * len(completions)


def fails_on_eight_rows(completions):
    if len(completions) == 8:
        raise RuntimeError("evaluation is another number of rows")
    return [0.5] * len(completions)

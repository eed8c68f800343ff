"""Keywords that a method would not read, or whose meaning another one takes away, are errors where it is made."""

import pytest

from jaxrl_post import methods
from jaxrl_post.methods import credit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.asymmetric_po(dads=False, rate=2.0), "rate=2.0 does not apply to dads=False"),
        (lambda: methods.asymmetric_po(dads=False, form="exponential"), "form='exponential' does not apply to dads"),
        (lambda: methods.asymmetric_po(stcr=False, base=1.1), "base=1.1 does not apply to stcr=False"),
        (lambda: methods.hapo(tolerance=0.1), "tolerance=0.1 does not apply to form='cosine'"),
        (lambda: methods.novelty_bonus(bonus="global", ridge=0.1), "ridge=0.1 does not apply to bonus='global'"),
        (lambda: methods.novelty_bonus(bonus="global", embedding_size=8), "embedding_size=8 does not apply to bonus"),
        (lambda: methods.novelty_bonus(bonus="episodic", capacity=9), "capacity=9 does not apply to bonus='episodic'"),
        (lambda: methods.f_dpg(correct_above=0.5), "correct_above=0.5 does not apply to target='tilted'"),
        (lambda: methods.f_dpg(target="constrained", beta=0.1), "beta=0.1 does not apply to target='constrained'"),
        (lambda: methods.kimi(correct_above=0.5), "correct_above=0.5 does not apply to length_weight=0"),
        (lambda: methods.dpo(beta=0.0), "beta must be above 0, got 0.0"),
        (
            lambda: methods.salt(estimator="rloo", normalize_std=False),
            "normalize_std=False does not apply to estimator",
        ),
        (
            lambda: methods.oprl(estimator="rloo", normalize_std=False),
            "normalize_std=False does not apply to estimator",
        ),
        (lambda: credit.as_advantage({"name": "salt", "estimator": "rloo", "eps": 1e-4}), "eps=0.0001 does not apply"),
        (lambda: methods.trajectory_preference(steps="turns"), "steps='turns' does not apply to over_steps='sum'"),
    ],
)
def test_a_keyword_that_would_not_be_read_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: methods.asymmetric_po(dads=False, base=1.1),
        lambda: methods.asymmetric_po(stcr=False, rate=2.0, form="exponential"),
        lambda: methods.hapo(form="linear", tolerance=0.2),
        lambda: methods.novelty_bonus(bonus="episodic", ridge=0.2, embedding_size=8),
        lambda: methods.novelty_bonus(bonus="global", capacity=9),
        lambda: methods.kimi(length_weight=0.1, correct_above=0.7),
        lambda: methods.salt(normalize_std=False),
        lambda: methods.oprl(estimator="rloo", steps={"name": "length", "num_steps": 2}),
        lambda: methods.trajectory_preference(over_steps="mean", steps="turns"),
    ],
)
def test_where_it_is_read_it_is_accepted(make):
    assert make().min_group == 2


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("hbpo", {}), ("s_grpo", {}), ("nsr", {}), ("comam", {"local": ["own"]}), ("asymmetric_po", {})],
)
def test_a_kl_in_the_reward_is_refused_where_the_reward_tells_what_is_right(name, keywords):
    make = getattr(methods, name)
    with pytest.raises(ValueError, match="kl_in='reward' does not apply: "):
        make(**keywords, beta=0.1, kl_in="reward")
    assert "reference" in make(**keywords, beta=0.1).needs


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("gdpo", {}),
        ("paco_grpo", {}),
        ("bnpo", {}),
        ("opd", {}),
        ("kdrl", {}),
        ("copo", {"blend": "uniform"}),
        ("hypervolume_weighting", {"objectives": ("first", "second")}),
        ("c_morl", {"objective": "first", "constraints": ("second",)}),
    ],
)
def test_a_kl_in_the_reward_is_refused_where_it_would_not_reach_the_advantage(name, keywords):
    with pytest.raises(ValueError, match="kl_in='reward' does not apply: its advantage does not read the reward less"):
        getattr(methods, name)(**keywords, beta=0.1, kl_in="reward")
    assert methods.copo(blend="entropy", beta=0.1, kl_in="reward").min_group == 1

"""What the tests of runs have in common."""

import pytest

from jaxrl_post.training import loop


@pytest.fixture
def drawn():
    """Asked for by who looks at the curves of a run."""


@pytest.fixture(autouse=True)
def few_curves(request, monkeypatch):
    """To draw a run's curves takes as long as a tiny run's steps: it is left out where nobody looks at them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(loop, "plot", lambda *_: None)

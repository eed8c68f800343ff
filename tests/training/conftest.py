"""What the tests of runs have in common."""

import pytest

from jaxrl_post.training import loop
from tests.training import programs

PLOT = loop.plot


@pytest.fixture
def drawn(monkeypatch):
    """Asked for by who looks at the curves of a run."""
    monkeypatch.setattr(loop, "plot", PLOT)


@pytest.fixture(autouse=True, scope="module")
def few_curves_and_programs():
    """To draw a run's curves takes as long as a tiny run's steps, to compile its programs longer: curves are left out
    where nobody looks at them, and runs share their programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot", lambda *_: None)
        programs.share(patch)
        yield

"""Fake clouds: an empty one, one with a pod that is set up, one on which the run is running."""

import shutil

import pytest

from tests.tpu_scripts.cloud import Cloud


@pytest.fixture
def cloud(tmp_path):
    """Nothing but the programs on the PATH and a pod file."""
    made = Cloud(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def _set_up(tmp_path_factory):
    made = Cloud(tmp_path_factory.mktemp("set_up"))
    made.pod("create")
    made.pod("setup")
    return made


@pytest.fixture
def set_up(cloud, _set_up):
    """A pod that is up and set up, copied because each costs a second to make."""
    shutil.copytree(_set_up.root, cloud.root, dirs_exist_ok=True)
    return cloud


@pytest.fixture
def running(set_up):
    """A pod on which the run is running."""
    set_up.pod("launch")
    return set_up

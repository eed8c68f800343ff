"""What `convert` reads from and where models can be written."""

import pytest

from jaxrl_post import models
from jaxrl_post.models.orbax_io import save_orbax
from jaxrl_post.training import config, convert, inference, setup
from tests.training import runs

BUCKET = "gs://mine/model"


def test_a_run_in_a_bucket_is_converted_as_one_on_this_machine(tmp_path, monkeypatch):
    path = runs.tiny_run(tmp_path, warm_start=None)
    parts, loaded, written = setup.build(config.load(path)), [], []
    monkeypatch.setattr(inference, "load_run", lambda source: loaded.append(source) or (parts, {"w": 1}))
    monkeypatch.setattr(convert, "export", lambda *given, **_: written.append(given[-2:]))
    assert "of the policy of gs://mine/run" in convert.convert("gs://mine/run", "out")
    assert (loaded, written) == (["gs://mine/run"], [({"w": 1}, "out")])


@pytest.mark.parametrize(
    "write",
    [
        lambda: models.save_pretrained(BUCKET, {}, {}),
        lambda: models.save_adapters(BUCKET, {}, models.Lora(rank=2)),
        lambda: save_orbax(BUCKET, {}, {}),
        lambda: convert.convert("anything", BUCKET),
    ],
    ids=["save_pretrained", "save_adapters", "save_orbax", "convert"],
)
def test_a_model_is_not_written_to_a_directory_that_is_named_like_a_bucket(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="gs://mine/model: models are written to local directories; give one, and copy"
    ):
        write()
    assert not list(tmp_path.iterdir())


def test_an_export_to_a_bucket_is_refused_before_training(tmp_path):
    path = runs.tiny_run(tmp_path, warm_start=None)
    with pytest.raises(ValueError, match="gs://mine/model: models are written to local directories"):
        setup.build(config.load(path, [f"model.export={BUCKET}"]))

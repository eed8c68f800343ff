"""Models by their hub id: what is asked for, and what is said where there is none."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxrl_post import models
from jaxrl_post.data import load_tokenizer
from jaxrl_post.models.hub import local_directory


def test_a_revision_reaches_the_hub_and_does_not_apply_to_a_directory(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"holds no config\.json"):  # what was downloaded is empty
        models.from_pretrained("owner/name", revision="v2", abstract=True)
    assert asked["owner/name"]["revision"] == "v2"
    assert not any("safetensors" in pattern for pattern in asked["owner/name"]["allow_patterns"])
    for read in (models.from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match=r"revision 'v2' does not apply.*directory"):
            read(str(tmp_path), revision="v2")


def test_the_scheme_of_the_hub_says_that_no_directory_is_meant(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"/cache/{name}")
    assert local_directory("owner/name", ["*.json"]) == Path("owner/name")
    assert local_directory("hf://owner/name", ["*.json"]) == Path("/cache/owner/name")


def raised(kind, text="401 Client Error"):
    error = kind.__new__(kind)
    error.args = (text,)
    error.__str__ = lambda: text
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, r"accepted its terms.*HF_TOKEN"),
        (errors.RepositoryNotFoundError, r"set HF_TOKEN if it is private"),
        (errors.RevisionNotFoundError, r"no revision 'v2'"),
        (errors.LocalEntryNotFoundError, r"hf download owner/name --local-dir DIR.*HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled, r"hf download owner/name --local-dir DIR.*HF_HUB_OFFLINE"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(monkeypatch, kind, words):
    def download(name, **options):
        raise raised(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=words):
        local_directory("owner/name", ["*.json"], revision="v2")


def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("./nowhere", "~/nowhere", "/no/where", "no/where/here"):
        with pytest.raises(ValueError, match="no such directory"):
            local_directory(name, ["*.json"])

"""Networks of the Hugging Face hub: the revision is the one in the name, and the second load needs no connection."""

import pytest
import torch
import transformers as hf

import bpkd_sdk
from tests.hub import Repository, serving
from tests.transformers_networks import build

REVISIONS = {"user/net@v1": ("v1", "mit", 0.5), "user/net": ("main", "apache-2.0", 0.25)}


def load(name):
    """Return what a network loaded by its name states, and its first weight."""
    network = bpkd_sdk.load_model(f"transformers/{name}")
    first = next(network.parameters()).flatten()[0].item()
    return {"name": network.spec.name, "weights": network.provenance["weights"], "first": first}


def test_the_revision_of_a_name_is_loaded_and_then_needs_no_connection(tmp_path, monkeypatch):
    expected, repository = {}, Repository()
    for name, (revision, license_, first) in REVISIONS.items():
        network = build("segformer")
        with torch.no_grad():
            next(network.parameters()).fill_(first)
        network.save_pretrained(tmp_path / revision)
        hf.SegformerImageProcessor().save_pretrained(tmp_path / revision)
        files = {path.name: path.read_bytes() for path in (tmp_path / revision).iterdir()}
        repository.commit(revision, {**files, "README.md": f"---\nlicense: {license_}\n---\n".encode()})
        weights = {"source": "user/net", "revision": repository.branches[revision], "license": license_}
        expected[name] = {"name": "transformers/user/net", "weights": weights, "first": first}
    with serving(tmp_path / "cache") as hub:
        hub.repositories["user/net"] = repository
        assert {name: load(name) for name in REVISIONS} == expected
        with pytest.raises(RuntimeError, match="v9 is not a valid git identifier"):
            load("user/net@v9")
        with pytest.raises(RuntimeError, match="'user/other', which is no local folder"):
            load("user/other")
        assert any("/resolve/v1/" in path or repository.branches["v1"] in path for path in hub.requests)
        hub.shutdown()
        hub.server_close()
        assert {name: load(name) for name in REVISIONS} == expected
        with monkeypatch.context() as offline:  # ends before `serving`, which restores the same value
            offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            assert {name: load(name) for name in REVISIONS} == expected

"""Networks of the Hugging Face hub: the revision is the one in the name, and the second load needs no connection."""

import json
import os
import subprocess
import sys

import torch
import transformers as hf

from tests.conftest import ROOT
from tests.hub import Repository, stand_in
from tests.transformers_networks import build

SCRIPT = """
import json, sys
import huggingface_hub
import bpkd_sdk

def load(name):
    network = bpkd_sdk.load_model(f"transformers/{name}")
    first = next(network.parameters()).flatten()[0].item()
    return {"name": network.spec.name, "weights": network.provenance["weights"], "first": first}

names = ["user/net@v1", "user/net"]
facts = {"loaded": {name: load(name) for name in names}, "errors": {}}
for name in ("user/net@v9", "user/other"):
    try:
        load(name)
    except RuntimeError as error:
        facts["errors"][name] = str(error)
print("READY", flush=True)
sys.stdin.readline()  # the hub is closed now
facts["without"] = {name: load(name) for name in names}
huggingface_hub.constants.HF_HUB_OFFLINE = True
facts["offline"] = {name: load(name) for name in names}
print(json.dumps(facts))
"""


def test_the_revision_of_a_name_is_loaded_and_then_needs_no_connection(tmp_path):
    firsts, repository = {}, Repository()
    for revision, license_ in (("v1", "mit"), ("main", "apache-2.0")):
        network = build("segformer")
        with torch.no_grad():
            next(network.parameters()).fill_(0.5 if revision == "v1" else 0.25)
        firsts[revision] = next(network.parameters()).flatten()[0].item()
        network.save_pretrained(tmp_path / revision)
        hf.SegformerImageProcessor().save_pretrained(tmp_path / revision)
        files = {path.name: path.read_bytes() for path in (tmp_path / revision).iterdir()}
        repository.commit(revision, {**files, "README.md": f"---\nlicense: {license_}\n---\n".encode()})
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with stand_in() as hub:
        hub.repositories["user/net"] = repository
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        assert process.stdout.readline() == "READY\n"
    out, _ = process.communicate("\n", timeout=120)
    facts = json.loads(out)
    expected = {
        name: {
            "name": "transformers/user/net",
            "weights": {
                "source": "user/net",
                "revision": repository.branches[revision],
                "license": license_,
            },
            "first": firsts[revision],
        }
        for name, revision, license_ in (("user/net@v1", "v1", "mit"), ("user/net", "main", "apache-2.0"))
    }
    assert facts["loaded"] == facts["without"] == facts["offline"] == expected
    assert "v9 is not a valid git identifier" in facts["errors"]["user/net@v9"]
    assert "'user/other', which is no local folder" in facts["errors"]["user/other"]
    assert any("/resolve/v1/" in path or repository.branches["v1"] in path for path in hub.requests)

"""Container and compose files: the files, extras and options that they name exist."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from bpkd_sdk import cli
from bpkd_sdk.runtime.triton import split_url
from tests.tritonserver import find_server

ROOT = Path(__file__).parents[2]
CONTAINERFILE = (ROOT / "Containerfile").read_text().replace("\\\n", "")


@pytest.fixture(scope="module")
def services():
    """Return the services of the compose file, with every variable at its default."""
    text = (ROOT / "serve" / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:[-?]([^}]*)\}", r"\1", text))["services"]


def instructions(name):
    return re.findall(rf"^{name} (.*)$", CONTAINERFILE, re.MULTILINE)


def test_the_images_are_built_from_existing_files_and_extras():
    for copied in instructions("COPY"):
        *sources, _ = shlex.split(copied)
        assert all((ROOT / source).exists() for source in sources), copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    training, runtime = re.findall(r"^ARG EXTRAS=(.*)$", CONTAINERFILE, re.MULTILINE)
    assert {*training.split(","), *runtime.split(",")} <= {*project["optional-dependencies"]}
    assert CONTAINERFILE.count('".[$EXTRAS]"') == 2


def test_the_runtime_image_has_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = re.findall(r"^ARG EXTRAS=(.*)$", CONTAINERFILE, re.MULTILINE)[1]
    requirements, waiting = {*project["dependencies"]}, runtime.split(",")
    while waiting:
        for requirement in extras[waiting.pop()]:
            own = re.fullmatch(r"bpkd-sdk\[(.*)\]", requirement)
            waiting += own[1].split(",") if own else []
            requirements.add(requirement)
    assert not [requirement for requirement in requirements if re.match(r"(torch|timm|onnx)\b", requirement)]


def test_the_images_run_unprivileged_and_the_service_checks_its_health():
    assert instructions("USER") == ["bpkd", "bpkd"]
    assert "useradd --create-home --uid 10001 bpkd" in CONTAINERFILE
    assert "http://127.0.0.1:7860/healthz" in CONTAINERFILE
    training, runtime = instructions("ENTRYPOINT")
    assert training == '["bpkd"]'
    assert runtime == '["bpkd", "serve", "--host", "0.0.0.0", "--port", "7860"]'
    assert instructions("EXPOSE") == ["7860"]


def test_compose_connects_the_service_to_triton(services):
    triton, bpkd = services["triton"], services["bpkd"]
    build = bpkd["build"]
    assert (ROOT / "serve" / build["context"] / build["dockerfile"]).resolve() == ROOT / "Containerfile"
    assert f"AS {build['target']}\n" in CONTAINERFILE
    options = dict(zip(bpkd["command"][::2], bpkd["command"][1::2], strict=True))
    assert split_url(options["--student"]) == ("triton", 8000, "model")
    assert bpkd["environment"]["BPKD_TOKEN"]
    assert bpkd["depends_on"] == {"triton": {"condition": "service_healthy"}}
    assert bpkd["ports"] == ["127.0.0.1:7860:7860"]
    assert "ports" not in triton
    assert triton["volumes"] == ["./models:/models:ro"]
    assert "--model-repository=/models" in triton["command"]


def test_bpkd_serve_has_the_options_that_the_files_use(services):
    command = typer.main.get_command(cli.app).commands["serve"]
    known = {option for parameter in command.params for option in parameter.opts}
    _, entrypoint = instructions("ENTRYPOINT")
    words = [*re.findall(r"--\w+", entrypoint), *services["bpkd"]["command"][::2]]
    assert {*words} <= known
    assert {*services["bpkd"]["environment"]} <= {parameter.envvar for parameter in command.params}


def test_triton_has_the_options_that_compose_uses(services):
    program, environment = find_server()
    usage = subprocess.run([program, "--help"], env=environment, capture_output=True, text=True).stderr
    name, *options = services["triton"]["command"]
    assert name == "tritonserver"
    for option in options:
        assert re.search(rf"^  {option.split('=')[0]}\s", usage, re.MULTILINE), option

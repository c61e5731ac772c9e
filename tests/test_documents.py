"""The pages state what the code and the result files contain: names, commands, floors, tables."""

import ast
import graphlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import grimp
import numpy as np
import pytest
import typer
import yaml
from PIL import Image

import bpkd_sdk
from bpkd_sdk.cli import app
from bpkd_sdk.data import DATASETS
from bpkd_sdk.losses import METHODS
from bpkd_sdk.models import ZOO
from bpkd_sdk.runtime import formats
from tests.conftest import ROOT

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "benchmarks/README")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PUBLIC_PACKAGES = (
    *("comparison", "data", "evaluation", "export", "images", "losses", "models", "recipes", "runtime", "serve"),
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def table_lines(path):
    return {line for line in path.read_text().splitlines() if line.startswith("| ") and not line.startswith("| ---")}


def test_the_tables_of_the_study_are_the_measured_ones():
    measured = table_lines(ROOT / "benchmarks/results/camvid.md")
    shown = table_lines(ROOT / "docs/results.md")
    assert len(shown) > 30
    assert shown <= measured, shown - measured


def cells(line):
    without_differences = re.sub(r"<br>[^|]*", " ", line)
    return set(without_differences.strip("| ").split(" | "))


def test_the_scores_in_the_readme_are_the_measured_ones():
    measured = [cells(line) for line in table_lines(ROOT / "benchmarks/results/quickstart.md")]
    shown = [cells(line) for line in table_lines(ROOT / "README.md") if re.search(r"\| \d", line)]
    assert len(shown) == 4
    for row in shown:
        assert any(row <= other for other in measured), row


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def resolve(name):
    """Import a dotted name: a module, or what a module or a class contains."""
    module, rest = name, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name) or "." not in module:
                raise
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(found, part)
    return found


@each_page
def test_every_name_of_this_package_exists(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in set(re.findall(r"\bbpkd_sdk(?:\.\w+)+", prose)):
        resolve(name)
    for module in re.findall(r"python -m (benchmarks[\w.]*)", prose):
        assert importlib.util.find_spec(module), module
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("bpkd_sdk"):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
        for name in re.findall(r"\bbpkd\.(\w+)", block):
            assert name in bpkd_sdk.__all__, name


@each_page
def test_every_path_exists(page):
    text = page.read_text()
    inner = r"\.ci|\.github|bpkd_sdk|benchmarks|demos|docs|export|serve|tests"
    for path in re.findall(rf"`((?:{inner})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in link or (page.parent / link).exists(), link
    # `bpkd_sdk/training/loop.py`: `run_training`, `_Trainer.train`
    for path, names in re.findall(r"`([\w/]+)\.py`:((?:\s+`[\w.]+`,?)+)", text):
        module = path.replace("/", ".").removesuffix(".__init__")
        for name in re.findall(r"[\w.]+", names):
            resolve(f"{module if module.startswith('bpkd_sdk') else f'bpkd_sdk.{module}'}.{name}")


@each_page
def test_links_point_to_files_of_the_site(page):
    """`make docs` checks links to pages only. The site has no lists of the files in a folder."""
    on_site = re.compile(r"[\w.]+\.(md|cff)|LICENSE|docs/.*|demos/.*|benchmarks/README.md|benchmarks/results/.*")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            target = (page.parent / link).resolve()
            assert target.is_file(), link
            assert on_site.fullmatch(str(target.relative_to(ROOT))), link


def test_the_site_lists_every_page():
    """Zensical accepts entries without a page, and pages without an entry."""
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    notebooks = {path.with_suffix(".md") for path in NOTEBOOKS}  # which `make docs` writes
    assert {ROOT / name for name in listed} == {*PAGES, ROOT / "CHANGELOG.md", *notebooks}


def test_notebooks_are_committed_without_outputs():
    """`make docs` executes them: outputs of an older version would contradict the pages."""
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path


def test_the_reference_lists_every_public_name():
    top = set(bpkd_sdk.__all__)
    public = {f"bpkd_sdk.{name}" for name in top} | {"bpkd_sdk.boundary.edge_masks"}
    for package in PUBLIC_PACKAGES:
        names = importlib.import_module(f"bpkd_sdk.{package}").__all__
        public |= {f"bpkd_sdk.{package}.{name}" for name in names if name not in top}
    listed = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == public


def test_the_tests_that_pages_name_exist():
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 30
    assert named <= defined, named - defined


@each_page
def test_every_command_and_option_exists(page):
    lines = page.read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith("    bpkd "):
            context = typer.Context(typer.main.get_command(app), info_name="bpkd")
            _, *arguments = shlex.split(line, comments=True)
            while hasattr(context.command, "commands"):
                name, *arguments = arguments
                context = typer.Context(context.command.commands[name], parent=context, info_name=name)
            context.command.make_context(name, arguments, parent=context.parent)


@pytest.fixture(scope="module")
def imports():
    """The graph of all imports of the package, those within functions included."""
    return grimp.build_graph("bpkd_sdk", exclude_type_checking_imports=True, cache_dir=None)


def test_imports_point_down_the_floors(imports):
    picture = re.search(r"## The floors\n.*?```text\n(.*?)```", ARCHITECTURE.read_text(), re.DOTALL)[1]
    floors = [set(line.split("  ")[0].split(" | ")) for line in picture.splitlines()]
    drawn = {f"bpkd_sdk.{name}" for floor in floors for name in floor}
    assert drawn == imports.find_children("bpkd_sdk")
    wrong = imports.find_illegal_dependencies_for_layers(layers=floors, containers={"bpkd_sdk"})
    assert not wrong, wrong


def test_no_modules_import_each_other_in_a_circle_when_they_are_loaded(imports):
    def is_loaded_first(importer, imported):
        lines = Path(importlib.util.find_spec(importer).origin).read_text().splitlines()
        details = imports.get_import_details(importer=importer, imported=imported)
        return any(lines[detail["line_number"] - 1].startswith(("import", "from")) for detail in details)

    edges = {
        importer: [
            name for name in imports.find_modules_directly_imported_by(importer) if is_loaded_first(importer, name)
        ]
        for importer in imports.modules
    }
    assert sum(map(len, edges.values())) > 300
    graphlib.TopologicalSorter(edges).prepare()  # CycleError names the circle


def test_the_examples_of_where_to_add_run(tmp_path, monkeypatch):
    for kind, shape in (("images", (8, 8, 3)), ("labels", (8, 8))):
        (tmp_path / "fields" / kind / "train").mkdir(parents=True)
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "fields" / kind / "train" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)
    for table, key in ((METHODS, "l1"), (ZOO, "deeplabv3plus_r18"), (DATASETS, "fields")):
        monkeypatch.setitem(table, key, None)  # so that the entry is removed after the test
    module = ModuleType("bpkd_sdk.runtime.matrix")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    blocks = python_blocks(ARCHITECTURE)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(ARCHITECTURE), "exec"), vars(module))  # noqa: S102


def test_the_citation_and_the_forms_are_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == bpkd_sdk.__version__
    assert f"\n## [{bpkd_sdk.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == project["license"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(form.read_text()).keys()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == ["bash .ci/run"]


def test_release_notes_are_the_section_of_the_tag():
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci" / "release_notes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    changelog = "# Changelog\n\n## [1.2.0] - 2030-01-31\n\nNew.\n\n### Added\n\n## [1.1.0] - 2029-01-31\n\nOld.\n"
    assert script.release_notes("v1.2.0", "1.2.0", changelog) == "New.\n\n### Added"
    assert script.release_notes("v1.1.0", "1.1.0", changelog) == "Old."
    with pytest.raises(SystemExit, match="Expected the tag v1.2.0"):
        script.release_notes("v1.1.0", "1.2.0", changelog)
    with pytest.raises(SystemExit, match="YYYY-MM-DD"):
        script.release_notes("v1.2.0", "1.2.0", changelog.replace("2030-01-31", "unreleased"))

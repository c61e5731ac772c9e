"""Run the tests of what changed since this branch left main, for at most 75 seconds. `make check` calls it.

The tests of a package are in the folder of the same name. If no changed file has tests, the fastest files run.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 75
FASTEST = (
    "test_files.py", "test_doctor.py", "test_boundary.py", "recipes/test_table.py",
    "comparison/test_summary.py", "data/test_folder.py", "data/test_cityscapes.py", "data/test_pascal_context.py",
    "evaluation/test_metrics.py", "evaluation/test_evaluate.py", "losses/test_bpkd.py", "losses/test_cwd.py",
    "losses/test_ifvd.py", "losses/test_composition.py", "losses/test_methods.py", "models/test_checkpoint.py",
    "models/test_heads.py", "runtime/test_manifest.py", "serve/test_overlay.py", "serve/test_malformed.py",
    "serve/test_access.py", "test_documents.py",
)  # fmt: skip


class TimeLimit:
    """Pytest plugin that stops the run at the end of the first test that exceeds the limit, without a failure."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = f"{SECONDS} seconds are over; `make test` runs the rest"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.shouldstop:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if session.testsfailed else pytest.ExitCode.OK


def changed_files() -> list[str]:
    """Return the paths that differ from the commit where this branch left main, uncommitted ones included."""
    base = git("merge-base", "HEAD", "main") or ["HEAD"]
    return sorted({*git("diff", "--name-only", *base), *git("ls-files", "--others", "--exclude-standard")})


def git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def tests_of(path: str) -> list[Path]:
    """Return the test files of a changed file; for a module, the test file of the same name comes first."""
    file = Path(path)
    if file.parts[0] == "tests":
        return [ROOT / file] if file.name.startswith("test_") else []
    if file.suffix == ".md":
        return [ROOT / "tests" / "test_documents.py"]
    parts = file.parts[1:] if file.parts[0] == "bpkd_sdk" else file.parts
    package = Path(parts[0]).stem
    tests = [ROOT / "tests" / f"test_{package}.py", *sorted((ROOT / "tests" / package).glob("test_*.py"))]
    return sorted(tests, key=lambda test: test.stem != f"test_{file.stem}")


def main() -> int:
    found = [test for path in changed_files() for test in tests_of(path) if test.is_file()]
    tests = list(dict.fromkeys(found)) or [ROOT / "tests" / name for name in FASTEST]
    return pytest.main(["-q", *map(str, tests)], plugins=[TimeLimit(SECONDS)])


if __name__ == "__main__":
    sys.exit(main())

"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import experiments

PACKAGE = Path(experiments.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


def failures(tests: list[doctest.DocTest]) -> tuple[int, str]:
    """Run the examples; return how many there were and what the failing ones printed."""
    printed: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    attempted = sum(runner.run(test, out=printed.append).attempted for test in tests)
    return attempted, "".join(printed)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    attempted, printed = failures(doctest.DocTestFinder(exclude_empty=True).find(module))
    assert attempted == Path(module.__file__).read_text().count(">>> ")
    assert not printed, printed


def test_examples_are_found_and_can_fail() -> None:
    assert "experiments.data.augmentation" in MODULES
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    attempted, printed = failures([wrong])
    assert attempted == 1
    assert "Got:\n    2" in printed

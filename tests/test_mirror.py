"""A test file in a room stands for the source file of its name."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "simqat_jax"
ROOMS = sorted(
    {p.relative_to(TESTS).parts[0] for p in TESTS.rglob("*/test_*.py")} - {"experiments"}
)
STANDS_FOR_SEVERAL = {
    "targets/test_operations.py": (
        "targets/onnx/ops.py",
        "targets/tflite/ops.py",
        "targets/tflite/layers.py",
    ),
    "targets/test_primitives.py": ("targets/onnx/primitives.py", "targets/tflite/primitives.py"),
    "targets/test_whole.py": ("targets/onnx/whole.py", "targets/tflite/whole.py"),
}
"""One table of operations for all targets, which each of them must pass."""


def sources(test: Path) -> tuple[str, ...]:
    """The source files that a test file stands for, relative to the package."""
    name = test.relative_to(TESTS)
    mirrored = name.with_name(name.name.removeprefix("test_")).as_posix()
    return STANDS_FOR_SEVERAL.get(name.as_posix(), (mirrored,))


@pytest.mark.parametrize("room", ROOMS)
def test_every_test_file_of_a_room_has_a_source_file(room):
    tests = sorted((TESTS / room).rglob("test_*.py"))
    assert tests
    missing = [s for test in tests for s in sources(test) if not (PACKAGE / s).is_file()]
    assert not missing


def test_exceptions_are_no_longer_than_they_must_be():
    for name in STANDS_FOR_SEVERAL:
        test = TESTS / name
        assert test.is_file()
        assert not (
            PACKAGE / test.relative_to(TESTS).with_name(test.name.removeprefix("test_"))
        ).exists()

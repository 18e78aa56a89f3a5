"""Codes that go in and out, whatever the type of those inside; what files may be called."""

import numpy as np
import pytest
from models import export
from single_operations import both, operation

import simqat_jax as sq
from simqat_jax.files import EXPORTED
from simqat_jax.ir.program import Program, Tensor
from simqat_jax.targets import TARGETS

GRIDS = [
    sq.Grid(scale=float(np.float32(scale)), zero_point=zero, qmin=qmin, qmax=qmax)
    for scale in (1 / 255, 0.1, 1 / 3, 0.0041743, 3e-6, 517.3)
    for zero, qmin, qmax in ((0, 0, 255), (255, 0, 255), (131, 0, 255), (0, -127, 127), (3, 0, 7))
]


def copying(backend: str) -> sq.IntegerModel:
    """A model that returns its inputs, one on each of the grids, by way of an operation."""
    ends = [Tensor(f"t{k}", (-1, 4), "float32", grid) for k, grid in enumerate(2 * GRIDS)]
    count = len(GRIDS)
    ops = [
        operation("clip", (k,), (count + k,), {"clamp": [grid.qmin, grid.qmax]}, path=f"clip{k}")
        for k, grid in enumerate(GRIDS)
    ]
    program = Program(
        tensors=tuple(ends),
        ops=tuple(ops),
        inputs=tuple(range(count)),
        outputs=tuple(range(count, 2 * count)),
        structure=list(range(count)),
        backend=backend,
        metadata={},
    )
    program.validate()
    return sq.IntegerModel(program)


@both
@pytest.mark.parametrize("io", ["int8", "uint8"])
@pytest.mark.versions
def test_every_code_of_every_grid(backend, io, tmp_path):
    model, path = copying(backend), tmp_path / f"m.{backend}"
    export(model, path, integer_io=io)
    file = sq.open_file(path, isolated=False)
    assert file.input_types == (io,) * len(GRIDS)
    codes = [np.resize(np.arange(g.qmin, g.qmax + 1), (64, 4)).astype(g.dtype) for g in GRIDS]
    stored = [grid.in_file(c, io) for c, grid in zip(codes, GRIDS, strict=True)]
    for grid, code, one, found in zip(GRIDS, codes, stored, file.run(stored), strict=True):
        assert one.dtype == found.dtype == io
        signed = code.astype(np.int32) - (128 if grid.qmin >= 0 else 0)
        np.testing.assert_array_equal(found, signed if io == "int8" else signed + 128)
        np.testing.assert_array_equal(grid.of_file(found), code)


def test_what_writes_each_kind_of_file():
    assert {target.suffix: f"export_{target.suffix[1:]}" for target in TARGETS.values()} == EXPORTED


@both
@pytest.mark.parametrize("own", [str, str.upper])
def test_a_name_of_another_kind_of_file(backend, own, tmp_path):
    model, other = copying(backend), "tflite" if backend == "onnx" else "onnx"
    wrong, right = tmp_path / f"m.{own(other)}", tmp_path / f"m.{own(backend)}"
    remedy = rf"m\.{own(other)} .* export_{other} writes .* such as .*m\.{backend}\.$"
    with pytest.raises(ValueError, match=remedy):
        export(model, wrong)
    for path in (wrong, right):
        with pytest.raises(ValueError, match=r"Call that, or give another name\.$"):
            model.save(path)
    export(model, right)
    assert list(tmp_path.iterdir()) == [right]


@both
@pytest.mark.parametrize("name", ["m", "m.v2"])
def test_a_name_that_says_nothing(backend, name, tmp_path):
    export(copying(backend), tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"{name}.{backend}")
    assert sq.open_file(tmp_path / f"{name}.{backend}", isolated=False).input_types

"""Codes that go in and out as int8 or as uint8, whatever the type of those inside."""

import numpy as np
import pytest
from models import export
from single_operations import both, operation

import simqat_jax as sq
from simqat_jax.ir.program import Program, Tensor

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


def test_a_file_is_not_called_as_one_of_another_kind(tmp_path):
    other = {"onnx": "tflite", "tflite": "onnx"}
    for backend in other:
        path = tmp_path / f"m.{other[backend]}"
        with pytest.raises(ValueError, match=f"with .{backend}, or call export_{other[backend]}"):
            export(copying(backend), path)
        assert not path.exists()

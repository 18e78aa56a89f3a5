"""A program says itself whether it can run."""

import dataclasses

import numpy as np
import pytest
from single_operations import operation

import simqat_jax as sq
from simqat_jax.ir.program import Program, Tensor

GRID = sq.Grid(0.1, 0, 0, 255)


def clip(source, target):
    return operation("clip", (source,), (target,), {"clamp": [1, 9]}, path=f"to_{target}")


def chain(**changes):
    """Two clips, one behind the other: tensor 0 to 1 to 2."""
    program = Program(
        tensors=tuple(Tensor(f"t{n}", (-1, 4), "float32", GRID) for n in range(3)),
        ops=(clip(0, 1), clip(1, 2)),
        inputs=(0,),
        outputs=(2,),
        structure=0,
        backend="tflite",
        metadata={},
    )
    return dataclasses.replace(program, **changes)


def test_a_program_that_runs_is_valid():
    chain().validate()
    codes = np.arange(8, dtype=np.uint8).reshape(2, 4)
    got = sq.IntegerModel(chain()).run_codes(codes)
    np.testing.assert_array_equal(got, np.clip(codes, 1, 9))


def test_a_constant_is_there_from_the_beginning():
    constant = dataclasses.replace(chain().tensors[0], value=np.zeros((1, 4), np.uint8))
    chain(inputs=(), tensors=(constant, *chain().tensors[1:])).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": (clip(1, 2), clip(0, 1))}, r"to_2 \(clip\).*\[1\]"),
        ({"inputs": ()}, r"to_1 \(clip\).*\[0\]"),
        ({"ops": (clip(0, 2),), "outputs": (1,)}, r"nothing makes: \[1\]"),
        ({"outputs": (7,)}, r"nothing makes: \[7\]"),
        ({"ops": (clip(0, 1), clip(1, 7)), "outputs": (1,)}, r"no tensors: \[7\]"),
        ({"inputs": (0, -1)}, r"no tensors: \[-1\]"),
        ({"ops": (clip(0, 1), clip(1, 2), clip(0, 2))}, r"to_2 \(clip\)"),
        ({"ops": (clip(0, 0), clip(0, 2))}, r"to_0 \(clip\)"),
    ],
    ids=[
        *("read before it is made", "an input left out", "an output left out"),
        *("an output of no tensor", "a result of no tensor", "an input of no tensor"),
        *("made twice", "an input written over"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        chain(**changes).validate()

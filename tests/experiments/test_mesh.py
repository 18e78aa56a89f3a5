"""A training state on a mesh: what lies where, and that it is trained as on one device."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from jax.sharding import PartitionSpec

import simqat_jax as sq
from experiments import checkpoints, mesh, phases, training
from experiments.errors import ExperimentError
from experiments.steps import make_train_step

MESHES = ("data=1", "data=8", "data=4,model=2")
ROOT = Path(__file__).parents[2]


def test_eight_devices_train_as_one_does() -> None:
    """In a process that has eight, and that compiles quickly."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    subprocess.run([sys.executable, __file__], env=env, check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2", r"--mesh data=2 is of 2 devices, and there are 1: .*device_count=2"),
        ("batch=1", r"--mesh batch=1: unknown axis 'batch'; known: data .* and model"),
        ("data", r"--mesh data: write it like data=8"),
        ("data=0", r"--mesh data=0: write it like"),
        ("data=1,data=1", r"the axis data stands there twice"),
        ("", r"write it like"),
    ],
)
def test_meshes_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        mesh.parse(text)


def test_all_devices_are_on_the_axis_data() -> None:
    assert str(mesh.parse(None)) == f"data={jax.device_count()}"
    assert mesh.parse("model=1").shards == 1


def _phase(directory: Path, text: str = "data=1", **options: Any) -> phases.Phase:
    experiment = dataclasses.replace(tiny_run.experiment(), **options)
    return phases.build("qat", experiment, tiny_run.dataset(), directory, layout=mesh.parse(text))


def _assert_close(one: Any, other: Any, rtol: float, atol: float) -> None:
    def compare(path: tuple, a: Any, b: Any) -> None:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(mesh.whole(a), mesh.whole(b), rtol, atol, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, one, other)


def _one_step(phase: phases.Phase) -> tuple[phases.TrainState, jax.Array]:
    size = phase.experiment.batch_size
    batch = next(iter(phase.dataset.train_batches(size, 0, 0)))
    state = phase.layout.place(phases.init_state(phase))
    return make_train_step(phase)(state, phase.layout.put(batch, size))


def check_a_step_is_that_of_one_device(directory: Path) -> None:
    """Ranges, BatchNorm's statistics, parameters and momentum, of a batch in two parts."""
    for options, meshes in (({"accumulate": 2}, MESHES), ({"dtype": "bfloat16"}, MESHES[::2])):
        one, *others = (_one_step(_phase(directory, text, **options)) for text in meshes)
        exact = options.get("dtype") != "bfloat16"  # whose sums differ in the 8th bit
        for state, loss in others:
            rtol, atol = (1e-6, 1e-6) if exact else (2e-2, 2e-2)
            _assert_close((one[0], one[1]), (state, loss), rtol, atol)
            assert int(state.collections["quant_stats"]["step"]) == 1


def check_kernels_are_divided(directory: Path) -> None:
    """By path: momentum as its parameter; and they stay so."""
    state, _ = _one_step(_phase(directory, "data=4,model=2"))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    divided = {path: spec for path, spec in found.items() if spec != PartitionSpec()}
    assert divided.keys() == {
        f"{where}/{layer}/kernel"
        for where in ("params", "opt_state/0/trace")
        for layer in ("Conv_0", "Dense_0")
    }
    assert divided["params/Conv_0/kernel"] == PartitionSpec(None, None, None, "model")
    layout = mesh.parse("data=1,model=8")
    spec = functools.partial(layout.spec, "params/MultiHeadDotProductAttention_0/query/kernel")
    assert spec((32, 16, 4)) == PartitionSpec(None, "model", None)
    assert spec((32, 4, 16)) == PartitionSpec()  # 4 heads on 8 devices
    out = layout.spec("params/MultiHeadDotProductAttention_0/out/kernel", (8, 4, 32))
    assert out == PartitionSpec("model", None, None)


def check_a_run_goes_on_anywhere(directory: Path) -> None:
    """A checkpoint holds the same bits on any mesh, and training ends as on one device."""
    ends = []
    one, many = MESHES[::2]
    for text in (one, many):
        phase = _phase(directory / "whole" / text, text)
        ends.append(
            training.train(phase, phases.init_state(phase), lambda progress, state: None)[0]
        )
    _assert_close(ends[0].params, ends[1].params, 1e-3, 1e-4)
    written = _phase(directory / "whole" / many)
    (step, _), last = sorted((int(p.name), p) for p in written.directory.iterdir())
    state, progress = checkpoints.restore(written.directory, step, phases.init_state(written))
    for text in (one, many):
        phase = _phase(directory / "moved" / text, text)
        placed = phase.layout.place(state)
        checkpoints.save(phase.directory, step, placed, progress, keep=2)
        again, _ = checkpoints.restore(phase.directory, step, phases.init_state(phase))
        jax.tree.map(np.testing.assert_array_equal, again, state)
        end, _ = training.train(phase, phases.init_state(phase), lambda progress, state: None)
        _assert_close(ends[1].params, end.params, 1e-3, 1e-4)
        if text == many:
            jax.tree.map(np.testing.assert_array_equal, ends[1], end)
    _, newest = last
    next((newest / "state" / "d").iterdir()).unlink()
    with pytest.raises(ExperimentError, match=f"^checkpoint {re.escape(str(newest))} is corrupt"):
        checkpoints.restore(written.directory, int(newest.name), state)


def check_sharded_variables_calibrate_convert_and_export(directory: Path) -> None:
    """To the codes and files of the same variables on one device."""
    images = tiny_run.dataset().test_images[:16]
    layout = mesh.parse("data=4,model=2")
    qmodel = sq.SimQAT().apply(tiny_run.Tiny())
    variables = qmodel.init(jax.random.key(0), images)
    local = sq.calibrate(qmodel, variables, [images])
    (x,) = layout.put((images,), len(images))
    placed = sq.calibrate(qmodel, layout.place(variables), [x])
    _assert_close(local["quant_stats"], placed["quant_stats"], 1e-6, 1e-7)
    placed = layout.place(local)
    evaluated = np.asarray(jax.jit(qmodel.apply)(placed, x))
    np.testing.assert_array_equal(evaluated, np.asarray(jax.jit(qmodel.apply)(local, images)))
    exports: dict[str, Callable] = {"onnx": sq.export_onnx, "tflite": sq.export_tflite}
    for backend, export in exports.items():
        models = [sq.convert(qmodel, v, images, backend=backend) for v in (local, placed)]
        np.testing.assert_array_equal(np.asarray(models[1](x)), evaluated)
        paths = [directory / f"{i}.{backend}" for i in range(2)]
        for model, path in zip(models, paths, strict=True):
            export(model, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert sq.verify(models[1], paths[1], images).differing == 0


if __name__ == "__main__":
    assert jax.device_count() == 8
    for check in (
        check_a_step_is_that_of_one_device,
        check_kernels_are_divided,
        check_a_run_goes_on_anywhere,
        check_sharded_variables_calibrate_convert_and_export,
    ):
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))

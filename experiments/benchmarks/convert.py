"""Time and memory of what leads from a float model to its files, against the model's size.

Each model runs in a process of its own, which has compiled nothing before. Seconds are of the
processor (all cores): what counts where others use the machine. Memory is what a call takes at most
beside what was held before it, over that of the float parameters.

Example:
  python -m experiments.benchmarks.convert --models resnet8 resnet20 resnet50
  python -m experiments.benchmarks.convert --models vit_ti vit_s vit_b
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tyro

import simqat_jax as sq
from experiments.benchmarks.memory import Taken, taken
from experiments.benchmarks.records import HISTORY, Row, report
from experiments.benchmarks.timing import Figure
from experiments.errors import check_models, run_or_exit
from experiments.models import ResNet8, ResNet18, ResNet20, ResNet50, VisionTransformer
from experiments.models.resnet import BottleneckBlock, ResNet

_LARGE, _SMALL = (224, 224, 3), (32, 32, 3)
_ImageNet = functools.partial(ResNet, block=BottleneckBlock, cifar_stem=False, num_classes=1000)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet8": (ResNet8, _SMALL),
    "resnet20": (ResNet20, _SMALL),
    "resnet18": (functools.partial(ResNet18, cifar_stem=False, num_classes=1000), _LARGE),
    "resnet50": (functools.partial(ResNet50, cifar_stem=False, num_classes=1000), _LARGE),
    "resnet101": (functools.partial(_ImageNet, stage_sizes=(3, 4, 23, 3)), _LARGE),
    "resnet152": (functools.partial(_ImageNet, stage_sizes=(3, 8, 36, 3)), _LARGE),
    "vit_ti": (functools.partial(VisionTransformer, width=192, heads=3), _LARGE),
    "vit_s": (VisionTransformer, _LARGE),
    "vit_b": (functools.partial(VisionTransformer, width=768, heads=12), _LARGE),
}
"""By name: the model, and the shape of one image."""
STAGES = ("init", "plan", "calibrate", "convert", "export_onnx", "export_tflite")


def measure(module: nn.Module, image: Sequence[int], folder: Path) -> dict[str, dict[str, float]]:
    """Return seconds, and memory over the parameters', of each stage, and the model's size.

    Args:
      module: the float model, of `train`.
      image: shape of one image.
      folder: where its files go.
    """
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, *image)))
    qmodel = sq.SimQAT().apply(module)
    done: dict[str, Taken[Any]] = {}

    def run(stage: str, function: Callable[[], Any]) -> Any:
        done[stage] = taken(lambda: jax.block_until_ready(function()))
        return done[stage].result

    variables = run("init", functools.partial(jax.jit(qmodel.init), jax.random.key(1), x))
    run("plan", lambda: qmodel.plan(variables, x, train=False))
    variables = run("calibrate", lambda: sq.calibrate(qmodel, variables, [x], train=False))
    model = run("convert", lambda: sq.convert(qmodel, variables, x, train=False))
    run("export_tflite", lambda: sq.export_tflite(model, folder / "int8.tflite"))
    other = sq.convert(qmodel, variables, x, backend="onnx", train=False)
    run("export_onnx", lambda: sq.export_onnx(other, folder / "int8.onnx"))
    params = sum(a.nbytes for a in jax.tree.leaves(variables["params"]))
    layers = sum(op.kind in ("conv", "dense") for op in model.ops)
    found = {"size": {"MB": params / 1e6, "layers": float(layers)}}
    for stage, t in done.items():
        found[stage] = {"s": t.processor} | ({} if t.peak is None else {"memory": t.peak / params})
    return found


def _row(name: str, found: Mapping[str, Mapping[str, float]]) -> Row:
    size, figures = found["size"], {}
    for stage in STAGES:
        seconds = found[stage]["s"]
        figures[f"{stage}, s"] = Figure.exactly(seconds)
        if stage == "convert":
            figures["convert, ms a layer"] = Figure.exactly(1e3 * seconds / size["layers"])
        if "memory" in found[stage]:
            figures[f"{stage}, memory / parameters"] = Figure.exactly(found[stage]["memory"])
    case = {"model": name, "layers": f"{size['layers']:.0f}", "MB": f"{size['MB']:.1f}"}
    return Row(case=case, figures=figures)


def main(
    models: tuple[str, ...] = ("resnet8", "resnet20"),
    alone: bool = False,
    history: Path | None = HISTORY,
) -> None:
    """Print processor seconds and memory of each stage, and the milliseconds of `convert` a layer.

    Args:
      models: resnet8, 18, 20, 50, 101 or 152; vit_ti, vit_s, vit_b.
      alone: measure one in this process, and print it as JSON.
      history: JSON lines to add to; "None": nowhere.

    Raises:
      ExperimentError: an unknown model.
    """
    check_models(models, MODELS)
    if alone:
        make, image = MODELS[models[0]]
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(make(), image, Path(folder))))
        return
    rows = []
    for name in models:
        command = [sys.executable, "-m", "experiments.benchmarks.convert", "--alone"]
        process = subprocess.run([*command, "--models", name], stdout=subprocess.PIPE, check=True)
        rows.append(_row(name, json.loads(process.stdout.splitlines()[-1])))
    title = f"from a float model to its files, processor seconds, jax {jax.__version__}"
    report("convert", title, rows, history)


if __name__ == "__main__":
    run_or_exit(lambda: tyro.cli(main))

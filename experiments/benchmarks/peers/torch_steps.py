"""Training steps with PyTorch's tools; `peers.train_step` runs it in `make peers-torch`'s Python.

Source:
  torch.ao's FX quantization (BSD), torchao's PT2E (BSD), Brevitas (BSD), NNCF (Apache-2.0), of
  which this uses the public functions, with their defaults for x86 processors.
"""

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.peers.orders import batches, test_batches
from experiments.benchmarks.peers.torch_models import PLAIN, LeNet5, ResNet20
from experiments.benchmarks.timing import timed

Quantized = tuple[Any, Callable[[Any], Any] | None]
"""A model to train, and what converts it to integers."""
_MODELS: dict[str, tuple[type, tuple[int, int, int]]] = {
    "lenet5": (LeNet5, (1, 32, 32)),
    "resnet20": (ResNet20, (3, 32, 32)),
}


def _fx(make: Callable[..., Any], x: Any) -> Quantized:
    from torch.ao.quantization import (  # pyright: ignore[reportMissingImports]
        get_default_qat_qconfig_mapping,
        quantize_fx,
    )

    mapping = get_default_qat_qconfig_mapping("x86")
    model = quantize_fx.prepare_qat_fx(make(PLAIN).train(), mapping, (x,))
    return model, lambda model: quantize_fx.convert_fx(copy.deepcopy(model).eval())


def _pt2e(make: Callable[..., Any], x: Any) -> Quantized:
    from torchao.quantization import pt2e  # pyright: ignore[reportMissingImports]
    from torchao.quantization.pt2e import quantize_pt2e  # pyright: ignore[reportMissingImports]
    from torchao.quantization.pt2e.quantizer import (  # pyright: ignore[reportMissingImports]
        x86_inductor_quantizer as x86,
    )

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(make(PLAIN).train(), (x,)).module()
    model = quantize_pt2e.prepare_qat_pt2e(exported, quantizer)

    def convert(model: Any) -> Any:
        converted = quantize_pt2e.convert_pt2e(copy.deepcopy(model))
        return pt2e.move_exported_model_to_eval(converted)

    return model, convert


def _brevitas(make: Callable[..., Any], x: Any) -> Quantized:
    import brevitas.nn as qnn  # pyright: ignore[reportMissingImports]

    del x
    layers = {
        "conv": qnn.QuantConv2d,
        "linear": qnn.QuantLinear,
        "relu": qnn.QuantReLU,
        "identity": qnn.QuantIdentity,
    }
    return make(layers).train(), None


def _nncf(make: Callable[..., Any], x: Any) -> Quantized:
    # It compiles an extension first, which takes minutes where others use the machine.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    import nncf  # pyright: ignore[reportMissingImports]

    return nncf.quantize(make(PLAIN).eval(), nncf.Dataset([x])).train(), None


FRAMEWORKS: dict[str, Callable[[Callable[..., Any], Any], Quantized]] = {
    "torch.ao, FX": _fx,
    "torchao, PT2E": _pt2e,
    "Brevitas": _brevitas,
    "NNCF": _nncf,
}


class _Step:
    """A model with momentum SGD, and a batch to learn again and again."""

    def __init__(self, model: Any, x: Any, y: Any):
        self.model, self.batch = model, (x, y)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def __call__(self) -> None:
        self.learn(*self.batch)

    def learn(self, x: Any, y: Any) -> None:
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def _evaluated(model: Any, images: list[np.ndarray]) -> np.ndarray:
    """Return the classes that a model names."""
    with torch.no_grad():
        return np.concatenate([model(_channels_first(x)).argmax(1).numpy() for x in images])


def _channels_first(x: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def _to_eval(model: Any) -> Any:
    try:
        return model.eval()
    except NotImplementedError:  # exported ones have a function of their own
        from torchao.quantization import pt2e  # pyright: ignore[reportMissingImports]

        return pt2e.move_exported_model_to_eval(model)


def main(name: str, batch_size: int, rounds: int, data: str) -> None:
    """Print what the steps take, as JSON: the float one first; of what fails its error.

    Args:
      name: of the model.
      batch_size: images in a step.
      rounds: interleaved timings of each step.
      data: images to learn for two epochs; "": none.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    make, image = _MODELS[name]
    x, y = torch.randn(batch_size, *image), torch.randint(0, 10, (batch_size,))
    steps, converts, found = {"PyTorch, float": _Step(make().train(), x, y)}, {}, {}
    for framework, quantize in FRAMEWORKS.items():
        try:
            model, converts[framework] = quantize(make, x)
            steps[framework] = _Step(model, x, y)
            steps[framework]()
        except Exception as error:  # of any tool: the others are measured
            steps.pop(framework, None)
            found[framework] = {"error": f"{type(error).__name__}: {error}"[:200]}
    for step, times in timed(steps, rounds).items():
        found[step] = {"wall": times.wall.tolist(), "processor": times.processor.tolist()}
    if data:
        arrays = dict(np.load(data))
        images, labels = test_batches(arrays, batch_size)
        for framework in steps:
            model, convert = make().train(), converts.get(framework)
            if framework in FRAMEWORKS:
                model, convert = FRAMEWORKS[framework](make, x)
            step = _Step(model, x, y)
            for images_, labels_ in batches(arrays, batch_size):
                step.learn(_channels_first(images_), torch.from_numpy(labels_).long())
            converted = convert(model) if convert else None
            classes = _evaluated(_to_eval(model), images)
            found[framework]["accuracy"] = float((classes == labels).mean())
            if converted is not None:
                changed = _evaluated(converted, images) != classes
                found[framework] |= {"changed": int(changed.sum()), "of": len(labels)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

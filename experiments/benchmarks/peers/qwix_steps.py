"""Training steps with qwix; `experiments.benchmarks.peers.train_step` runs it by another Python.

Source:
  qwix (Apache-2.0): its providers for quantized training, with static scales of activations, and
  for on-device models.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
import qwix  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.peers.lessons import accuracy, taught
from experiments.benchmarks.timing import timed
from experiments.benchmarks.trainer import Trainer
from experiments.models import LeNet5, ResNet20

_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet5": (LeNet5, (32, 32, 1)),
    "resnet20": (ResNet20, (32, 32, 3)),
}


def _quantized(module: nn.Module) -> dict[str, nn.Module]:
    eight: Any = {"module_path": ".*", "weight_qtype": "int8", "act_qtype": "int8"}
    static = qwix.QtRule(**eight, act_static_scale=True)
    return {
        "qwix, Qt static": qwix.quantize_model(module, qwix.QtProvider([static])),
        "qwix, ODML": qwix.quantize_model(
            module, qwix.OdmlQatProvider([qwix.QuantizationRule(**eight)])
        ),
    }


def main(name: str, batch_size: int, rounds: int, data: str) -> None:
    """Print what the steps take, as JSON: the float one first.

    Args:
      name: of the model.
      batch_size: images in a step.
      rounds: interleaved timings of each step.
      data: images to learn for two epochs; "": none.
    """
    make, image = _MODELS[name]
    trainers = {"qwix, float": Trainer(make(), image, batch_size)}
    for quantized, module in _quantized(make()).items():  # whose `init` does not compile
        trainers[quantized] = Trainer(module, image, batch_size, init_compiled=False)
    for trainer in trainers.values():
        trainer.trace()
        trainer.compile()
    found = {}
    for step, times in timed(trainers, rounds).items():
        found[step] = {"wall": times.wall.tolist(), "processor": times.processor.tolist()}
    if data:
        for step, trainer in trainers.items():
            found[step]["accuracy"] = accuracy(*taught(trainer, dict(np.load(data)), batch_size))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

"""The networks that benchmarks time."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn

from experiments.models import LeNet5, ResNet20, ResNet50, VisionTransformer


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is exported and timed.

    Attributes:
      model: the float model.
      image: shape of one image.
      batches: batch sizes to time.
      calls: calls in one timing, for each of `batches`.
    """

    model: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batches: tuple[int, ...]
    calls: tuple[int, ...]


WORKLOADS = {
    "lenet5": Workload(LeNet5, (32, 32, 1), (1, 64), (200, 10)),
    "resnet20": Workload(ResNet20, (32, 32, 3), (1, 64), (20, 1)),
    "resnet50": Workload(
        functools.partial(ResNet50, cifar_stem=False, num_classes=1000), (224, 224, 3), (1,), (1,)
    ),
    "vit_s": Workload(VisionTransformer, (224, 224, 3), (1,), (1,)),
}

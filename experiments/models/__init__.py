"""Models in plain flax.linen: nothing in them knows of quantization."""

from experiments.models.lenet import LeNet5

__all__ = ["LeNet5"]

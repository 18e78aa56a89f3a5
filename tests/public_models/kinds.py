"""What a public model of a kind is, as a test needs it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Batch = tuple[jax.Array, ...]
"""The positional arguments of a call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Public:
    """A small model written as people publish that kind, and how it is called.

    Attributes:
      module: the float model.
      batch: makes the arguments of a call from a key.
      train: keyword arguments of a training step.
      evaluate: keyword arguments in evaluation.
    """

    module: nn.Module
    batch: Callable[[jax.Array], Batch]
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluate: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def with_train(module: nn.Module, batch: Callable[[jax.Array], Batch]) -> Public:
    """Return a model that takes `train`."""
    return Public(module=module, batch=batch, train={"train": True}, evaluate={"train": False})


def with_deterministic(module: nn.Module, batch: Callable[[jax.Array], Batch]) -> Public:
    """Return a model that takes `deterministic`."""
    return Public(
        module=module,
        batch=batch,
        train={"deterministic": False},
        evaluate={"deterministic": True},
    )


def images(size: int, channels: int = 3, count: int = 16) -> Callable[[jax.Array], Batch]:
    """Return what draws images: noise, a slope and an offset of its own for each, in [-2, 2]."""

    def draw(key: jax.Array) -> Batch:
        noise, slope, offset = (
            jax.random.normal(k, shape)
            for k, shape in zip(
                jax.random.split(key, 3),
                [(count, size, size, channels), (count, 1, 1, channels), (count, 1, 1, 1)],
                strict=True,
            )
        )
        ramp = jnp.linspace(-1, 1, size).reshape(1, size, 1, 1)
        pixels = jax.nn.sigmoid(0.5 * noise + slope * ramp + offset)
        return (4 * pixels - 2,)

    return draw


def rows(features: int, count: int = 8) -> Callable[[jax.Array], Batch]:
    """Return what draws vectors."""
    return lambda key: (jax.random.normal(key, (count, features)),)


def tokens(vocabulary: int, length: int, count: int = 64) -> Callable[[jax.Array], Batch]:
    """Return what draws token ids."""
    return lambda key: (jax.random.randint(key, (count, length), 0, vocabulary),)

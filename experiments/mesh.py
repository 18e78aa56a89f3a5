"""Devices as a mesh: where the rows of a batch and the parts of a training state lie.

Batches are divided over the axis `data`, kernels over the axis `model`, and all else is everywhere.
The step is the function of one device: XLA adds the communication, so that ranges and BatchNorm's
statistics are those of the whole batch.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data import ALL, Rows
from experiments.errors import ExperimentError

Tree = TypeVar("Tree")

DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which axis of the arrays whose path matches is divided over the axis `model`."""

    pattern: str
    axis: int


RULES = (
    Rule(r"(query|key|value)/kernel$", -2),  # heads, of (features, heads, features of a head)
    Rule(r"Attention_\d+/out/kernel$", -3),  # heads, of (heads, features of a head, features)
    Rule(r"kernel$", -1),  # output features
)
"""The first that matches decides; the path is that of a parameter or of its momentum."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what lies where on it."""

    mesh: jax.sharding.Mesh

    @property
    def alone(self) -> bool:
        """Whether there is one device: arrays stay where JAX puts them."""
        return self.mesh.size == 1

    @property
    def shards(self) -> int:
        """Parts that a batch is divided into."""
        return self.mesh.shape[DATA]

    def rows(self, size: int) -> Rows:
        """Return which rows of a batch of `size` the devices of this process hold, ascending."""
        if jax.process_count() == 1:
            return ALL
        places = self._batch(0).addressable_devices_indices_map((size,)).values()
        held = {row for place in places if place is not None for row in range(size)[place[0]]}
        return np.array(sorted(held))

    def put(self, batch: tuple[np.ndarray, ...], size: int, axis: int = 0) -> tuple[Any, ...]:
        """Return global arrays of the rows that this process has read.

        Args:
          batch: arrays with the rows that `rows(size)` names along `axis`.
          size: rows of the whole batch.
          axis: the axis of rows.
        """
        if self.alone:
            return batch
        sharding = self._batch(axis)
        held = np.arange(size)[self.rows(size)]

        def array(part: np.ndarray) -> jax.Array:
            shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])

            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "each shard has a place"
                start, stop, _ = index[axis].indices(size)
                first = int(np.searchsorted(held, start))
                return part[(*index[:axis], slice(first, first + stop - start))]

            return jax.make_array_from_callback(shape, sharding, shard)

        return tuple(array(part) for part in batch)

    def place(self, state: Tree) -> Tree:
        """Return a state that every process has the whole of, as global arrays."""
        if self.alone:
            return state

        def array(path: tuple, leaf: Any) -> jax.Array:
            host = np.asarray(leaf)
            sharding = self._sharding(path, leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree_util.tree_map_with_path(array, state)

    def constrain(self, state: Tree) -> Tree:
        """Return the state, inside a compiled function, laid out as `place` does."""
        if self.alone:
            return state
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.lax.with_sharding_constraint(leaf, self._sharding(path, leaf)),
            state,
        )

    def local(self, state: Tree) -> Tree:
        """Return the whole of a state on one device of each process."""
        if self.alone:
            return state
        return jax.tree.map(lambda leaf: jnp.asarray(whole(leaf)), state)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Return over which axes of the mesh an array of the state is divided.

        Args:
          path: its keys, such as `params/Dense_0/kernel`.
          shape: its shape. One that the axis `model` does not divide is on every device.
        """
        size = self.mesh.shape.get(MODEL, 1)
        axis = next((rule.axis for rule in RULES if re.search(rule.pattern, path)), None)
        if axis is None or len(shape) < 2 or len(shape) < -axis or shape[axis] % size:
            return PartitionSpec()
        spec: list[str | None] = [None] * len(shape)
        spec[axis] = MODEL if size > 1 else None
        return PartitionSpec(*spec)

    def _sharding(self, path: tuple, leaf: Any) -> NamedSharding:
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(self.mesh, self.spec(keys, leaf.shape))

    def _batch(self, axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, DATA))

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())


def one_device() -> Layout:
    """Return the layout of the first device alone."""
    return _layout({DATA: 1}, jax.local_devices())


def parse(text: str | None) -> Layout:
    """Return the layout that `--mesh` names.

    Args:
      text: such as `data=4,model=2`; None: all devices of all processes on the axis `data`.

    Raises:
      ExperimentError: an unknown axis, no size, more devices than there are, or not those of every
        process.
    """
    devices = jax.devices()
    if text is None:
        return _layout({DATA: len(devices)}, devices)
    sizes = _sizes(text)
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ExperimentError(
            f"--mesh {text} is of {count} devices, and there are {len(devices)}: give sizes whose "
            f"product is at most {len(devices)}. On a CPU XLA_FLAGS="
            f"--xla_force_host_platform_device_count={count} makes {count} devices of one."
        )
    if jax.process_count() > 1 and count < len(devices):
        raise ExperimentError(
            f"--mesh {text} is of {count} devices, and the {jax.process_count()} processes have "
            f"{len(devices)}: give sizes whose product is {len(devices)}, or start fewer processes."
        )
    return _layout(sizes, devices)


def whole(leaf: Any) -> np.ndarray:
    """Return all of an array; where no device of this process has all, every process must ask."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip())
        if match is None:
            raise ExperimentError(f"--mesh {text}: write it like data=8, or data=4,model=2.")
        if match[1] in sizes:
            raise ExperimentError(f"--mesh {text}: the axis {match[1]} stands there twice.")
        if match[1] not in (DATA, MODEL):
            raise ExperimentError(
                f"--mesh {text}: unknown axis {match[1]!r}; known: data (batches are divided over "
                "it) and model (kernels are)."
            )
        sizes[match[1]] = int(match[2])
    return {DATA: 1, **sizes}


def _layout(sizes: dict[str, int], devices: Sequence[Any]) -> Layout:
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    count = math.prod(sizes.values())
    return Layout(
        jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:count]
        )
    )

"""A model on integers: tensors with their grids, and operations on their codes."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.packing import packed_bytes
from simqat_jax.numerics.rounding import ROUNDINGS, Rounding

Shape = tuple[int, ...]
"""Lengths of a tensor; -k stands for k times the batch size."""
PyTree = Any
"""A tree of arrays as JAX understands it."""
Structure = PyTree
"""Dictionaries, lists and tuples with the index of an output for each leaf."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an integer model.

    Attributes:
      name: its quantizer's name where it is the first on a grid: "Conv_0/output".
      shape: its lengths; -k stands for k times the batch size.
      dtype: the float type of its real values (of another tensor: its type).
      grid: where its codes lie; None: it is no tensor on a grid.
      value: codes or values of a constant; it has length 1 where its shape has the batch size.
    """

    name: str
    shape: Shape
    dtype: str
    grid: Grid | None
    value: np.ndarray | None = None

    @property
    def repeats(self) -> bool:
        """Whether it is a constant that repeats along the batch."""
        return self.value is not None and any(d < 0 for d in self.shape)


class Need(NamedTuple):
    """What an array of an operation has to be.

    Attributes:
      dtypes: names of the types that it may have.
      shape: its lengths; None: any with which the operation runs.
      optional: it may be left out.
    """

    dtypes: tuple[str, ...]
    shape: Shape | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """An operation of an integer model. Its class says what it computes, and how.

    Attributes:
      path: where it stands in the Flax model: "Block_0/Conv_1".
      inputs: numbers of the tensors that it reads.
      outputs: numbers of the tensors that it makes.
      arrays: its weights: int8, int32 and multipliers in float32.
      kind: its name in files and tables.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    """The names that operations of this class may have in a file; the first is the default."""
    broadcasts: ClassVar[bool] = False
    """Whether an input of length 1 along the batch stands for one of full length."""

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", self.kinds[0])

    @property
    def attributes(self) -> dict[str, Any]:
        """What it needs to know besides its arrays, by name: strides, axes, clamp codes."""
        common = {f.name for f in dataclasses.fields(Op)} | {"function"}
        names = [f.name for f in dataclasses.fields(self) if f.name not in common]
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes of its weights as they are saved: codes of 2 and 4 bits are packed."""
        return sum(packed_bytes(a) for a in self.arrays.values())

    @property
    def computes_reals(self) -> bool:
        """Whether it computes with real values, where it reads any; moving them is none."""
        return False

    def rounds_as(self, rounding: Rounding) -> bool:
        """Whether it gives the codes of a runtime that rounds so; most do in every runtime."""
        del rounding
        return True

    def needs(self, c: "Context") -> Mapping[str, Need]:
        """Return what its arrays have to be, by name."""
        del c
        return {}

    def prepared(self, c: "Context") -> Mapping[str, np.ndarray]:
        """Return its arrays as `run` takes them, with what every call would compute of them."""
        del c
        return self.arrays

    def run(self, c: "Context", *inputs: jax.Array) -> Sequence[jax.Array]:
        """Compute the outputs, stored codes, from the inputs, stored codes."""
        raise NotImplementedError


Function = Callable[[Sequence[jax.Array], int], Sequence[jax.Array]]
"""From values and the batch size to values."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operation sees when it runs.

    Attributes:
      inputs: the tensors that it reads.
      outputs: the tensors that it makes.
      arrays: its arrays, prepared, as traced.
      batch: the batch size, maybe a symbolic one.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    arrays: Mapping[str, jax.Array]
    batch: int

    @property
    def grid(self) -> Grid:
        """Where the output's codes lie."""
        return grid_of(self.outputs[0])

    def in_grid(self, position: int = 0) -> Grid:
        """Return where an input's codes lie."""
        return grid_of(self.inputs[position])

    def shape(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Return lengths with the batch size in its places."""
        return at_batch(dims, self.batch)


def at_batch(dims: Sequence[int], batch: int) -> tuple[int, ...]:
    """Put the batch size into lengths of which -k stands for k times it."""
    return tuple(-d * batch if d < 0 else d for d in dims)


ArrayKey = tuple[str, Shape, bytes]


def array_key(array: np.ndarray) -> ArrayKey:
    """Return what is equal for equal arrays alone."""
    return array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest()


def joined(lengths: Sequence[int]) -> int:
    """Return the length of axes that are made one; negative where the batch is among them."""
    return abs(math.prod(lengths)) * (-1 if any(d < 0 for d in lengths) else 1)


def repeated(value: ArrayLike, dims: Sequence[int], batch: int) -> ArrayLike:
    """Return a constant with the batch size in its places; without any, as it is."""
    if all(d >= 0 for d in dims):
        return value
    return jnp.broadcast_to(value, at_batch(dims, batch))


def grid_of(tensor: Tensor) -> Grid:
    """Return where the codes of a tensor lie that has codes."""
    assert tensor.grid is not None, tensor.name
    return tensor.grid


@dataclasses.dataclass(frozen=True)
class Program:
    """A model on integers, as data.

    Attributes:
      tensors: every tensor, by number.
      ops: the operations, in order.
      inputs: numbers of the input tensors, one for each array of the call.
      outputs: numbers of the output tensors.
      structure: the outputs as they are returned, with an index of `outputs` for each.
      backend: whose rounding it mirrors: "tflite" or "onnx".
      metadata: library version and configuration.
    """

    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    structure: Structure
    backend: str
    metadata: Mapping[str, object]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and constants as they are saved: of equal ones once."""
        constants = [t.value for t in self.tensors if t.value is not None]
        whole = sum(op.nbytes for op in self.ops) + sum(a.nbytes for a in constants)
        sizes = [(array_key(a), packed_bytes(a)) for op in self.ops for a in op.arrays.values()]
        sizes += [(array_key(a), a.nbytes) for a in constants]
        return whole - (sum(size for _, size in sizes) - sum(dict(sizes).values()))

    @property
    def float_ops(self) -> tuple[Op, ...]:
        """The operations that compute on real values: they have no exact integer form."""

        def is_real(i: int) -> bool:
            return bool(jnp.issubdtype(jnp.dtype(self.tensors[i].dtype), jnp.floating))

        return tuple(op for op in self.ops if op.computes_reals and any(map(is_real, op.inputs)))

    @functools.cached_property
    def prepared(self) -> list[Mapping[str, np.ndarray]]:
        """The arrays of each operation as it takes them when it runs, see `Op.prepared`."""
        return [op.prepared(self.context(op)) for op in self.ops]

    def context(
        self, op: Op, arrays: Mapping[str, jax.Array] | None = None, batch: int = 1
    ) -> Context:
        """Return what an operation sees when it runs."""
        inputs, outputs = ([self.tensors[i] for i in ids] for ids in (op.inputs, op.outputs))
        return Context(inputs, outputs, arrays or {}, batch)

    def reads_thin(self, op: Op, i: int) -> bool:
        """Whether an operation takes a constant that repeats along the batch as it is held."""
        tensor = self.tensors[i]
        others = (self.tensors[n] for n in op.inputs if n != i)
        return (
            op.broadcasts
            and tensor.repeats
            and any(
                not other.repeats
                and all(a == b for a, b in zip(tensor.shape, other.shape, strict=True) if a < 0)
                for other in others
            )
        )

    def output_names(self) -> tuple[str, ...]:
        """Return a name for each output, as the model returns it: the keys of a dictionary.

        "output" for a single array, "output_0" in a list or tuple, "head/boxes" in dictionaries;
        no two are equal, and none is an input's.
        """
        names = dict(_named(self.structure, ""))
        taken = {self.tensors[i].name for i in self.inputs}
        unique: list[str] = []
        for k in range(len(self.outputs)):
            stem = names.get(k, f"output_{k}")
            numbers = itertools.chain([""], (f"_{n}" for n in itertools.count(2)))
            unique.append(next(stem + n for n in numbers if stem + n not in taken))
            taken.add(unique[-1])
        return tuple(unique)

    def validate(self) -> None:
        """Check that every tensor that is read has been made, and made once.

        Raises:
          ValueError: one has not, or a number that no tensor or no output has; an unknown backend.
        """
        if self.backend not in ROUNDINGS:
            raise ValueError(f"backend {self.backend!r} is none of {', '.join(ROUNDINGS)}.")
        made = {i for i, tensor in enumerate(self.tensors) if tensor.value is not None}
        made.update(self.inputs)
        for op in self.ops:
            missing = [i for i in op.inputs if i not in made]
            if missing:
                raise ValueError(f"{op.path} ({op.kind}) reads what nothing makes: {missing}.")
            again = [i for i in op.outputs if i in made]
            if again:
                raise ValueError(f"{op.path} ({op.kind}) makes what is there already: {again}.")
            made.update(op.outputs)
        strangers = [i for i in (*made, *self.outputs) if not 0 <= i < len(self.tensors)]
        unmade = [i for i in self.outputs if i not in made]
        if strangers or unmade:
            raise ValueError(f"outputs that nothing makes: {unmade}; no tensors: {strangers}.")
        returned = [k for k, _ in _named(self.structure, "")]
        beyond = [k for k in returned if not 0 <= k < len(self.outputs)]
        if beyond:
            raise ValueError(f"{len(self.outputs)} outputs, but numbers {beyond} are returned.")


def equal(one: Program, other: Program) -> bool:
    """Whether two programs are the same operations on the same numbers, bit for bit.

    A function that an operation holds is equal to itself alone.
    """
    return _as_data(one) == _as_data(other)


def _as_data(value: Any) -> Any:
    """Return what can be compared: arrays as bytes, dataclasses by their fields."""
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return array.dtype.str, array.shape, array.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _as_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value), fields
    if isinstance(value, Mapping):
        return {key: _as_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_data(item) for item in value]
    return value


def _named(structure: Structure, path: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the name of each output in a structure."""
    if isinstance(structure, int):
        yield structure, path or "output"
    elif isinstance(structure, Mapping):
        for key, value in structure.items():
            yield from _named(value, f"{path}/{key}" if path else key)
    elif isinstance(structure, list | tuple):
        for k, value in enumerate(structure):
            yield from _named(value, f"{path}/{k}" if path else f"output_{k}")

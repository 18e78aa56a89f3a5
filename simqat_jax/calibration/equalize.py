"""Equalize the ranges of two layers' channels where scaling commutes with what is between them."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.patches import columns, kernel_of, patches
from simqat_jax.calibration.variables import FloatVariables, FreeVariables
from simqat_jax.ir.graph import Clamp, Constant, Graph, Mean, Move, Operand, Product
from simqat_jax.ir.plan import Placement, Step
from simqat_jax.ir.program import PyTree
from simqat_jax.training.module import Method, QuantizedModule

_SWEEPS = 20
"""At most so many times over all pairs: a layer in the middle of two is scaled by both."""
_SETTLED = 1e-3
"""Relative change of a scale that is none."""


def equalize(
    qmodule: QuantizedModule,
    variables: VariableDict,
    *args: PyTree,
    method: Method = None,
    **kwargs: PyTree,
) -> dict[str, Any]:
    """Give the channels between two layers weights of one range; the float function stays.

    `W1[:, c] / s[c]`, `b1[c] / s[c]` and `W2[c, :] * s[c]` with `s = sqrt(r1 / r2)`, where `r` is
    the largest weight of channel c in either layer, its BatchNorm folded in; a BatchNorm behind the
    first layer takes its part in scale and bias. That helps where a kernel has one range for all
    channels (`QuantSpec(per_channel=False)`).

    A pair is two layers with nothing between them but what commutes with a positive factor for each
    channel: ReLU, pooling, mean, reshapes. Nothing else may read what is between, and nobody else
    the parameters. ReLU6 does not commute: such layers stay as they are.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: those of the float model, trained.
      args: a sample of the call's arguments, arrays or ShapeDtypeStructs; one example is enough.
      method: of the float model, by name or function; by default its `__call__`.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      The variables, with other `params` and without `quant_stats`: calibrate with them.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables.
      ValueError: no such pair in the model, or a call of training.

    Examples:
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> equal = equalize(SimQAT().apply(model), variables, jnp.ones((1, 4)))
      >>> first, second = (equal["params"][name]["kernel"] for name in ("layers_0", "layers_2"))
      >>> bool(jnp.allclose(jnp.abs(first).max(axis=0), jnp.abs(second).max(axis=1)))
      True

    Source:
      Nagel et al., arXiv:1906.04721, section 4.1. Biases are not absorbed.
    """
    known = FloatVariables(variables)
    call = EvaluationCall(qmodule, method, kwargs)
    placement = call.planned(call.captured(variables, args))
    graph = placement.graph
    layers = _Layers(graph, known.tensors(graph), known.leaves)
    pairs = list(_pairs(placement, layers))
    if not pairs:
        raise ValueError(
            "equalize: no two layers of this model stand behind one another with nothing but ReLU, "
            "pooling or reshapes between them (ReLU6 is none of these). Leave the call out."
        )
    for _ in range(_SWEEPS):
        if max([pair.equalize(layers) for pair in pairs]) < _SETTLED:
            break
    return known.tree(graph, layers.changed())


class _Layers:
    """The values of variables while they change.

    Args:
      graph: the call.
      own: the tensors that are variables.
      given: their values.
    """

    def __init__(self, graph: Graph, own: tuple[int, ...], given: Sequence[Any]):
        self._free = FreeVariables(graph, own)
        self._given = dict(zip(own, given, strict=True))
        self._values: dict[int, np.ndarray] = {}

    def are_free(self, operands: Iterable[Operand]) -> bool:
        """Whether all of these are variables that may be changed."""
        return all(self._free.sources(v) for v in operands)

    def get(self, v: Operand) -> np.ndarray:
        """Return a variable's value, float64."""
        root = self._free.sources(v)[-1]
        return self._values.get(root, np.asarray(self._given[root], np.float64))

    def set(self, v: Operand, value: np.ndarray) -> None:
        """Change a variable."""
        self._values[self._free.sources(v)[-1]] = value

    def folded(self, step: Step) -> np.ndarray:
        """Return the magnitude of each weight of a step's product, its BatchNorm folded in."""
        kernel, norm = np.abs(self.get(step.node.inputs[1])), step.norm
        if norm is None:
            return kernel
        values = {name: self.fixed(v) for name, v in norm.layer.named(norm.inputs[1:]).items()}
        sigma = np.sqrt(values["var"] + norm.module.epsilon)
        slope = np.abs(values.get("scale", np.ones(1))) / sigma
        return kernel * slope

    def fixed(self, v: Operand) -> np.ndarray:
        """Return the value of what may be changed or not."""
        if self._free.sources(v):
            return self.get(v)
        value = v.value if isinstance(v, Constant) else self._given[v]
        return np.asarray(value, np.float64)

    def changed(self) -> dict[int, jax.Array]:
        """Return the new values of what was changed, in the type of the old ones."""
        given = ((v, self._given[v].dtype, value) for v, value in self._values.items())
        return {v: jnp.asarray(value, dtype) for v, dtype, value in given}


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """Two layers that may be equalized.

    Attributes:
      first: the layer that makes the channels, with what is fused behind it.
      second: the one that reads them.
      channel: which channel each row of the second kernel's columns meets, shape (G, K).
    """

    first: Step
    second: Step
    channel: np.ndarray

    def equalize(self, layers: _Layers) -> float:
        """Scale once; return by how much a channel was scaled at most: 0 for not at all."""
        node, other = self.first.node, self.second.node
        assert isinstance(node, Product) and isinstance(other, Product)
        r1 = layers.folded(self.first).reshape(-1, node.num_channels).max(axis=0)
        rows = columns(other, layers.folded(self.second)).max(axis=2)
        r2 = np.zeros_like(r1)
        np.maximum.at(r2, self.channel, rows)
        alive = (r1 > 0) & (r2 > 0)
        scale = np.where(alive, np.sqrt(r1 / np.where(alive, r2, 1)), 1)
        for v in _scaled(self.first):
            layers.set(v, _along_channels(layers.get(v), 1 / scale))
        kernel = layers.get(other.inputs[1])
        matrices = columns(other, kernel) * scale[self.channel][:, :, None]
        layers.set(other.inputs[1], kernel_of(matrices, kernel.shape))
        return float(np.max(np.abs(np.log(scale))))


def _along_channels(value: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return (value.reshape(-1, factor.size) * factor).reshape(value.shape)


def _scaled(step: Step) -> list[Operand]:
    """Return what scales a layer's channels: its BatchNorm's scale and bias, or its own kernel."""
    if step.norm is None:
        return list(step.node.inputs[1:])
    named = step.norm.layer.named(step.norm.inputs[1:])
    return [v for name, v in named.items() if name in ("scale", "bias")]


def _pairs(placement: Placement, layers: _Layers) -> Iterator[_Pair]:
    """Find the pairs of layers that may be equalized."""
    readers: dict[int, list[Step]] = defaultdict(list)
    for step in placement.steps:
        inputs = {v for node in step.nodes for v in node.inputs if isinstance(v, int)}
        for v in inputs:
            readers[v].append(step)
    for step in placement.steps:
        between = _Between(placement.graph, readers, step)
        found = between.second() if between.starts(layers) else None
        if found is not None and layers.are_free(found.second.node.inputs[1:2]):
            yield found


class _Between:
    """What stands behind a layer, up to the next one.

    Args:
      graph: the call.
      readers: the steps that read each tensor.
      first: the layer.
    """

    def __init__(self, graph: Graph, readers: Mapping[int, list[Step]], first: Step):
        self._graph = graph
        self._readers = readers
        self._first = first

    def starts(self, layers: _Layers) -> bool:
        """Whether it is a layer whose channels may be scaled."""
        node, norm = self._first.node, self._first.norm
        if not isinstance(node, Product) or not node.channels_last or not _commutes(self._first):
            return False
        scales = norm is None or "scale" in norm.layer.names
        return scales and layers.are_free(_scaled(self._first))

    def second(self) -> _Pair | None:
        """Return the pair with the next layer; None: something else comes first."""
        v = self._first.output
        shape = self._graph.avals[v].shape
        # The numbers of channels, from 1, go through what moves values; zero is padding.
        numbers = jnp.broadcast_to(jnp.arange(1.0, shape[-1] + 1), shape)
        while len(self._readers[v]) == 1 and v not in self._graph.outputs:
            (step,) = self._readers[v]
            if isinstance(step.node, Product) and step.node.inputs[0] == v:
                channel = _channels(patches(step.node, numbers))
                return None if channel is None else _Pair(self._first, step, channel)
            moves = isinstance(step.node, Move | Mean | Clamp) and step.node.inputs[0] == v
            if not moves or not _commutes(step) or len(step.node.outputs) != 1:
                return None
            others = [x.value for x in step.node.inputs[1:] if isinstance(x, Constant)]
            if len(others) + 1 != len(step.node.inputs):
                return None
            numbers, v = step.node.run(numbers, *others)[0], step.output
        return None


def _commutes(step: Step) -> bool:
    """Whether the clamp of a step, if any, commutes with positive factors."""
    clamp = step.node if isinstance(step.node, Clamp) else step.clamp
    return clamp is None or tuple(map(float, clamp.bounds)) == (0.0, np.inf)


def _channels(met: jax.Array) -> np.ndarray | None:
    """Return the channel that each row of a kernel meets; None: it meets several, or none.

    Args:
      met: numbers of channels, or zero for padding, shape (G, rows, K).
    """
    numbers = np.asarray(met)
    most = numbers.max(axis=1, keepdims=True)
    one = np.all((numbers == most) | (numbers == 0)) and np.all(most > 0)
    return most[:, 0].astype(int) - 1 if one and np.all(most == np.rint(most)) else None

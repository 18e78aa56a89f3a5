"""Random networks as programs: what evaluation computes, the integer model must compute.

`text(seed)` is a script that prints how many numbers differ; run it in `tests/`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from compilation import optimized

import simqat_jax as sq

Shape = tuple[int, ...]
"""Lengths of a tensor behind its batch axis; the last one is channels."""

HEADER = """\
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from random_networks import differing

normal, ones, zeros = nn.initializers.normal(), nn.initializers.ones, nn.initializers.zeros


class Net(nn.Module):
    @nn.compact
    def __call__(self, x0):
"""
FOOTER = """

if __name__ == "__main__":
    print(differing(Net(), {shape}, {seed}))
"""
INPUTS: tuple[Shape, ...] = ((8, 8, 3), (6, 7, 4), (5, 6), (8, 4), (12,), (7,))

ACTIVATIONS = (
    "nn.relu({v})",
    "nn.relu6({v})",
    "jnp.maximum({v}, 0)",
    "jnp.clip({v}, -0.7, 0.9)",
    "nn.leaky_relu({v})",
    "nn.sigmoid({v})",
    "nn.tanh({v})",
    "nn.silu({v})",
    "nn.gelu({v})",
    "nn.gelu({v}, approximate=False)",
    "nn.hard_swish({v})",
    "nn.elu({v})",
    "nn.softplus({v})",
    "{v} * nn.sigmoid(1.702 * {v})",
    "{v} * nn.relu6({v} + 3) / 6",
    "jnp.where({v} > 0, {v}, 0.1 * {v})",
    "jnp.abs({v})",
    "-{v}",
    "0.37 * {v} + 0.1",
    "jnp.square({v})",
)
"""Functions of each element."""
NORMS = (
    "nn.LayerNorm()({v})",
    "nn.RMSNorm()({v})",
    "nn.softmax({v})",
    "nn.log_softmax({v})",
    "{v} / (jnp.linalg.norm({v}, axis=-1, keepdims=True) + 1e-3)",
    "{v} * lax.rsqrt(jnp.square({v}).sum(-1, keepdims=True) + 1e-3)",
    "({v} - {v}.mean(-1, keepdims=True)) / jnp.sqrt({v}.var(-1, keepdims=True) + 1e-2)",
)
"""Functions of the channels of each position."""
BIASES = (
    "jnp.where({tri}, {scores}, -1e9)",
    "({scores} + jnp.where({tri}, 0.0, -100.0))",
    "({scores} + {table})",
    "({table} + {scores} / 2)",
    "({scores} - 0.3 * jnp.abs({apart}))",
    "({scores} + jnp.where({tri}, 0.2 * {apart}, -jnp.inf))",
    "({scores} + ({table} + jnp.where({tri}, 0.0, -1e4)))",
    "({scores} + jnp.where({tri}, {table}, -1e9))",
)
"""What is done with scores in front of a softmax."""
SPREADS = (
    "{v}.var(axis={axis}, keepdims=True)",
    "jnp.std({v}, axis={axis}, keepdims=True)",
    "jnp.sqrt({v}.var(axis={axis}, keepdims=True) + 1e-3)",
    "jnp.sqrt(jnp.square({v}).sum({axis}, keepdims=True) + 1e-3)",
)
"""Variances, deviations and lengths."""


@dataclasses.dataclass
class Network:
    """A network that is being drawn.

    Attributes:
      rng: what it is drawn with.
      lines: its statements.
      shapes: of its variables, by name, in the order in which they were made.
      returned: what it returns besides what no statement reads.
    """

    rng: np.random.Generator
    lines: list[str] = dataclasses.field(default_factory=list)
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    returned: list[str] = dataclasses.field(default_factory=list)

    def pick(self, values: Any) -> Any:
        """Return one of some values."""
        return values[int(self.rng.integers(len(values)))]

    def add(self, expression: str, shape: Shape) -> str:
        """Add a variable; return its name."""
        name = f"x{len(self.shapes)}"
        self.lines.append(f"{name} = {expression}")
        self.shapes[name] = shape
        return name

    def parameter(self, kind: str, shape: Shape, init: str = "normal") -> str:
        """Add a parameter; return its name."""
        name = f"{kind}{len(self.lines)}"
        self.lines.append(f'{name} = self.param("{name}", {init}, {shape})')
        return name

    def statistic(self, kind: str, shape: Shape) -> str:
        """Add a statistic that a layer would keep; return its name."""
        name = f"{kind}{len(self.lines)}"
        self.lines.append(
            f'{name} = self.variable("batch_stats", "{name}", jnp.ones, {shape}).value'
        )
        return name

    def unread(self) -> list[str]:
        """Return the variables that no statement reads."""
        read = {word for line in self.lines for word in re.findall(r"x\d+", line.partition("=")[2])}
        return [v for v in self.shapes if v not in read]

    def like(self, v: str, *, channels: bool = True) -> list[str]:
        """Return the variables of a variable's shape, maybe but for the channels."""
        end = None if channels else -1
        return [w for w, s in self.shapes.items() if s[:end] == self.shapes[v][:end]]


Draw = Callable[[Network, str], object]
"""Adds statements that use a variable."""


# Products ----------------------------------------------------------------------------------------


def conv(net: Network, v: str) -> str:
    *window, channels = net.shapes[v]
    features, size = net.pick((2, 3, 4, 6)), net.pick((1, 2, 3))
    groups = net.pick([g for g in (1, 1, 2, channels) if channels % g == 0])
    features = features * groups if groups > 1 else features
    stride = net.pick((1, 1, 2)) if min(window) > 3 else 1
    bias = net.pick((True, False))
    layer = (
        f"nn.Conv({features}, {(size,) * len(window)}, {stride}, "
        f"feature_group_count={groups}, use_bias={bias})"
    )
    shape = (*(-(-n // stride) for n in window), features)
    return net.add(f"{layer}({v})", shape)


def dense(net: Network, v: str) -> str:
    features = net.pick((2, 3, 5, 8))
    return net.add(f"nn.Dense({features})({v})", (*net.shapes[v][:-1], features))


def batch_norm(net: Network, v: str) -> None:
    made = conv(net, v) if len(net.shapes[v]) > 1 else dense(net, v)
    made = net.add(f"nn.BatchNorm(True)({made})", net.shapes[made])
    if net.pick((True, False)):
        net.add(f"nn.relu({made})", net.shapes[made])


def own_batch_norm(net: Network, v: str) -> None:
    shape = net.shapes[v]
    axes = (1,) * len(shape) + shape[-1:]
    mean, var = net.statistic("mean", axes), net.statistic("var", axes)
    scale, bias = net.parameter("scale", axes, "ones"), net.parameter("bias", axes, "zeros")
    net.add(f"({v} - {mean}) * (lax.rsqrt({var} + 1e-3) * {scale}) + {bias}", shape)


def matmul(net: Network, v: str) -> None:
    shape, features = net.shapes[v], net.pick((2, 4, 5))
    w = net.parameter("w", (shape[-1], features))
    bias = net.parameter("bias", (*(1,) * len(shape), features), "zeros")
    net.add(f"{v} @ {w} + {bias}", (*shape[:-1], features))


def tied(net: Network, v: str) -> None:
    shape = net.shapes[v]
    w = net.parameter("w", (shape[-1], net.pick((3, 6))))
    net.add(f"nn.relu({v} @ {w}) @ {w}.T", shape)


def einsum(net: Network, v: str) -> None:
    shape, features = net.shapes[v], net.pick((2, 3))
    axes = "bijk"[: len(shape)]
    w = net.parameter("w", (shape[-1], features))
    net.add(f'jnp.einsum("{axes}c,cd->{axes}d", {v}, {w})', (*shape[:-1], features))


def attention(net: Network, v: str) -> None:
    length, channels = net.shapes[v]
    scores = f'jnp.einsum("bqc,bkc->bqk", {v}, {v}) * {channels**-0.5:.3f}'
    for _ in range(net.pick((0, 1, 1, 2))):
        scores = biased(net, length, scores)
    net.add(f'jnp.einsum("bqk,bkc->bqc", nn.softmax({scores}), {v})', (length, channels))


def biased(net: Network, length: int, scores: str) -> str:
    """Return scores behind a mask, or with biases for relative positions."""
    apart = f"(jnp.arange({length})[:, None] - jnp.arange({length}))[None]"
    table = f"nn.Embed({2 * length - 1}, 1)({apart} + {length - 1})[..., 0]"
    tri = f"jnp.tri({length}, dtype=bool)[None]"
    return net.pick(BIASES).format(scores=scores, apart=apart, table=table, tri=tri)


# Two tensors -------------------------------------------------------------------------------------


def arithmetic(net: Network, v: str) -> None:
    other = net.pick(net.like(v))
    net.add(f"{v} {net.pick('++-*')} {other}", net.shapes[v])


def extremum(net: Network, v: str) -> None:
    net.add(f"jnp.{net.pick(('maximum', 'minimum'))}({v}, {net.pick(net.like(v))})", net.shapes[v])


def concat(net: Network, v: str) -> None:
    others = [net.pick(net.like(v, channels=False)) for _ in range(net.pick((1, 2)))]
    shape = (*net.shapes[v][:-1], sum(net.shapes[w][-1] for w in (v, *others)))
    net.add(f"jnp.concatenate([{', '.join((v, *others))}], axis=-1)", shape)


def gate(net: Network, v: str) -> None:
    shape = net.shapes[v]
    axes = tuple(range(1, len(shape)))
    mean = net.add(f"{v}.mean(axis={axes}, keepdims=True)", (*(1,) * len(axes), shape[-1]))
    net.add(f"{v} * nn.sigmoid(nn.Dense({shape[-1]})({mean}))", shape)


def constant(net: Network, v: str) -> None:
    shape = net.shapes[v]
    values = np.round(net.rng.normal(size=shape[-1]), 2).tolist()
    array = f"jnp.array({values}).reshape({(*(1,) * len(shape), shape[-1])})"
    net.add(f"{v} {net.pick('+*')} {array}", shape)


# One tensor --------------------------------------------------------------------------------------


def activation(net: Network, v: str) -> None:
    net.add(net.pick(ACTIVATIONS).format(v=v), net.shapes[v])


def norm(net: Network, v: str) -> None:
    net.add(net.pick(NORMS).format(v=v), net.shapes[v])


def spread(net: Network, v: str) -> None:
    shape = net.shapes[v]
    axis = net.pick([-1, tuple(range(1, len(shape) + 1))])
    new = (*shape[:-1], 1) if axis == -1 else (1,) * len(shape)
    net.add(net.pick(SPREADS).format(v=v, axis=axis), new)


def position(net: Network, v: str) -> None:
    *window, channels = net.shapes[v]
    if channels == 1:  # the position is 0 whatever the data are
        return
    index = f"jnp.{net.pick(('argmax', 'argmin'))}({v}, axis=-1)"
    if net.pick((True, False)):
        net.add(f"nn.Embed({channels}, 3)({index})", (*window, 3))
    else:
        net.returned.append(index)


def pool(net: Network, v: str) -> None:
    *window, channels = net.shapes[v]
    sizes, stride = (2,) * len(window), net.pick((1, 2))
    padding = net.pick(("VALID", "SAME"))
    kind = net.pick(("max_pool({}", "avg_pool({}", "avg_pool({}, count_include_pad=False"))
    shape = [-(-n // stride) if padding == "SAME" else (n - 2) // stride + 1 for n in window]
    options = f'{sizes}, {(stride,) * len(window)}, "{padding}"'
    call = kind.format(f"{v}, {options}")
    net.add(f"nn.{call})", (*shape, channels))


def mean(net: Network, v: str) -> None:
    shape = net.shapes[v]
    axes = tuple(range(1, len(shape)))
    net.add(f"{v}.{net.pick(('mean', 'mean', 'sum', 'max'))}(axis={axes})", shape[-1:])


def reshape(net: Network, v: str) -> None:
    shape = net.shapes[v]
    new = net.pick(((int(np.prod(shape)),), (int(np.prod(shape[:-1])), shape[-1])))
    net.add(f"{v}.reshape({v}.shape[0], {str(new)[1:-1].rstrip(',')})", new)


def slices(net: Network, v: str) -> None:
    first, *rest = net.shapes[v]
    index, length = net.pick(
        (("1:", first - 1), (":-1", first - 1), ("::2", -(-first // 2)), ("::-1", first))
    )
    net.add(f"{v}[:, {index}]", (length, *rest))


def transpose(net: Network, v: str) -> None:
    shape = net.shapes[v]
    net.add(f"jnp.swapaxes({v}, -1, -2)", (*shape[:-2], shape[-1], shape[-2]))


def pad(net: Network, v: str) -> None:
    first, *rest = net.shapes[v]
    widths = ((0, 0), (1, 0), *[(0, 0)] * len(rest))
    net.add(f"jnp.pad({v}, {widths})", (first + 1, *rest))


DRAWS: tuple[tuple[Draw, int, int], ...] = (
    (conv, 2, 3),
    (conv, 2, 3),
    (batch_norm, 1, 3),
    (batch_norm, 1, 3),
    (dense, 1, 3),
    (dense, 1, 3),
    (own_batch_norm, 1, 3),
    (matmul, 1, 3),
    (tied, 1, 3),
    (einsum, 2, 3),
    (attention, 2, 2),
    (attention, 2, 2),
    (attention, 2, 2),
    (arithmetic, 1, 3),
    (arithmetic, 1, 3),
    (extremum, 1, 3),
    (concat, 1, 3),
    (gate, 2, 3),
    (constant, 1, 3),
    (activation, 1, 3),
    (activation, 1, 3),
    (norm, 1, 3),
    (norm, 1, 3),
    (spread, 1, 3),
    (position, 1, 3),
    (pool, 2, 3),
    (mean, 2, 3),
    (reshape, 2, 3),
    (slices, 1, 3),
    (transpose, 2, 3),
    (pad, 1, 3),
)
"""What may come next, for tensors of so many axes behind the batch's, at least and at most."""
LARGEST = 600
"""No tensor has more elements for each example, so that networks stay quick."""


# Networks ----------------------------------------------------------------------------------------


def draw(seed: int, length: int | None = None) -> Network:
    """Draw a network.

    Args:
      seed: what makes it; a shorter one of a seed is the beginning of a longer one.
      length: how many steps it has between its first layer and its output; None: 1 to 5.
    """
    net = Network(np.random.default_rng(seed))
    net.shapes["x0"] = net.pick(INPUTS)
    (conv if len(net.shapes["x0"]) > 1 else dense)(net, "x0")
    drawn = int(net.rng.integers(1, 6))
    for _ in range(drawn if length is None else length):
        _extend(net)
    return net


def _extend(net: Network) -> None:
    """Add one step, mostly to what was made last."""
    names = [v for v in net.shapes if v != "x0"]
    v = names[-1] if net.rng.random() < 0.75 else net.pick(names)
    rank = len(net.shapes[v])
    options = [
        add
        for add, least, most in DRAWS
        if least <= rank <= most
        and (add is not slices or net.shapes[v][0] > 1)
        and (add is not pool or min(net.shapes[v][:-1]) > 1)
    ]
    before = len(net.lines), dict(net.shapes)
    net.pick(options)(net, v)
    if max(map(np.prod, net.shapes.values())) > LARGEST:
        del net.lines[before[0] :]
        net.shapes = before[1]


def text(seed: int, length: int | None = None) -> str:
    """Return a network as a script that prints how many numbers differ."""
    net = draw(seed, length)
    body = [*net.lines, f"return {', '.join((*net.unread(), *net.returned))}"]
    lines = "".join(f"        {line}\n" for line in body)
    return HEADER + lines + FOOTER.format(shape=net.shapes["x0"], seed=seed)


def module(source: str) -> nn.Module:
    """Return the model of a script."""
    names: dict[str, Any] = {"__name__": "network"}
    exec(compile(source, "network.py", "exec"), names)
    return names["Net"]()


# What is compared --------------------------------------------------------------------------------


def differing(model: nn.Module, shape: Shape, seed: int, backend: Any = "tflite") -> int:
    """Count the numbers that evaluation and the integer model do not have in common.

    Args:
      model: takes one array.
      shape: of the array, behind its batch axis.
      seed: of parameters, statistics and data.
      backend: whose rounding both have.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    wider = np.concatenate([x, 1.4 * rng.normal(size=(2, *shape)).astype(np.float32)])
    qmodel = sq.SimQAT(sq.SimQATConfig(backend=backend)).apply(model)
    variables = values(jax.eval_shape(model.init, jax.random.key(0), x), rng)

    @jax.jit
    def calibrate(variables, x):
        return qmodel.apply(variables, x, mutable=["quant_stats"])[1]

    variables = {**variables, **calibrate(variables, x)}
    integer = sq.convert(qmodel, variables, x)
    data = wider if integer.tensors[integer.inputs[0]].shape[0] < 0 else x
    with optimized():
        want = jax.jit(lambda v, x: qmodel.apply(v, x))(variables, data)
        got = integer(data)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    tolerances = [1e-5 if integer.tensors[i].grid is None else 0 for i in integer.outputs]
    return sum(_far(a, b, t) for t, (a, b) in zip(tolerances, pairs, strict=True))


def _far(got: Any, want: Any, tolerance: float) -> int:
    """Count what is not equal; of what is on no grid, what is not close."""
    got, want = np.asarray(got), np.asarray(want)
    return int((~(np.abs(got - want) <= tolerance * np.abs(want).max())).sum())


def values(shapes: Any, rng: np.random.Generator) -> Any:
    """Return values for the variables of a model: kernels, scales of both signs, statistics."""

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name.startswith("var"):
            noise = rng.uniform(0.2, 2, size=leaf.shape)
        elif name.startswith("scale"):
            noise = np.sign(noise) * rng.uniform(0.5, 1.5, size=leaf.shape)
        elif name.startswith(("bias", "mean")):
            noise = 0.3 * noise
        else:
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        return noise.astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


def shortest(seed: int, backend: Any) -> str:
    """Return the shortest beginning of a network that differs, or the whole, as a script."""
    for length in range(6):
        source = text(seed, length)
        shape = draw(seed, length).shapes["x0"]
        if differing(module(source), shape, seed, backend):
            return source
    return text(seed)

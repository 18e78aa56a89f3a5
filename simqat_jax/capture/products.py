"""Find the products of data and a kernel: what a layer is, whoever wrote it.

A kernel is whatever does not depend on the model's arguments, however it was made. To the product
belong the bias behind it, and what a Flax layer does to its input and its output on the way.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from simqat_jax.capture.contractions import Axes, Form, identity, transposition
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.interception import Recorder
from simqat_jax.capture.passes import chain, dependent
from simqat_jax.capture.repeated_kernels import shapes_once, unrepeated
from simqat_jax.ir.graph import (
    Add,
    Constant,
    Contraction,
    Float,
    Graph,
    Layer,
    Move,
    Node,
    Operand,
    Product,
    Unquantizable,
    as_kind,
    shape_of,
)
from simqat_jax.rules import left_out

_SPREADS = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type")


def find_products(graph: Graph, recorder: Recorder) -> Graph:
    """Make every product of data and a kernel one node, with the bias behind it.

    A kernel whose output channels are not its last axes is transposed first.

    Args:
      graph: as it was traced.
      recorder: notes down the names of products beside those of modules, and knows which to leave
        float.
    """
    finder = _Finder(graph, recorder)
    for node in graph.nodes:
        if isinstance(node, Contraction) and finder.has_kernel(node):
            finder.add(node)
    unquantizable = (*graph.unquantizable, *finder.missed)
    return dataclasses.replace(finder.draft.finished(), unquantizable=unquantizable)


class _Name(NamedTuple):
    """What a product is named after, its kernel's name, and whether its place tells it."""

    path: tuple[str, ...]
    kernel: str
    counted: bool = False


@dataclasses.dataclass
class _Tail:
    """What is behind a contraction.

    Attributes:
      result: the tensor that the contraction makes.
      output: the tensor that leaves the product so far.
      last: the node of the captured graph that makes it.
      order: in which order the axes of the contraction's result are taken.
      nodes: of the product, behind the contraction.
      bias: what is added to each channel; None: nothing.
    """

    result: int
    output: int
    last: Node
    order: Axes
    nodes: list[Node] = dataclasses.field(default_factory=list)
    bias: int | None = None


class _Finder:
    """Collects products, and what is left of a graph around them."""

    def __init__(self, graph: Graph, recorder: Recorder):
        self.graph = graph
        self.recorder = recorder
        self.draft = Draft(graph)
        self.fed = dependent(graph.nodes, graph.arguments)
        self.once = shapes_once(self.draft)
        self.parameters = _parameters(graph)
        self.missed: list[Unquantizable] = []

    def is_fed(self, v: Operand) -> bool:
        return isinstance(v, int) and v in self.fed

    def has_kernel(self, node: Contraction) -> bool:
        """Whether it multiplies data by what is none: real numbers, or parameters of any type."""
        kernels = [v for v in node.inputs if not self.is_fed(v)]
        if len(kernels) != 1:
            return False
        trained = isinstance(kernels[0], int) and kernels[0] in self.parameters
        return trained or not _unreal(node)

    # One product ------------------------------------------------------------------------------

    def add(self, node: Contraction) -> None:
        """Put a product in the place of a contraction and of what belongs to it, where it can."""
        swapped = self.is_fed(node.inputs[1])
        x, kernel = reversed(node.inputs) if swapped else node.inputs
        assert isinstance(x, int)
        name = self.name(node, kernel)
        self.recorder.modules.append(name.path)
        place = left_out(self.recorder.rules, name.path, _kind(node))
        if place is not None:
            self.draft.instead[node] = [as_kind(Float, node, excluded_by=place)]
            return
        obstacle = _obstacle(node, self.fed)
        if obstacle is not None:
            self.missed.append(Unquantizable(name.path, obstacle))
            return
        self.draft.instead[node] = []
        kernel, form, turns = unrepeated(self.draft, node, swapped, self.once)
        before: list[Node] = []
        if form.data == identity(form.data):
            x, before = self.before(node, x)
        else:
            x = self.draft.turned(node, x, form.data)
        kernel, casts = self.kernel(node, kernel, form.kernel)
        tail = self.result_of(node, form, turns=turns)
        contraction = dataclasses.replace(
            node,
            inputs=(_last(before, x), _last(casts, kernel)),
            outputs=(tail.result,),
            eqn=form.eqn,
            run=bound(form.eqn),
        )
        # From here on the channels are where the result has them.
        form = form._replace(channel_axes=tuple(map(tail.order.index, form.channel_axes)))
        self.follow(node, form, tail, before)
        parts = (*before, *casts, contraction, *tail.nodes)
        inputs = (x, kernel) if tail.bias is None else (x, kernel, tail.bias)
        product = self.product(name, node, form, parts, inputs, tail)
        self.draft.instead.setdefault(tail.last, []).append(product)

    def before(self, node: Contraction, x: int) -> tuple[int, list[Node]]:
        """Return the input of the product, and what a Flax layer does to it first."""
        nodes: list[Node] = []
        while node.module is not None:
            producer = self.draft.producers.get(x)
            if producer is None or producer.path != node.path:
                break
            belongs = self.draft.only_reader(x, node) is (nodes[0] if nodes else node)
            if not belongs or not _prepares(producer, node, self.fed):
                break
            nodes.insert(0, producer)
            (x,) = producer.data_inputs(self.fed)
        return x, nodes

    def kernel(self, node: Contraction, v: Operand, order: Axes) -> tuple[int, list[Node]]:
        """Return the kernel with its channels last, and what converts it for the product.

        A layer may compute in another type than its kernel has; codes are those of the kernel.
        """
        producer = self.draft.producers.get(v) if isinstance(v, int) else None
        casts: list[Node] = []
        if producer is not None and producer.primitive == "convert_element_type":
            source = producer.inputs[0]
            if _is_float(self.draft.aval(source).dtype):
                v, casts = source, [producer]
        producer = self.draft.producers.get(v) if isinstance(v, int) else None
        if producer is not None and producer.primitive == "transpose":
            order = tuple(producer.eqn.params["permutation"][a] for a in order)
            v = producer.inputs[0]
        if isinstance(v, int) and order == identity(order):
            return v, casts
        kernel = self.draft.turned(node, v, order)
        if casts:
            casts = [self.draft.converted(node, kernel, shape_of(casts[0].eqn.outvars[0]).dtype)]
        return kernel, casts

    def result_of(self, node: Contraction, form: Form, *, turns: bool) -> _Tail:
        """Return the result of a contraction, its axes in the order that was captured.

        `jnp.einsum` puts the axes of its result in order by a transposition, which belongs to it.
        """
        (out,) = node.outputs
        order, last = form.output, node
        if turns or order != identity(order) or form.channel_axes[:1] == (0,):
            user = self.draft.only_reader(out, node)
            if isinstance(user, Move) and user.primitive == "transpose":
                turned = tuple(order[a] for a in user.eqn.params["permutation"])
                channels = [turned.index(a) for a in form.channel_axes]
                if channels == sorted(channels):
                    order, last = turned, user
        if order == identity(order):
            return _Tail(last.outputs[0], last.outputs[0], last, order)
        result = self.draft.new(shape_of(form.eqn.outvars[0]))
        turn = self.draft.made(
            node, result, transposition(self.draft.avals[result], order), last.outputs
        )
        return _Tail(result, last.outputs[0], last, order, [turn])

    def follow(self, node: Contraction, form: Form, tail: _Tail, before: list[Node]) -> None:
        """Take the bias behind a product to it, and what undoes a reshape in front."""
        user = self.draft.only_reader(tail.output, node)
        if isinstance(user, Add) and not user.subtracts:
            a, b = user.inputs
            added = b if a == tail.output else a
            spread = self.bias(node, added, self.draft.avals[tail.output].shape, form)
            if spread is not None:
                tail.bias, nodes, value = spread
                inputs = (tail.output, value) if a == tail.output else (value, tail.output)
                tail.nodes += [*nodes, dataclasses.replace(user, inputs=inputs)]
                tail.output, tail.last = user.outputs[0], user
                user = self.draft.only_reader(tail.output, node)
        reshaped = any(n.primitive == "reshape" for n in before)
        if reshaped and isinstance(user, Move) and user.primitive == "reshape":
            shape = self.draft.avals[user.outputs[0]].shape
            if user.path == node.path and shape[-1:] == form.features:
                tail.nodes.append(user)
                tail.output, tail.last = user.outputs[0], user

    def bias(
        self, node: Contraction, v: Operand, shape: tuple[int, ...], form: Form
    ) -> tuple[int, list[Node], int] | None:
        """Return one number for each channel, and what spreads it to an operand of a sum.

        None where the operand is anything else than a constant for each channel.
        """
        found = _one_each_channel(self.draft, self.fed, v, math.prod(form.features))
        if found is None:
            return None
        root, nodes = found
        if not _is_spread_over_channels(self.draft.aval(root).shape, nodes, shape, form):
            return None
        if isinstance(root, Constant):
            root = self.draft.turned(node, root, identity(np.shape(root.value)))
            nodes = [dataclasses.replace(n, inputs=(root,)) for n in nodes[:1]] + nodes[1:]
        return root, nodes, _last(nodes, root)

    def name(self, node: Contraction, kernel: Operand) -> _Name:
        made_of = self.parameters.get(kernel, ()) if isinstance(kernel, int) else ()
        return _name(node, {self.graph.parameters[v] for v in made_of})

    def product(
        self,
        name: _Name,
        node: Contraction,
        form: Form,
        parts: tuple[Node, ...],
        inputs: tuple[int, ...],
        tail: _Tail,
    ) -> Product:
        kind = _kind(node)
        module = node.module if name.path == node.path else None
        op = type(module).__name__ if module else {"dense": "matmul"}.get(kind, kind)
        (at,) = (k for k, part in enumerate(parts) if isinstance(part, Contraction))
        contraction, shape = parts[at], self.draft.avals[tail.output].shape
        assert isinstance(contraction, Contraction)
        same_rank = len(shape) == len(tail.order)
        return as_kind(
            Product,
            node,
            op=op,
            inputs=inputs,
            outputs=(tail.output,),
            run=chain(parts, inputs),
            eqn=form.eqn,
            parts=parts,
            kind=kind,
            layer=Layer(module, name.path, ("kernel", "bias")[: len(inputs) - 1]),
            kernel_name=name.kernel,
            counted=name.counted,
            channel_axes=form.channel_axes if same_rank else (len(shape) - 1,),
            order=tail.order,
            features=form.features,
            before=tuple(n for n in parts[:at] if n.primitive in ("reshape", "pad")),
            contraction=contraction,
            shape=shape,
        )


def _one_each_channel(
    draft: Draft, fed: frozenset[int], v: Operand, count: int
) -> tuple[Operand, list[Node]] | None:
    """Return the first tensor of as many numbers that an operand is spread from, and how it is."""
    nodes: list[Node] = []
    found: tuple[Operand, list[Node]] | None = None
    while not isinstance(v, int) or v not in fed:
        if draft.aval(v).size == count and _is_float(draft.aval(v).dtype):
            found = v, nodes[::-1]
        producer = draft.producers.get(v) if isinstance(v, int) else None
        if producer is None or producer.primitive not in _SPREADS or len(producer.inputs) != 1:
            break
        if v in draft.graph.parameters:  # the slice that is a layer's own
            break
        nodes.append(producer)
        v = producer.inputs[0]
    return found


def _prepares(producer: Node, node: Contraction, fed: frozenset[int]) -> bool:
    """Whether an operation on the data is one that a layer may do to its input."""
    if not isinstance(producer, Move) or len(producer.data_inputs(fed)) != 1:
        return False
    before, after = shape_of(producer.eqn.invars[0]), shape_of(producer.eqn.outvars[0])
    match producer.primitive:
        case "convert_element_type":
            return _is_float(before.dtype)
        case "reshape":  # of the axes in front of those that a convolution has
            return node.convolves and before.shape[1 - after.ndim :] == after.shape[1:]
        case "pad":
            sides = producer.eqn.params["padding_config"]
            spatial = node.convolves and sides[0] == sides[-1] == (0, 0, 0)
            return spatial and all(min(lo, hi) >= 0 == inner for lo, hi, inner in sides)
    return False


def _name(node: Contraction, parameters: set[tuple[str, ...]]) -> _Name:
    """Name a product after its layer or parameter, else after its place.

    Args:
      node: the contraction.
      parameters: the paths of those that its kernel is made of.
    """
    several, path = len(parameters) > 1, max(parameters, default=())
    path = () if several else path
    if node.module is not None and (several or path[-1:] == ("kernel",)):
        return _Name(node.path, "/".join((*node.path, "kernel")))
    if path:
        return _Name(path[:-1] if path[-1] == "kernel" else path, "/".join(path))
    path = (*node.path, "conv" if node.convolves else "matmul")
    return _Name(path, "/".join((*path, "kernel")), counted=True)


def _last(nodes: list[Node], v: int) -> int:
    return nodes[-1].outputs[0] if nodes else v


def _kind(node: Contraction) -> str:
    return "conv" if node.convolves else "dense"


def _is_float(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _obstacle(node: Contraction, fed: frozenset[int]) -> str | None:
    """Say why a product cannot be quantized; None: it can.

    A convolution slides its kernel over data, unless it is a gradient, for instance.
    """
    unreal = _unreal(node)
    if unreal:
        return f"it multiplies numbers of type {unreal[0]}"
    slides = node.inputs[0] in fed and node.eqn.params.get("batch_group_count", 1) == 1
    return None if slides or not node.convolves else "its kernel is what the data slides over"


def _unreal(node: Contraction) -> list[DTypeLike]:
    """Return the types of what a contraction reads and makes that are no real numbers."""
    dtypes = (shape_of(v).dtype for v in (*node.eqn.invars, *node.eqn.outvars))
    return [dtype for dtype in dtypes if not _is_float(dtype)]


def _parameters(graph: Graph) -> dict[int, frozenset[int]]:
    """Return the parameters that each tensor is made of."""
    found = {v: frozenset((v,)) for v in graph.parameters}
    for node in graph.nodes:
        sources = [found[v] for v in node.inputs if isinstance(v, int) and v in found]
        if sources:
            made_of = frozenset[int]().union(*sources)
            found.update((v, made_of) for v in node.outputs if v not in graph.parameters)
    return found


def _is_spread_over_channels(
    root: tuple[int, ...], nodes: list[Node], shape: tuple[int, ...], form: Form
) -> bool:
    """Whether `nodes` make of one number for each channel what is added to every channel."""
    numbers = np.arange(math.prod(form.features)).reshape(root)
    for node in nodes:
        params, aval = node.eqn.params, shape_of(node.eqn.outvars[0])
        if node.primitive == "broadcast_in_dim":
            axes = params["broadcast_dimensions"]
            lengths = [1] * aval.ndim
            for axis, length in zip(axes, numbers.shape, strict=True):
                lengths[axis] = length
            numbers = np.broadcast_to(numbers.reshape(lengths), aval.shape)
        elif node.primitive != "convert_element_type":
            if numbers.size != math.prod(form.features):
                return False
            numbers = numbers.reshape(aval.shape)
    channels = [shape[a] if a in form.channel_axes else 1 for a in range(len(shape))]
    if numbers.shape != shape and numbers.shape != tuple(channels):
        return False
    one = numbers[tuple(slice(n if n > 1 else 1) for n in channels)]
    same = all(
        numbers.strides[a] == 0 for a, n in enumerate(channels) if n == 1 and numbers.shape[a] > 1
    )
    return same and one.ravel().tolist() == list(range(one.size))

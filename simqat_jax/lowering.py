"""Lower a planned model to the operations of an integer model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from simqat_jax import integer_arithmetic as integer
from simqat_jax import replay
from simqat_jax.batch_size import BATCH
from simqat_jax.config import SimQATConfig
from simqat_jax.folding import batch_norm_state, running_affine
from simqat_jax.graph import Constant, Node, Operand
from simqat_jax.integer_forms import channel_affine, deployed_arrays, lookup_table, sum_count
from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Grid, Op, Tensor
from simqat_jax.lowering_moves import move, primitive, window
from simqat_jax.numerics import QuantParams, quant_params, quantize, rounded_product, true_divide
from simqat_jax.observers import as_range_state
from simqat_jax.planning import Placement, Quantizer, Step

NOT_EVALUATION = (
    "{path}: convert takes the model in evaluation, and here it drops out values or uses batch "
    "statistics. Pass the arguments of evaluation, such as train=False, deterministic=True or "
    "use_running_average=True."
)
_FREE = (-math.inf, math.inf)


def _convolution(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Return the convolution inside a Flax layer."""
    found = [eqn]
    while found[0].primitive.name != "conv_general_dilated":
        first = found.pop(0)
        found += [e for sub in core.jaxprs_in_params(first.params) for e in sub.eqns]
    return found[0]


class _Index(int):
    """The number of an output, in the place of its value."""


class Lowering:
    """Makes the operations of an integer model, one step of the plan after the other."""

    def __init__(
        self,
        placement: Placement,
        config: SimQATConfig,
        stats: Mapping[str, Any],
        inputs: Sequence[Any],
        programs: dict[Any, Callable[..., Any]],
        free_batch: bool,
    ):
        self.placement, self.config, self.stats = placement, config, stats
        self.graph = placement.graph
        self.free_batch = free_batch
        self.constants = {
            v: x for v, x in zip(self.graph.inputs, inputs, strict=True) if v not in self.graph.data
        }
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.ids: dict[int, int] = {}
        self.programs = programs
        self.float_constants: list[Any] = []

    def model(self, restore: Callable[[Sequence[Any]], Any]) -> IntegerModel:
        inputs = []
        for v, name in zip(self.graph.inputs, self.graph.input_names, strict=True):
            if v in self.graph.data:
                quantizer = self.placement.at.get(v)
                grid = None if quantizer is None else self.grid_of(quantizer)
                shown = name or f"input_{len(inputs)}"
                self.ids[v] = self.tensor(shown, v, grid)
                inputs.append(self.ids[v])
        for step in self.placement.steps:
            if step.node.data_inputs(self.graph.data):
                self.lower(step)
            else:
                self.compute(step)
        result, _ = restore(list(map(_Index, range(len(self.graph.outputs)))))
        read = jax.tree.leaves(result)
        others = [x for x in read if not isinstance(x, _Index)]
        if others:
            raise ValueError(f"convert takes models that return arrays, and this returns {others}.")
        outputs = [self.output(self.graph.outputs[i]) for i in read]
        ops = self.read_operations(outputs)
        numbers = {i: n for n, i in enumerate(read)}
        metadata = {"simqat_jax": version("simqat-jax"), "config": dataclasses.asdict(self.config)}
        return IntegerModel(
            self.tensors,
            ops,
            inputs,
            outputs,
            _plain(jax.tree.map(lambda i: numbers[i], result)),
            self.config.backend,
            metadata,
        )

    def read_operations(self, outputs: Sequence[int]) -> list[Op]:
        """Return the operations whose results somebody reads."""
        needed, ops = set(outputs), []
        for op in reversed(self.ops):
            if not needed.isdisjoint(op.outputs):
                needed.update(op.inputs)
                ops.append(op)
        return ops[::-1]

    # Tensors ---------------------------------------------------------------------------------

    def shape(self, v: int) -> tuple[int, ...]:
        return self.dims(self.graph.avals[v].shape)

    def dims(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Write multiples of the batch size as negative numbers."""
        free = self.free_batch
        return tuple(-(d // BATCH) if free and d and d % BATCH == 0 else int(d) for d in lengths)

    def tensor(self, name: str, v: int, grid: Grid | None) -> int:
        self.tensors.append(Tensor(name, self.shape(v), str(self.graph.avals[v].dtype), grid))
        return len(self.tensors) - 1

    def constant(self, name: str, value: np.ndarray, dtype: str, grid: Grid | None) -> int:
        self.tensors.append(Tensor(name, value.shape, dtype, grid, value))
        return len(self.tensors) - 1

    def params(self, quantizer: Quantizer) -> QuantParams:
        state = as_range_state(self.stats[quantizer.name])
        return quant_params(jnp.asarray(state.lo), jnp.asarray(state.hi), quantizer.spec)

    def grid_of(self, quantizer: Quantizer) -> Grid:
        return _grid(self.params(quantizer), quantizer)

    def value(self, v: Operand) -> Any:
        """Return an operand that does not depend on the data."""
        return v.value if isinstance(v, Constant) else self.constants[v]

    def is_data(self, v: Operand) -> bool:
        return isinstance(v, int) and v in self.graph.data

    def output(self, v: Operand) -> int:
        if isinstance(v, int) and v in self.ids:
            return self.ids[v]
        value = np.asarray(self.value(v))
        return self.constant("constant", value, str(value.dtype), None)

    def emit(
        self,
        kind: str,
        step: Step,
        inputs: Sequence[int],
        v: int,
        grid: Grid | None,
        attributes: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Any] | None = None,
        function: Any = None,
    ) -> None:
        quantizer = self.placement.at.get(v)
        path = "/".join(step.node.path) or step.node.op
        self.ids[v] = self.tensor(quantizer.name if quantizer else f"{path}/{kind}", v, grid)
        held = {name: np.asarray(a) for name, a in (arrays or {}).items()}
        outputs = (self.ids[v],)
        self.ops.append(
            Op(kind, path, tuple(inputs), outputs, dict(attributes or {}), held, function)
        )

    # Steps -----------------------------------------------------------------------------------

    def compute(self, step: Step) -> None:
        """Compute what does not depend on the data."""
        for node in step.nodes:
            results = node.run(*map(self.value, node.inputs))
            self.constants.update(zip(node.outputs, results, strict=True))

    def lower(self, step: Step) -> None:
        node = step.node
        if node.op == "dropout" or any(n.layer and n.layer.training for n in step.nodes):
            raise ValueError(NOT_EVALUATION.format(path="/".join(node.path)))
        if step.quantized:
            getattr(self, "_" + node.kind)(step)
        elif step.output in self.placement.grids and step.output not in self.placement.at:
            move(self, step)
        else:
            self.compute_in_float(step)

    def compute_in_float(self, step: Step) -> None:
        for node in step.nodes:
            self.ops.append(self.float_op(node))
        for v in (step.output, *step.node.outputs[1:]):
            if v in self.placement.at:
                grid = self.grid_of(self.placement.at[v])
                self.emit("quantize", step, (self.ids[v],), v, grid)

    def float_op(self, node: Node) -> Op:
        """Return the operation that runs a node on real values."""
        data = [v for v in node.inputs if self.is_data(v)]
        positions = [self.is_data(v) for v in node.inputs]
        fixed = [None if p else self.value(v) for v, p in zip(node.inputs, positions, strict=True)]
        free = self.free_batch

        def function(values: Sequence[Any], batch: Any) -> Sequence[Any]:
            rest = iter(values)
            operands = [next(rest) if p else x for p, x in zip(positions, fixed, strict=True)]
            return replay.at_batch(node, operands, BATCH, batch) if free else node.run(*operands)

        path = "/".join((*node.path, node.op))
        outputs = []
        for v in node.outputs:
            self.ids[v] = self.tensor(path, v, None)
            outputs.append(self.ids[v])
        inputs = tuple(map(self.data_id, data))
        self.float_constants += [*fixed, *replay.constants(node)]
        held = {
            "constant_bytes": sum(x.nbytes for x in fixed if isinstance(x, jax.Array | np.ndarray))
        }
        return Op("float", path, inputs, tuple(outputs), held, {}, function)

    # Layers ----------------------------------------------------------------------------------

    def named_values(self, node: Node) -> dict[str, Any]:
        assert node.layer is not None
        values = dict(zip(node.layer.names, map(self.value, node.inputs[1:]), strict=True))
        for name, value in values.items():
            if not np.all(np.isfinite(np.asarray(value, np.float32))):
                raise ValueError(
                    f"{'/'.join(node.path)}: its {name} holds NaN or Inf. Train again from a "
                    "checkpoint without."
                )
        return values

    def in_params(self, step: Step, position: int = 0) -> tuple[QuantParams, Quantizer]:
        v = step.node.inputs[position]
        assert isinstance(v, int)
        quantizer = self.placement.grids[v]
        return self.params(quantizer), quantizer

    def out_params(self, step: Step) -> tuple[QuantParams, Quantizer]:
        quantizer = self.placement.grids[step.output]
        return self.params(quantizer), quantizer

    def clamp(self, step: Step) -> list[int]:
        params, quantizer = self.out_params(step)
        bounds = step.clamp.bounds if step.clamp else _FREE
        return [int(jnp.asarray(b)) for b in integer.code_bounds(bounds, params, quantizer.spec)]

    def deployed(self, step: Step) -> dict[str, np.ndarray]:
        """Return a layer's kernel codes, and for each channel its scale, bias and multiplier."""
        quantizer = self.placement.weights[step.node.layer.path]  # type: ignore[union-attr]
        module: Any = step.node.layer.module  # type: ignore[union-attr]
        norm: Any = step.batch_norm and step.batch_norm.layer
        # Layers that are alike share one compiled program: most of the time goes into compiling.
        key = (module.features, quantizer.num_channels, norm and norm.module.epsilon)
        if key not in self.programs:
            self.programs[key] = jax.jit(
                partial(deployed_arrays, step, quantizer, self.config.bn_fold)
            )
        values = [self.named_values(n) for n in step.nodes if n.layer is not None]
        state = as_range_state(self.stats[quantizer.name]) if quantizer.has_state else None
        mask = getattr(module, "mask", None)
        x_scale, y_scale = self.in_params(step)[0].scale, self.out_params(step)[0].scale
        return jax.device_get(self.programs[key](values, state, mask, x_scale, y_scale))

    def check_sums(self, step: Step, arrays: Mapping[str, np.ndarray]) -> None:
        kernel, bias = arrays["kernel"], arrays["bias"]
        spec = self.in_params(step)[1].spec
        sums = np.abs(kernel.astype(np.int64)).reshape(-1, kernel.shape[-1]).sum(axis=0)
        largest = int(np.max(sums * integer.largest_code(spec) + np.abs(bias.astype(np.int64))))
        if largest > integer.MOST:
            raise ValueError(
                f"{'/'.join(step.node.path)}: its sums may reach {largest}, more than 32 bits "
                f"hold, with activations of {spec.num_bits} bits and {kernel.dtype} weights. Use "
                "fewer bits, or exclude the layer."
            )

    def _conv(self, step: Step) -> None:
        node = step.node
        arrays = self.deployed(step)
        self.check_sums(step, arrays)
        kernel = arrays["kernel"]
        module: Any = node.layer.module  # type: ignore[union-attr]
        params = _convolution(node.eqn).params
        padding, mode = [list(map(int, p)) for p in params["padding"]], "constant"
        if isinstance(module.padding, str) and module.padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            lengths = [
                (k - 1) * d + 1
                for k, d in zip(kernel.shape[:-2], params["rhs_dilation"], strict=True)
            ]
            if module.padding == "CAUSAL":
                padding = [[lengths[0] - 1, 0]]
            else:
                padding = [[(k - 1) // 2, k // 2] for k in lengths]
                mode = "wrap" if module.padding == "CIRCULAR" else "reflect"
        attributes = {
            "strides": list(params["window_strides"]),
            "padding": padding,
            "pad_mode": mode,
            "input_dilation": list(params["lhs_dilation"]),
            "kernel_dilation": list(params["rhs_dilation"]),
            "groups": int(params["feature_group_count"]),
            "clamp": self.clamp(step),
        }
        x, out = node.inputs[0], self.shape(step.output)
        assert isinstance(x, int)
        source, shape = self.ids[x], self.shape(x)
        rank = kernel.ndim
        if len(shape) == rank:
            self.emit("conv", step, (source,), step.output, self.out_grid(step), attributes, arrays)
            return
        leading = shape[: len(shape) - rank + 1]
        lead = abs(math.prod(leading)) * (-1 if any(d < 0 for d in leading) else 1)
        flat = self.reshaped(step, source, (lead, *shape[len(shape) - rank + 1 :]))
        conv = self.intermediate(step, (lead, *out[len(out) - rank + 1 :]), self.out_grid(step))
        path = "/".join(node.path)
        self.ops.append(Op("conv", path, (flat,), (conv,), attributes, arrays))
        self.emit("reshape", step, (conv,), step.output, self.out_grid(step))

    def out_grid(self, step: Step) -> Grid:
        return self.grid_of(self.placement.grids[step.output])

    def intermediate(self, step: Step, shape: tuple[int, ...], grid: Grid | None) -> int:
        dtype = str(self.graph.avals[step.output].dtype)
        self.tensors.append(Tensor("/".join(step.node.path), shape, dtype, grid))
        return len(self.tensors) - 1

    def reshaped(self, step: Step, source: int, shape: tuple[int, ...]) -> int:
        if self.tensors[source].shape == shape:
            return source
        target = self.intermediate(step, shape, self.tensors[source].grid)
        self.ops.append(Op("reshape", "/".join(step.node.path), (source,), (target,)))
        return target

    def _dense(self, step: Step) -> None:
        node = step.node
        arrays = self.deployed(step)
        module: Any = node.layer.module  # type: ignore[union-attr]
        x = node.inputs[0]
        assert isinstance(x, int)
        source, shape = self.ids[x], self.shape(x)
        axes = getattr(module, "axis", -1)
        axes = [a % len(shape) for a in ((axes,) if isinstance(axes, int) else axes)]
        kept = [a for a in range(len(shape)) if a not in axes]
        order = (*kept, *axes)
        if order != tuple(range(len(shape))):
            moved = self.intermediate(
                step, tuple(shape[a] for a in order), self.tensors[source].grid
            )
            path = "/".join(node.path)
            self.ops.append(
                Op("transpose", path, (source,), (moved,), {"permutation": list(order)})
            )
            source = moved
        depth = math.prod(shape[a] for a in axes)
        lead = tuple(shape[a] for a in kept)
        source = self.reshaped(step, source, (*lead, depth))
        kernel = arrays["kernel"] = arrays["kernel"].reshape(depth, -1)
        self.check_sums(step, arrays)
        grid, attributes = self.out_grid(step), {"clamp": self.clamp(step)}
        if self.shape(step.output) == (*lead, kernel.shape[1]):
            self.emit("dense", step, (source,), step.output, grid, attributes, arrays)
            return
        flat = self.intermediate(step, (*lead, kernel.shape[1]), grid)
        self.ops.append(Op("dense", "/".join(node.path), (source,), (flat,), attributes, arrays))
        self.emit("reshape", step, (flat,), step.output, grid)

    def _batch_norm(self, step: Step) -> None:
        node = step.node
        module: Any = node.layer.module  # type: ignore[union-attr]
        x_params, _ = self.in_params(step)
        norm = batch_norm_state(self.named_values(node), module.epsilon)
        slope, shift = running_affine(norm)
        kernel, scale = channel_affine(slope, shift, x_params.scale)
        unit = x_params.scale * scale
        arrays = {
            "kernel": np.asarray(kernel).astype(np.int8),
            "scale": scale,
            "bias": integer.integer_bias(shift, unit),
            "multiplier": true_divide(unit, self.out_params(step)[0].scale),
        }
        x = self.data_id(node.inputs[0])
        attributes = {"clamp": self.clamp(step)}
        self.emit("affine", step, (x,), step.output, self.out_grid(step), attributes, arrays)

    def data_id(self, v: Operand) -> int:
        assert isinstance(v, int)
        return self.ids[v]

    # Functional operations -------------------------------------------------------------------

    def operand(self, step: Step, position: int) -> int:
        """Return the tensor of an operand; put a constant on its grid."""
        v = step.node.inputs[position]
        quantizer = self.placement.constants.get((step, position))
        if quantizer is None or self.is_data(v):
            return self.data_id(v)
        value = jnp.asarray(self.value(v), jnp.float32)
        if quantizer.role == "constant":
            params = quant_params(jnp.min(value), jnp.max(value), quantizer.spec)
        else:
            params = self.params(quantizer)
        grid = _grid(params, quantizer)
        codes = quantize(value, *params, quantizer.spec, None)
        name = quantizer.name
        return self.constant(name, np.asarray(codes).astype(grid.dtype), "float32", grid)

    def pair(self, step: Step) -> tuple[list[int], list[Grid]]:
        ids = [self.operand(step, p) for p in range(2)]
        grids = [self.tensors[i].grid for i in ids]
        return ids, [g for g in grids if g is not None]

    def _add(self, step: Step) -> None:
        ids, grids = self.pair(step)
        params, _ = self.out_params(step)
        if max(g.qmax - g.qmin for g in grids) > 255:
            self.compute_in_float(step)
            return
        subtract = step.node.op == "sub"
        attributes: dict[str, Any] = {"clamp": self.clamp(step)}
        kind, (a, b) = "add", (g.params for g in grids)
        if self.config.backend == "tflite":
            scales = a.scale, -b.scale if subtract else b.scale
            multipliers = integer.add_multipliers(scales, params.scale)
            attributes["multipliers"] = [int(m) for m in multipliers]
        elif subtract:
            kind = "sub_onnx"
        else:
            kind = "add_onnx"
            multipliers = integer.add_onnxruntime_multipliers(a, b, params)
            attributes["multipliers"] = [float(m) for m in multipliers]
        self.emit(kind, step, ids, step.output, self.out_grid(step), attributes)

    def _mul(self, step: Step) -> None:
        ids, grids = self.pair(step)
        if not integer.product_fits(*((g.qmax - g.qmin).bit_length() for g in grids)):
            self.compute_in_float(step)
            return
        unit = jnp.float32(grids[0].scale) * jnp.float32(grids[1].scale)
        multiplier = true_divide(unit, self.out_params(step)[0].scale)
        attributes = {"clamp": self.clamp(step)}
        arrays = {"multiplier": multiplier}
        kind = "mul" if self.config.backend == "tflite" else "mul_onnx"
        self.emit(kind, step, ids, step.output, self.out_grid(step), attributes, arrays)

    def _mean(self, step: Step) -> None:
        node = step.node
        divisor: Any = 1.0 if node.divisor is None else self.value(node.divisor)
        x = node.inputs[0]
        assert isinstance(x, int)
        count = sum_count(node, self.graph.avals[x].shape)
        if np.size(divisor) != 1 or not integer.sum_fits(count, self.in_params(step)[1].spec):
            self.compute_in_float(step)
            return
        divisor = jnp.asarray(divisor, jnp.float32).reshape(())
        params, _ = self.out_params(step)
        unit = true_divide(self.in_params(step)[0].scale, rounded_product(params.scale, divisor))
        attributes: dict[str, Any] = {"clamp": self.clamp(step), "count": float(divisor)}
        eqn = node.eqn.params
        if "axes" in eqn:
            kind = "sum"
            attributes["axes"] = list(eqn["axes"])
        else:
            kind = "sum_pool"
            attributes |= window(eqn)
        x = self.data_id(node.inputs[0])
        arrays = {"multiplier": unit}
        self.emit(kind, step, (x,), step.output, self.out_grid(step), attributes, arrays)

    def _elementwise(self, step: Step) -> None:
        node = step.node
        x_params, x_quantizer = self.in_params(step)
        params, quantizer = self.out_params(step)
        dtype = self.graph.avals[node.inputs[0]].dtype  # type: ignore[index]
        operands = [jnp.zeros((), dtype), *map(self.value, node.inputs[1:])]
        table = lookup_table(node, operands, x_params, x_quantizer.spec, params, quantizer.spec)
        grid = self.out_grid(step)
        codes = np.asarray(table).astype(np.int32) + grid.zero_point
        arrays = {"table": codes.astype(grid.dtype)}
        x = self.data_id(node.inputs[0])
        self.emit("table", step, (x,), step.output, grid, {}, arrays)

    _clamp = _elementwise

    def _concat(self, step: Step) -> None:
        node, grid = step.node, self.out_grid(step)
        ids = [self.operand(step, p) for p in range(len(node.inputs))]
        ids = [i for i in ids if 0 not in self.tensors[i].shape] or ids
        axis = int(node.eqn.params["axis" if primitive(node) == "stack" else "dimension"])
        if primitive(node) == "stack":
            shapes = (self.tensors[i].shape for i in ids)
            one = [(*shape[:axis], 1, *shape[axis:]) for shape in shapes]
            ids = [self.reshaped(step, i, shape) for i, shape in zip(ids, one, strict=True)]
        attributes = {"axis": axis}
        self.emit("concat", step, ids, step.output, grid, attributes)


def _grid(params: QuantParams, quantizer: Quantizer) -> Grid:
    spec = quantizer.spec
    return Grid(float(params.scale), int(params.zero_point), spec.qmin, spec.qmax)


def _plain(tree: Any) -> Any:
    """Rebuild a tree from dictionaries, lists and tuples, as a file can hold it."""
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return {k: _plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(map(_plain, tree))
    if tree is None or isinstance(tree, int):
        return tree
    raise ValueError(
        f"the model returns a {type(tree).__name__}, which a file cannot hold. Return arrays, "
        "lists, tuples or dictionaries with strings as keys."
    )

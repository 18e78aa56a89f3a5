"""What moves codes does with them what it does with real values, by operations of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import observed
from steps import planned
from zoo import Model

import simqat_jax as sq
from simqat_jax.ir.graph import Elementwise, Move
from simqat_jax.ir.program import grid_of
from simqat_jax.ops.registry import operation_of

ROWS, COLUMNS = jnp.array([2, 0, 3]), jnp.array([0, 1, 1])


def pooled(x, dilation=(1, 1), inner=(1, 1)):
    """The highest of windows of 2 by 2, whose elements or whose input lie apart."""
    dims = (1, 2, 2, 1)
    given = {"window_dilation": (1, *dilation, 1), "base_dilation": (1, *inner, 1)}
    return lax.reduce_window(x, -jnp.inf, lax.max, dims, (1, 1, 1, 1), "VALID", **given)


def rows_apart(x):
    """An axis of the input between those that places become."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(0, 2, 4), collapsed_slice_dims=(1,), start_index_map=(1,)
    )
    places = jnp.array([[2, 0, 1], [3, 3, 4]])[..., None]
    return lax.gather(x, places, numbers, (x.shape[0], 1, 4, 3))


MOVES = {
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "transpose": lambda x: x.transpose(0, 3, 1, 2),
    "slice": lambda x: x[:, 1:5:2, 2:],
    "reverse": lambda x: jnp.flip(x, (1, 3)),
    "pad": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 2), (0, 3, 0), (0, 0, 0))),
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 2, *x.shape[1:])),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min((1, 2)),
    "max_pool": lambda x: nn.max_pool(x, (3, 2), (2, 1), "SAME"),
    "clip": nn.relu,
    "take": lambda x: x[:, jnp.array([3, 0, 0])],
    "concat": lambda x: jnp.concatenate([x, x[:, :, :0], x[:, :, :1]], 2),
}
"""By the kind of the operation that they become."""
SEVERAL = {
    "clip from above": (lambda x: jnp.minimum(x, 0.0), "clip"),
    "along two axes": (lambda x: x[:, ROWS, COLUMNS], "take"),
    "along the last axes": (lambda x: x[:, :, ROWS, COLUMNS], "take"),
    "along axes apart": (lambda x: x[:, COLUMNS, :, ROWS - 1], "take"),
    "one place": (lambda x: x[:, jnp.array([2])], "take"),
    "a grid of places": (lambda x: x[:, jnp.array([[2, 0], [1, 1]])], "reshape"),
    "stack": (lambda x: jnp.stack([x, x], 2), "concat"),
}
"""And those that become the operation named beside."""
OTHERS = {
    "windows apart": lambda x: pooled(x, dilation=(2, 1)),
    "elements apart": lambda x: pooled(x, inner=(1, 2)),
    "rows apart": rows_apart,
    "one beyond the end": lambda x: x.at[:, ROWS + 4, COLUMNS].get(mode="clip"),
    "one before the first": lambda x: x.at[:, ROWS, COLUMNS - 1].get(
        mode="fill", fill_value=0.0, wrap_negative_indices=False
    ),
}
"""What has no operation of its own: other windows and indices than these have."""
FUNCTIONS = MOVES | {name: function for name, (function, _) in SEVERAL.items()} | OTHERS


def body(x):
    moved = {name: function(x) for name, function in FUNCTIONS.items()}
    return moved | {"split": jnp.split(x, [1, 3], 1), "layer": nn.Dense(2)(x)}


def test_codes_are_moved_as_real_values():
    x = jax.random.uniform(jax.random.key(0), (2, 5, 4, 3), minval=-1.0, maxval=2.0)
    qmodel, variables, _ = observed(Model(body), x)
    model = sq.convert(qmodel, variables, x)
    zero = int(grid_of(model.tensors[model.inputs[0]]).zero_point)
    assert zero not in (0, 128, 255)
    codes = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3)).astype(np.uint8)
    got, centered = model.run_codes(codes), jnp.asarray(codes, jnp.float32) - zero
    for name, function in FUNCTIONS.items():
        want = np.asarray(function(centered)) + zero
        np.testing.assert_array_equal(got[name], np.clip(want, 0, 255), err_msg=name)
    for part, want in zip(got["split"], np.split(codes, [1, 3], 1), strict=True):
        np.testing.assert_array_equal(part, want)
    made = {i: op.kind for op in model.ops for i in op.outputs}
    outputs = dict(zip(model.program.output_names(), model.outputs, strict=True))
    kinds = {name: made.get(i) for name, i in outputs.items()}
    wanted = {name: name for name in MOVES} | {name: kind for name, (_, kind) in SEVERAL.items()}
    assert {name: kinds[name] for name in wanted} == wanted
    assert not {kinds[name] for name in OTHERS} & {"max_pool", "take", "reshape"}
    (concat,) = (op for op in model.ops if outputs["concat"] in op.outputs)
    assert len(concat.inputs) == 2  # runtimes take no tensor without elements


@pytest.mark.parametrize(
    ("behind", "wanted"), [(lambda x: x, True), (lambda x: jnp.log(2.0 + x), False)]
)
def test_what_leads_to_an_output_is_on_integers_in_front_of_a_move(behind, wanted):
    plan = planned(lambda x: behind(nn.tanh(nn.Dense(3)(x)).reshape(-1)), (2, 4))
    assert next(s.quantized for s in plan.steps if isinstance(s.node, Elementwise)) == wanted


def neighbours(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 1, 2), (1, 1, 1, 1), "SAME")


CHANNELS = {
    "rows and columns in one": (lambda x: x.reshape(2, -1, 4), True),
    "windows": (lambda x: nn.max_pool(x, (2, 2), (2, 2)), True),
    "all in one": (lambda x: x.reshape(2, -1), False),
    "turned": (lambda x: x.swapaxes(2, 3), False),
    "neighbours": (neighbours, False),
}


def test_what_keeps_its_channels_keeps_their_grids():
    def body(x):
        return [function(nn.Dense(4)(x)) for function, _ in CHANNELS.values()]

    graph = planned(body, (2, 4, 4, 3)).graph
    moves = [node for node in graph.nodes if isinstance(node, Move)]
    kept = [operation_of(n).carries_grid(n, graph, per_channel=True) for n in moves]
    assert kept == [wanted for _, wanted in CHANNELS.values()]
    assert all(operation_of(n).carries_grid(n, graph, per_channel=False) for n in moves)

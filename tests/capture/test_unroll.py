"""Loops of known length: layers that are scanned over, cells that are called at each time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import assert_same, by_half, initialized, observed
from zoo import Model

import simqat_jax as sq
from simqat_jax.capture import Call, capture
from simqat_jax.capture.unroll import MAX_STEPS, Iteration, numbered
from simqat_jax.ir.graph import Constant

KEY = jax.random.key(0)
ROWS = jax.random.normal(KEY, (2, 4))
SEQUENCES = jax.random.normal(KEY, (2, 3, 4))
STATE = jax.random.normal(KEY, (2, 4))
NORMAL = nn.initializers.lecun_normal()


class Block(nn.Module):
    """A residual block, as a step of a loop over layers."""

    @nn.compact
    def __call__(self, x, _=None):
        w = self.param("w", NORMAL, (5, 4))
        return x + nn.relu(nn.Dense(5)(x)) @ w, x.mean(-1)


class Group(nn.Module):
    """Two blocks, by a loop."""

    @nn.compact
    def __call__(self, x, _):
        return layers(2)(name="inner")(x, None)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(4)(x))


class Normed(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x)), None


def layers(length, block=Block, axis=0):
    axes = {"params": axis, "batch_stats": 0}
    return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=length)


def rnn(cell, **settings):
    """A recurrent network; it may be told what it starts from, and how long its sequences are."""

    def body(x, carry=None, lengths=None):
        y = nn.RNN(cell, **settings)(x, initial_carry=carry, seq_lengths=lengths)
        return nn.Dense(3)(y)

    return Model(body)


class ByHand(nn.Module):
    """A loop over kernels, in reverse, and one that counts."""

    @nn.compact
    def __call__(self, x):
        kernels = {"w": self.param("w", NORMAL, (3, 4, 4)), "scale": jnp.arange(3.0) + 1}
        v = self.param("v", NORMAL, (2, 4, 4))

        def step(carry, k):
            x, count = carry
            return (jnp.tanh(x @ k["w"]) * k["scale"], count + 1), {"x": x, "count": (count,)}

        (x, count), seen = lax.scan(step, (x, 5), kernels, reverse=True)
        x = lax.fori_loop(0, 2, lambda i, x: x @ v[i], x)
        return nn.Dense(2)(x), count, seen


def scanned(length):
    return Model(lambda x: nn.Dense(3)(layers(length)(name="layers")(x, None)[0]))


MODELS = {
    "layers": Model(lambda x: layers(3)(name="layers")(x, None)),
    "nested, another axis": Model(lambda x: layers(2, Group, axis=1)(name="outer")(x, None)),
    "remat": Model(lambda x: nn.remat_scan(Plain, lengths=(2, 2))(name="deep")(x)),
    "by hand": ByHand(),
    "LSTM": rnn(nn.LSTMCell(4)),
    "time first": rnn(nn.SimpleCell(4), time_major=True, reverse=True, unroll=2),
    "both ways": Model(
        lambda x: nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.SimpleCell(4)))(x)
    ),
    "rematerialized cell": Model(
        lambda x: nn.RNN(nn.remat(nn.OptimizedLSTMCell)(4), return_carry=True)(x)
    ),
}
SEQUENTIAL = [name for name in list(MODELS)[list(MODELS).index("LSTM") :]]


class Nowhere(nn.Module):
    """No model holds it."""


def replayed(model, variables, *args):
    """Run the nodes of a captured call one by one."""
    call = Call(model, variables, args, {}, None, rngs={}, mutable=[])
    graph, inputs, restore, _ = capture(call, config=sq.SimQATConfig(), forbidden=Nowhere)
    env = dict(zip(graph.inputs, inputs, strict=True))

    def read(v):
        return v.value if isinstance(v, Constant) else env[v]

    for node in graph.nodes:
        assert node.primitive != "scan"
        env.update(zip(node.outputs, node.run(*map(read, node.inputs)), strict=True))
    return restore([jnp.asarray(read(v)) for v in graph.outputs])[0]


def assert_replayed(model, *args):
    variables = model.init(KEY, *args)
    with jax.disable_jit():
        want = model.apply(variables, *args)
    assert_same(replayed(model, variables, *args), want)


@pytest.mark.parametrize("name", by_half(MODELS))
def test_a_graph_computes_what_the_loop_does(name):
    assert_replayed(MODELS[name], SEQUENCES if name in SEQUENTIAL else ROWS)


def test_a_recurrent_network_is_told_where_it_starts_and_ends():
    model = rnn(nn.SimpleCell(4), reverse=True, keep_order=True)
    assert_replayed(model, SEQUENCES, STATE, jnp.array([1, 3]))


# Names and ranges --------------------------------------------------------------------------------


def ranges(model, *args, **config):
    """Return the names of the ranges, by way of shapes alone."""
    qmodel = sq.SimQAT(sq.SimQATConfig(**config)).apply(model)
    return set(jax.eval_shape(qmodel.init, KEY, *args)["quant_stats"]) - {"step"}


def test_each_layer_has_kernels_and_ranges_of_its_own():
    qmodel, variables = initialized(scanned(2), ROWS)
    own = {f"layers/{n}/{k}/output" for n in "01" for k in ("Dense_0", "w", "add")}
    assert set(variables["quant_stats"]) == own | {"input", "Dense_0/output", "step"}
    weights = {
        q.name for q in qmodel.plan(variables, ROWS).quantizers.values() if q.role == "weight"
    }
    assert weights == {f"layers/{n}/{k}" for n in "01" for k in ("Dense_0/kernel", "w")} | {
        "Dense_0/kernel"
    }


def test_layers_inside_of_layers_have_two_numbers():
    assert {
        name for name in ranges(MODELS["nested, another axis"], ROWS) if name.endswith("w/output")
    } == {f"outer/{n}/inner/{k}/w/output" for n in "01" for k in "01"}
    loops = [
        Iteration(("a",), 2, True),
        Iteration(("a",), 3, True),
        Iteration(("a", "b"), 4, False),
    ]
    assert numbered(("a", "b"), loops) == ("a", "2", "3", "b")
    assert numbered(("c",), loops[:1]) == ("2", "c")


@pytest.mark.parametrize(
    ("pattern", "left"),
    [("layers/1", "02"), ("layers/Dense_0", ""), ("layers/*/Dense_0", "")],
)
def test_layers_can_be_left_float(pattern, left):
    found = ranges(scanned(3), ROWS, exclude=(pattern,))
    assert "".join(n for n in "012" if f"layers/{n}/Dense_0/output" in found) == left


CELL = {"RNN_0/cell/add/output", "RNN_0/cell/tanh/output"} | {
    f"RNN_0/cell/{k}/output" for k in "ih"
}


def test_all_times_have_the_same_ranges():
    model = rnn(nn.SimpleCell(4))
    assert ranges(model, SEQUENCES) == CELL | {"input", "Dense_0/output"}
    assert ranges(model, SEQUENCES[:1, :2]) == ranges(model, SEQUENCES)


def test_names_do_not_depend_on_where_a_network_starts():
    model = rnn(nn.LSTMCell(4))
    started = {name for name in ranges(model, SEQUENCES, (STATE, STATE)) if "input" not in name}
    assert started == ranges(model, SEQUENCES) - {"input"}


def test_a_range_holds_the_extremes_of_all_times():
    model = rnn(nn.SimpleCell(4))
    late = sq.SimQATConfig(
        activation=sq.QuantSpec(observer="minmax", quant_delay=9),
        weight=sq.QuantSpec(
            symmetric=True, per_channel=False, narrow_range=False, observer="batch", quant_delay=9
        ),
    )
    _, variables, _ = observed(model, SEQUENCES, config=late)
    cell, h, seen = variables["params"]["RNN_0"]["cell"], np.zeros((2, 4)), []
    for t in range(3):
        inputs = np.asarray(SEQUENCES[:, t]) @ np.asarray(cell["i"]["kernel"])
        h = np.tanh(inputs + np.asarray(cell["i"]["bias"]) + h @ np.asarray(cell["h"]["kernel"]))
        seen.append(h)
    state = variables["quant_stats"]["RNN_0/cell/tanh/output"]
    np.testing.assert_allclose(state.lo, np.min(seen), rtol=1e-5)
    np.testing.assert_allclose(state.hi, np.max(seen), rtol=1e-5)
    assert len({h.max() for h in seen}) == 3


# Training and codes ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["layers", "cell"])
def trained(request):
    """A model, its quantized model, variables after a training step, and the step's gradient."""
    model = {"layers": scanned(2), "cell": rnn(nn.SimpleCell(4))}[request.param]
    x = SEQUENCES if request.param == "cell" else ROWS
    qmodel, variables = initialized(model, x)

    def loss(params, model, state):
        y, updates = model.apply({"params": params, **state}, x, mutable=["quant_stats"])
        return (y**2).sum(), updates

    state = {"quant_stats": variables["quant_stats"]}
    gradient, updates = jax.jit(jax.grad(lambda p: loss(p, qmodel, state), has_aux=True))(
        variables["params"]
    )
    float_gradient, _ = jax.grad(lambda p: loss(p, model, {}), has_aux=True)(variables["params"])
    return qmodel, variables | updates, x, gradient, float_gradient


def test_gradients_are_near_those_of_the_float_model(trained):
    *_, gradient, want = trained
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) < 0.2 * np.linalg.norm(b)


def test_the_integer_model_has_the_codes_of_evaluation(trained):
    qmodel, variables, x, *_ = trained
    model = sq.convert(qmodel, variables, x)
    assert all(op.kind != "float" for op in model.program.ops)
    assert_same(model(x), jax.jit(qmodel.apply)(variables, x))


def test_layers_keep_statistics_of_their_own():
    def body(x, train):
        return nn.Dense(2)(layers(2, Normed)(train, name="layers")(x, None)[0])

    model = Model(body)
    qmodel, variables = initialized(model, ROWS, False)
    plain = {k: v for k, v in variables.items() if k != "quant_stats"}
    _, updates = qmodel.apply(variables, ROWS, True, mutable=["batch_stats", "quant_stats"])
    _, want = model.apply(plain, ROWS, True, mutable=["batch_stats"])
    for a, b in zip(
        *map(jax.tree.leaves, (updates["batch_stats"], want["batch_stats"])), strict=True
    ):
        assert a.shape == b.shape == (2, 4)
        np.testing.assert_allclose(a, b, atol=0.05)
    plan = qmodel.plan(variables, ROWS, False)
    assert [row.path for row in plan.rows if "BatchNorm" in row.op] == [
        "layers/0/Dense_0",
        "layers/1/Dense_0",
    ]


# Recurrences without products --------------------------------------------------------------------


def by_time(step, *parts):
    """The results of steps over time, from zeros."""
    start = jnp.zeros_like(parts[0][:, 0])
    over = tuple(part.swapaxes(0, 1) for part in parts)
    return lax.scan(step, start, over)[1].swapaxes(0, 1)


def quasi_recurrent(x):
    z, f = nn.tanh(nn.Dense(4)(x)), nn.sigmoid(nn.Dense(4)(x))
    return by_time(lambda h, s: (s[1] * h + (1 - s[1]) * s[0],) * 2, z, f)


def smoothed(x):
    return by_time(lambda h, s: (0.75 * h + 0.25 * s[0],) * 2, nn.Dense(4)(x))


def repeatedly(x):
    return lax.fori_loop(0, 3, lambda _, c: 0.5 * c + nn.tanh(c), nn.Dense(4)(x))


RECURRENCES = [quasi_recurrent, smoothed, repeatedly]


@pytest.mark.parametrize("function", RECURRENCES)
def test_recurrences_without_products_are_on_integers_and_in_files(function, tmp_path):
    model = Model(lambda x: nn.Dense(3)(function(x)))
    qmodel, variables, _ = observed(model, SEQUENCES)
    integer = sq.convert(qmodel, variables, SEQUENCES)
    assert not integer.program.float_ops
    assert_same(integer(SEQUENCES), jax.jit(qmodel.apply)(variables, SEQUENCES))
    sq.export_tflite(integer, tmp_path / "model.tflite")
    assert not sq.verify(integer, tmp_path / "model.tflite", SEQUENCES).differing


def test_a_long_recurrence_without_products_stays_a_loop():
    model, long = Model(lambda x: nn.Dense(3)(smoothed(x))), jnp.ones((1, MAX_STEPS + 1, 4))
    assert any(path.startswith("scan/") for path in ranges(model, long))


# What is too long --------------------------------------------------------------------------------


def test_a_loop_that_is_too_long_is_named_and_can_be_left_out():
    model, long = rnn(nn.SimpleCell(4)), jnp.ones((1, MAX_STEPS + 1, 4))
    reason = f"RNN_0/cell/i: .*scan` of {MAX_STEPS + 1} steps, and at most {MAX_STEPS} are unrolled"
    with pytest.raises(ValueError, match=reason) as error:
        ranges(model, long)
    assert "exclude=('RNN_0/cell/i', 'RNN_0/cell/h')" in str(error.value)
    left_out = ranges(model, long, exclude=("RNN_0/cell/i", "RNN_0/cell/h"))
    assert left_out == ranges(model, long, strict=False) == {"RNN_0/scan/output", "Dense_0/output"}

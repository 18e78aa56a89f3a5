"""Planning: one quantizer for each tensor, at its producer, under a name of its own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import observed, step
from zoo import Model

import simqat_jax as sq

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 6, 4))


def plan_of(body, x=X, config=None, **kwargs):
    qmodel = sq.SimQAT(config).apply(body if isinstance(body, nn.Module) else Model(body))
    variables = jax.eval_shape(lambda: qmodel.init(KEY, x, **kwargs))
    return qmodel.plan(variables, x, **kwargs)


def table(plan):
    """Return (what, quantizer or the grid it keeps) of each row."""
    return [
        (" + ".join(part.split("(")[0] for part in row.op.split(" + ")), where(row))
        for row in plan.rows
    ]


def where(row):
    return row.output.name if row.output else row.note.removeprefix("on the grid of ")


def activations(plan):
    return [q.name for q in plan.quantizers.values() if q.role == "activation"]


def dense(x, features=6, name=None):
    return nn.Dense(features, name=name)(x)


# Placement ---------------------------------------------------------------------------------------


def test_relu_of_a_tensor_with_several_readers_keeps_its_grid():
    plan = plan_of(lambda x: (lambda y: dense(nn.relu(y)) + y)(dense(x, name="a")))
    assert table(plan) == [
        ("Dense", "a/output"),
        ("relu", "a/output"),
        ("Dense", "Dense_0/output"),
        ("add", "add/output"),
    ]


def test_clip_of_a_tensor_with_several_readers_has_a_grid_of_its_own():
    plan = plan_of(lambda x: (lambda y: dense(jnp.clip(y, 0, 6)) + y)(dense(x, name="a")))
    assert table(plan)[:2] == [("Dense", "a/output"), ("clip", "clip/output")]


def test_an_output_that_is_also_read_inside():
    def body(x):
        y = dense(x, name="a")
        return y, nn.relu(y), dense(nn.relu(y), name="b")

    assert table(plan_of(body)) == [
        ("Dense", "a/output"),
        ("relu", "a/output"),
        ("relu", "a/output"),
        ("Dense", "b/output"),
    ]


def test_fused_behind_each_kind():
    def body(x):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (1, 1), name="c")(x)))
        y = nn.relu(y + nn.Conv(4, (1, 1), name="d")(y))
        return nn.relu(nn.avg_pool(y, (2, 2)) * nn.max_pool(y, (2, 2), (1, 1)))

    assert table(plan_of(body, IMAGE)) == [
        ("Conv + BatchNorm + relu", "c/output"),
        ("Conv", "d/output"),
        ("add + relu", "add/output"),
        ("avg_pool", "avg_pool/output"),
        ("max_pool", "add/output"),
        ("mul + relu", "mul/output"),
    ]


def test_batch_norm_is_folded_only_into_a_layer_that_nothing_else_reads():
    def body(x):
        y = dense(x, name="a")
        return nn.BatchNorm(use_running_average=True)(y) + y

    assert [op for op, _ in table(plan_of(body))] == ["Dense", "BatchNorm", "add"]


def test_a_float_operation_between_layers_is_quantized_behind():
    plan = plan_of(lambda x: dense(jax.lax.cumsum(dense(x, name="a"), 1), name="b"))
    assert table(plan)[1] == ("cumsum", "cumsum/output")
    assert plan.rows[1].note == (
        "float: no integer form; its result is quantized for an integer operation"
    )


def test_scalings_of_the_input_take_no_grid_before_they_are_done():
    plan = plan_of(
        lambda x: dense(
            (x / 255 - jnp.arange(6.0).reshape(1, 6)) / jnp.arange(1.0, 7.0).reshape(1, 6)
        ),
        jnp.zeros((4, 6), jnp.uint8),
    )
    assert activations(plan) == ["div/output", "Dense_0/output"]


# One grid for several tensors --------------------------------------------------------------------


def test_concat_shares_one_grid():
    def body(x):
        a, b = nn.relu(dense(x, name="a")), dense(x, name="b")
        c = jnp.concatenate([a, b], -1)
        d = jnp.concatenate([c, dense(c, name="d"), jnp.ones((4, 1))], -1)
        return dense(d, name="e") + dense(a, name="f")

    plan = plan_of(body)
    assert activations(plan) == [
        "input",
        "concat_1/output",
        "e/output",
        "f/output",
        "add/output",
    ]
    assert dict(table(plan))["concat"] == "concat_1/output"


def test_concat_of_a_tensor_with_itself_and_with_the_input():
    plan = plan_of(lambda x: dense(jnp.concatenate([x, x], -1)))
    assert activations(plan) == ["input", "Dense_0/output"]
    plan = plan_of(lambda x: dense(jnp.concatenate([dense(x, name="a"), x], -1), name="b"))
    assert activations(plan) == ["concat/output", "b/output"]


def test_the_shared_range_holds_all_tensors():
    def body(x):
        return jnp.concatenate([dense(x, name="a"), 9 * dense(x, name="b")], -1)

    qmodel, variables, _ = observed(Model(body), X)
    floats = jnp.asarray(Model(body).apply({"params": variables["params"]}, X))
    state = variables["quant_stats"]["concat/output"]
    np.testing.assert_allclose([state.lo, state.hi], [floats.min(), floats.max()], rtol=0.02)
    y = qmodel.apply(variables, X)
    step = float(state.hi - state.lo) / 255
    codes = np.asarray(y) / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)


@pytest.mark.parametrize("observer", ["batch", "ema", "minmax"])
def test_training_shows_the_shared_range_that_evaluation_uses(observer):
    def body(x):
        for scale in (4, 8, 2):
            x = jnp.concatenate([x, scale * dense(x)], -1)
        return x

    spec = sq.QuantSpec(observer=observer)
    # The first step meets ranges that have seen nothing.
    qmodel, variables, _ = observed(Model(body), X, config=sq.SimQATConfig(activation=spec))
    y, variables = step(qmodel, variables, X)
    state = variables["quant_stats"]["concat_2/output"]
    assert float(state.hi - state.lo) > 20 * float(X.max() - X.min())
    floats = jnp.asarray(Model(body).apply({"params": variables["params"]}, X))
    in_training, in_evaluation = (
        jnp.linalg.norm(floats - jnp.asarray(got)) for got in (y, qmodel.apply(variables, X))
    )
    assert 0.6 < in_training / in_evaluation < 1.6
    assert len(jnp.unique(y[:, :6])) < 25  # a coarse grid for the small input, in training too


# Names -------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Layers that are named like the second call of another, and like functions."""

    def setup(self):
        self.conv, self.conv_1 = nn.Dense(6), nn.Dense(6)
        self.add, self.add_1 = nn.Dense(6), nn.Dense(6)

    def __call__(self, x):
        x = self.conv_1(self.conv(self.conv(x)))
        return self.add_1(self.add(x) + x) + x + self.add(x)


def test_no_two_quantizers_have_one_name():
    plan = plan_of(Named())
    outputs = [row.output.name for row in plan.rows if row.output]
    assert outputs == [
        "conv/output",
        "conv/output_1",
        "conv_1/output",
        "add/output",
        "add_1/output",
        "add_1/output_1",
        "add_2/output",
        "add/output_1",
        "add_3/output",
    ]
    assert len([q for q in plan.quantizers.values() if q.role == "weight"]) == 4


class Trained(nn.Module):
    """Everything that differs between training and evaluation."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x) + 1.0
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x).mean((1, 2)))


def test_training_and_evaluation_have_the_same_plan():
    training, evaluation = (plan_of(Trained(), IMAGE, train=train) for train in (True, False))
    assert list(training.quantizers) == list(evaluation.quantizers)
    assert [q.spec for q in training.quantizers.values()] == [
        q.spec for q in evaluation.quantizers.values()
    ]


class Auxiliary(nn.Module):
    """A second head that only training computes, in front of the mean of the first."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        aux = nn.Dense(3, name="aux")(x.mean((1, 2)) * 9) if train else None
        return nn.Dense(3)(nn.Conv(4, (3, 3))(x).mean((1, 2))), aux


def test_ranges_of_operations_that_only_training_counts_are_not_taken_for_others():
    qmodel = sq.SimQAT().apply(Auxiliary())
    variables = qmodel.init(KEY, IMAGE, train=True)
    _, updates = qmodel.apply(variables, IMAGE, train=True, mutable=["quant_stats"])
    with pytest.raises(ValueError, match=r"mean_1/output.*cannot be told apart.*module of its own"):
        qmodel.apply({**variables, **updates}, IMAGE, train=False)


# Per-channel activations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "carried"),
    [
        (lambda x: nn.max_pool(x, (2, 2), (1, 1)), True),
        (lambda x: x.reshape(2, -1, 4), True),
        (lambda x: x[:, 1:3], True),
        (lambda x: x[:, :, :4].transpose(0, 1, 3, 2), False),
        (lambda x: x[:, :, :4].max(-1), False),
        (lambda x: x[:, :, 0][..., None] * jnp.ones((1, 1, 1, 4)), False),
        (lambda x: x[..., ::-1], False),
        (lambda x: nn.max_pool(x[..., None], (1, 1, 2), padding="SAME")[..., 0], False),
        (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 1, 2), (1,) * 4, "SAME"), False),
    ],
)
def test_a_grid_for_each_channel_stays_with_its_channel(function, carried):
    def body(x):
        return dense(function(nn.Conv(4, (3, 3))(x)))

    spec = sq.QuantSpec(per_channel=True)
    config = sq.SimQATConfig(activation=spec)
    plan = plan_of(body, IMAGE, config)
    assert ("Dense", "Dense_0/output") in table(plan)
    assert (len(activations(plan)) == 3) is carried
    qmodel = sq.SimQAT(config).apply(Model(body))
    variables = qmodel.init(KEY, IMAGE)
    conv = variables["params"]["Conv_0"]
    factors = jnp.array([0.01, 1, 10, 0.1]).reshape(1, 1, 1, 4)
    variables["params"]["Conv_0"] = {**conv, "kernel": jnp.asarray(conv["kernel"]) * factors}
    y, variables = step(qmodel, variables, IMAGE)
    floats = jnp.asarray(Model(body).apply({"params": variables["params"]}, IMAGE))
    for got in (y, qmodel.apply(variables, IMAGE)):
        assert jnp.abs(floats - jnp.asarray(got)).max() < 0.03 * jnp.abs(floats).max()


# Order -------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One BatchNorm behind two layers, called in the reverse of their order; a late mask."""

    @nn.compact
    def __call__(self, x):
        a, b = dense(x, name="a"), dense(x, name="b")
        norm = nn.BatchNorm(use_running_average=False, momentum=0.5)
        second = norm(b)
        return second + norm(a, mask=(second[:, :1] < 9))


def test_a_fused_batch_norm_may_need_what_was_computed_after_its_layer():
    qmodel = sq.SimQAT(sq.SimQATConfig(bn_fold="none")).apply(Shared())
    variables = qmodel.init(KEY, X)
    y, updates = qmodel.apply(variables, X, mutable=["quant_stats", "batch_stats"])
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    want, want_updates = Shared().apply(floats, X, mutable=["batch_stats"])
    assert jnp.abs(y - want).max() < 0.1
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            updates["batch_stats"]["BatchNorm_0"][name],
            want_updates["batch_stats"]["BatchNorm_0"][name],
            atol=0.02,
        )


# Where BatchNorm is folded ------------------------------------------------------------------------


def rows(body, x, **kwargs):
    """The plan of a model made of a function."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(x)

    qmodel = sq.SimQAT(sq.SimQATConfig(**kwargs)).apply(Model())
    variables = qmodel.init(jax.random.key(0), x)
    plan = qmodel.plan(variables, x)
    return qmodel, variables, {row.path: row for row in plan.rows}


def norm(**kwargs):
    return nn.BatchNorm(use_running_average=True, **kwargs)


IMAGES = jax.random.normal(jax.random.key(8), (4, 6, 6, 3))


def evaluated(qmodel, variables, x):
    """Quantized evaluation against the float network, relative to its largest output."""
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    got = qmodel.apply({**variables, **updates}, x)
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    want = qmodel.module.apply(floats, x)
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def test_a_convolution_that_something_else_reads_is_not_folded():
    def body(x):
        x = nn.Conv(4, (3, 3))(x)
        return norm()(x) + x

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["BatchNorm_0"].note == "on its own: a 1x1 depthwise convolution"
    assert plan["Conv_0"].note == "" and where(plan["Conv_0"]) == "Conv_0/output"
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_pre_activation_keeps_its_batch_norm_as_a_layer():
    def body(x):
        x = nn.Conv(4, (3, 3), name="first")(x)
        y = nn.relu(norm(name="norm")(x))
        return x + nn.Conv(4, (3, 3), name="second")(y)

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["norm"].op.endswith("+ relu") and where(plan["norm"]) == "norm/output"
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_dense_and_partial_and_shared_names_are_folded():
    make = functools.partial(nn.BatchNorm, use_running_average=True, use_scale=False)

    def body(x):
        x = nn.relu(make(name="a")(nn.Conv(4, (1, 1), name="b")(x)))
        return make()(nn.Dense(3)(x.mean(axis=(1, 2))))

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["b"].note == plan["Dense_0"].note == "BatchNorm folded: one_conv"
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_a_batch_norm_that_no_integer_operation_feeds_stays_float():
    qmodel, variables, plan = rows(lambda x: nn.Conv(2, (3, 3))(norm()(x)), IMAGES)
    assert plan["BatchNorm_0"].note.startswith("float")
    assert set(variables["quant_stats"]) == {"BatchNorm_0/output", "Conv_0/output", "step"}
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_residual_adds_have_one_quantizer_on_each_tensor():
    def body(x):
        x = nn.relu(norm()(nn.Conv(4, (3, 3))(x)))
        return nn.relu(norm()(nn.Conv(4, (3, 3))(x)) + x)

    _, variables, plan = rows(body, IMAGES)
    assert set(variables["quant_stats"]) == {
        "input",
        "Conv_0/output",
        "Conv_1/output",
        "add/output",
        "step",
    }
    assert plan["add"].op == "add + relu"


def test_feature_axis_that_is_not_the_last_is_refused():
    def body(x):
        return norm(axis=1)(nn.Conv(6, (3, 3))(x))

    with pytest.raises(ValueError, match=r"BatchNorm_0: the feature axis [\s\S]*exclude"):
        rows(body, IMAGES)
    rows(body, IMAGES, strict=False)
    rows(body, IMAGES, exclude=("BatchNorm_0",))


@pytest.mark.parametrize("axis", [(-1,), (3,), (2, 3)])
def test_feature_axes_as_a_tuple(axis):
    def body(x):
        return norm(axis=axis)(nn.Conv(6, (3, 3))(x))

    plan = rows(body, IMAGES, strict=False)[2]
    assert ("BatchNorm_0" in plan) == (len(axis) == 2)  # not folded, and float
    assert "BatchNorm_0" not in plan or "not the last" in plan["BatchNorm_0"].note


def test_a_dense_with_several_axes_of_features_is_not_folded():
    def body(x):
        return norm()(nn.DenseGeneral((2, 3))(x))

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["DenseGeneral_0"].output and plan["BatchNorm_0"].output
    assert evaluated(qmodel, variables, IMAGES) < 0.05


class OwnDropPath(nn.Module):
    """Stochastic depth written by hand: it draws numbers and multiplies in training alone."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train):
        if not train:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0], 1))
        return x * keep / (1 - self.rate)


class OwnNoise(nn.Module):
    """Noise inside of the model's own method, in front of what evaluation computes as well."""

    where: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        if train and self.where == "noise":
            x = x + 0.1 * jax.random.normal(self.make_rng("dropout"), x.shape)
        if self.where == "scaled last":
            x = (x + jax.random.gumbel(self.make_rng("dropout"), x.shape) if train else x) / 0.5
        if train and self.where == "dropout":
            x = x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape) * 2.0
        if train and self.where == "scaled first":
            x = x / 0.5 * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
        if train and self.where == "selected":
            keep = jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
            x = jnp.where(keep, x / 0.5, 0.0)
        y = x + nn.Dense(8)(x)
        if self.where == "drop path":
            y = x + OwnDropPath()(y, train)
        return nn.Dense(3)(y * x + y)


@pytest.mark.parametrize("where", ["noise", "scaled last", "dropout", "scaled first", "selected"])
def test_names_do_not_depend_on_what_only_training_computes(where):
    qmodel = sq.SimQAT().apply(OwnNoise(where))
    x = jax.random.normal(KEY, (4, 6))
    rngs = {"params": KEY, "dropout": KEY}
    variables = qmodel.init(rngs, x, train=True)
    _, updates = qmodel.apply(
        variables, x, train=True, rngs={"dropout": KEY}, mutable=["quant_stats"]
    )
    y = qmodel.apply({**variables, **updates}, x)
    assert np.isfinite(y).all()


def test_what_only_training_computes_in_a_module_of_its_own_changes_no_name():
    qmodel = sq.SimQAT().apply(OwnNoise("drop path"))
    x = jax.random.normal(KEY, (4, 6))
    rngs = {"params": KEY, "dropout": KEY}
    variables = qmodel.init(rngs, x, train=True)
    _, updates = qmodel.apply(
        variables, x, train=True, rngs={"dropout": KEY}, mutable=["quant_stats"]
    )
    assert np.isfinite(qmodel.apply({**variables, **updates}, x)).all()

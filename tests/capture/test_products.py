"""Products of data and a kernel, however they are written, are layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import assert_same, by_half, initialized, observed

import simqat_jax as sq

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (4, 8, 8, 6))
ROWS = jax.random.normal(KEY, (4, 6))
SEQUENCES = jax.random.normal(KEY, (4, 5, 6))
NORMAL = nn.initializers.lecun_normal()


@pytest.fixture(autouse=True)
def as_people_write():
    """Vectors are added to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Written(nn.Module):
    """A function that gets a way to make parameters, and a layer behind it."""

    body: staticmethod

    @nn.compact
    def __call__(self, x):
        def param(name, *shape):
            return self.param(name, NORMAL if len(shape) > 1 else nn.initializers.ones, shape)

        return nn.Dense(2, name="last")(self.body(x, param))


class StandardizedConv(nn.Conv):
    """Its kernel has mean 0 and variance 1: weight standardisation by overriding `param`."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        centered = value - value.mean((0, 1, 2))
        return centered / jnp.sqrt(centered.var((0, 1, 2)) + 1e-5)


class LoraDense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        a = self.param("a", NORMAL, (x.shape[-1], 2))
        b = self.param("b", NORMAL, (2, self.features))
        return super().__call__(x) + x @ a @ b


def masked_conv(x, param):
    del param
    mask = jnp.ones((3, 3, 6, 4)).at[0].set(0.0)
    return nn.Conv(4, (3, 3), mask=mask)(x)


def tied(x, param):
    table = param("table", 7, 6)
    return (x @ table.T) @ table


def dropped_weights(x, param):
    return x @ (param("w", 6, 4) * jnp.where(jnp.arange(6) % 2, 1.0, 0.0)[:, None])


def channels_first(x, param):
    numbers = ("NCHW", "OIHW", "NCHW")
    kernel = param("k", 4, 6, 3, 3)
    y = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME", dimension_numbers=numbers
    )
    return (y + param("b", 4)[:, None, None]).transpose(0, 2, 3, 1)


def standardized(x, param):
    del param
    return StandardizedConv(4, (3, 3))(x)


def many_heads(x, param):
    y = nn.vmap(nn.Dense, in_axes=None, out_axes=1, **SPLIT, axis_size=3)(4, name="many")(x)
    return y.reshape(len(x), -1) + param("shift", 12)


SPLIT = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
CASES = {
    "x @ w + b": (lambda x, p: nn.relu(x @ p("w", 6, 4) + p("b", 4)), ROWS, ["w"]),
    "b + x @ w": (lambda x, p: p("b", 4) + x @ p("w", 6, 4), SEQUENCES, ["w"]),
    "w @ x": (
        lambda x, p: jnp.einsum("oi,bti->bto", p("w", 4, 6), x) + p("b", 4),
        SEQUENCES,
        ["w"],
    ),
    "w.T": (lambda x, p: x @ p("w", 4, 6).T, ROWS, ["w"]),
    "a @ b": (lambda x, p: x @ (p("a", 6, 2) @ p("b", 2, 4)), ROWS, ["matmul/kernel"]),
    "one output": (lambda x, p: x * (x @ p("w", 6))[:, None], ROWS, ["w"]),
    "constant kernel": (lambda x, p: x @ jnp.eye(6)[::-1], ROWS, ["matmul/kernel"]),
    "tied": (tied, ROWS, ["table", "table_1"]),
    "groups": (lambda x, p: jnp.einsum("bti,tio->bto", x, p("w", 5, 6, 3)), SEQUENCES, ["w"]),
    "all axes": (lambda x, p: jnp.tensordot(x, p("w", 5, 6, 4), 2), SEQUENCES, ["w"]),
    "standardized": (standardized, IMAGES, ["StandardizedConv_0/kernel"]),
    "masked": (masked_conv, IMAGES, ["Conv_0/kernel"]),
    "half of the weights": (dropped_weights, ROWS, ["w"]),
    "channels first": (channels_first, IMAGES, ["k"]),
    "lora": (
        lambda x, p: LoraDense(4)(x),
        ROWS,
        ["LoraDense_0/a", "LoraDense_0/b", "LoraDense_0/kernel"],
    ),
    "weight norm": (lambda x, p: nn.WeightNorm(nn.Dense(4))(x), ROWS, ["Dense_0/kernel"]),
    "einsum": (
        lambda x, p: nn.Einsum((5, 6, 3), "bti,tio->bto")(x),
        SEQUENCES,
        ["Einsum_0/kernel"],
    ),
    "batch dims": (
        lambda x, p: nn.DenseGeneral(3, batch_dims=(0,))(x),
        SEQUENCES,
        ["DenseGeneral_0/kernel"],
    ),
    "transposed": (
        lambda x, p: nn.ConvTranspose(4, (3, 3), (2, 2))(x),
        IMAGES,
        ["ConvTranspose_0/kernel"],
    ),
    "own weights each pixel": (
        lambda x, p: nn.ConvLocal(4, (3, 3))(x),
        IMAGES,
        ["ConvLocal_0/conv/kernel", "ConvLocal_0/kernel"],
    ),
    "circular": (lambda x, p: nn.Conv(4, (3, 3), padding="CIRCULAR")(x), IMAGES, ["Conv_0/kernel"]),
    "own dot_general": (
        lambda x, p: nn.Dense(4, dot_general=lax.dot_general)(x),
        ROWS,
        ["Dense_0/kernel"],
    ),
    "many": (many_heads, ROWS, ["many/kernel"]),
    "of a vmapped call": (lambda x, p: jax.vmap(lambda r: r @ p("w", 6, 4))(x), ROWS, ["w"]),
    "bfloat16": (lambda x, p: nn.Dense(4, dtype=jnp.bfloat16)(x), ROWS, ["Dense_0/kernel"]),
    "attend": (lambda x, p: nn.Embed(5, 6).attend(x), ROWS, ["Embed_0/embedding"]),
    "a constant goes in": (lambda x, p: nn.Dense(6)(jnp.ones((1, 6))) + x, ROWS, []),
}


def weighted(y):
    return jnp.sum(jnp.sin(jnp.arange(y.size)) * y.ravel())


@pytest.mark.versions
@pytest.mark.parametrize("name", by_half(CASES))
def test_what_multiplies_data_is_a_layer(name):
    body, x, kernels = CASES[name]
    model = Written(body)
    qmodel, variables = initialized(model, x)
    plan = qmodel.plan(variables, x)
    weights = {name for name, q in plan.quantizers.items() if q.role == "weight"}
    assert weights == {*kernels, "last/kernel"}

    @jax.jit
    def run(params):
        def loss(params):
            state = {**variables, "params": params}
            y, updates = qmodel.apply(state, x, mutable=["quant_stats"])
            return weighted(y), (y, updates)

        gradient, (y, updates) = jax.grad(loss, has_aux=True)(params)
        want = jax.grad(lambda p: weighted(model.apply({"params": p}, x)))(params)
        evaluated = qmodel.apply({**variables, **updates}, x)
        return updates, model.apply({"params": params}, x), (y, evaluated), gradient, want

    updates, floats, results, gradient, want = run(variables["params"])
    for y in results:
        assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(g - w) <= 0.2 * jnp.linalg.norm(w) + 1e-6
    assert_same(sq.convert(qmodel, {**variables, **updates}, x)(x), results[1])


def test_a_bias_of_one_number_for_each_channel_belongs_to_the_product():
    def body(x, param):
        whole = x @ param("w", 6, 4) + param("b", 4)
        position = whole @ param("v", 4, 4) + param("p", 5, 4)
        return position @ param("u", 4, 4) + 1.0

    qmodel, variables = initialized(Written(body), SEQUENCES)
    plan = qmodel.plan(variables, SEQUENCES)
    assert [row.path for row in plan.rows] == ["w", "v", "add", "u", "add_1", "last"]


def test_a_kernel_that_is_used_twice_has_one_quantizer():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = StandardizedConv(6, (3, 3), name="shared")
            return layer(layer(x))

    qmodel, variables = initialized(Twice(), IMAGES)
    plan = qmodel.plan(variables, IMAGES)
    assert [q.name for q in plan.quantizers.values() if q.role == "weight"] == ["shared/kernel"]


def test_batch_norm_is_folded_into_a_hand_written_product():
    def body(x, param):
        y = x @ param("w", 6, 4) + param("b", 4)
        return nn.BatchNorm(use_running_average=True)(y)

    qmodel, variables = initialized(Written(body), ROWS)
    assert qmodel.plan(variables, ROWS).rows[0].note == "BatchNorm folded: one_conv"


def test_a_subclass_that_overrides_more_than_the_call_computes_what_it_says():
    class Shifted(nn.BatchNorm):
        def param(self, name, *args, **kwargs):
            return super().param(name, *args, **kwargs) + (1.0 if name == "scale" else 0.0)

    class Flat(nn.LayerNorm):
        def param(self, name, *args, **kwargs):
            return 0.5 * super().param(name, *args, **kwargs)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Shifted(use_running_average=True)(nn.Dense(6)(x))
            return nn.Dense(3)(Flat()(x))

    qmodel, variables, _ = observed(Net(), ROWS)
    floats = Net().apply({k: v for k, v in variables.items() if k != "quant_stats"}, ROWS)
    y = jax.jit(qmodel.apply)(variables, ROWS)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    assert_same(sq.convert(qmodel, variables, ROWS)(ROWS), y)


def test_products_of_two_activations_stay_float():
    def body(x, param):
        return (x @ x.swapaxes(1, 2)) @ x

    qmodel, variables = initialized(Written(body), SEQUENCES)
    kinds = [row.kind for row in qmodel.plan(variables, SEQUENCES).rows]
    assert kinds.count("dense") == 1


def test_a_layer_called_on_a_constant_is_folded_and_its_other_calls_are_quantized():
    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.GRUCell(4)
            carry = jnp.zeros((x.shape[0], 4))
            for t in range(2):
                carry, _ = cell(carry, x[:, t])
            return nn.Dense(2)(carry)

    qmodel, variables, _ = observed(Unrolled(), SEQUENCES)
    names = qmodel.plan(variables, SEQUENCES).quantizers
    assert {f"GRUCell_0/{k}/kernel" for k in ("hr", "hz", "hn", "ir", "iz", "in")} <= set(names)
    y = jax.jit(qmodel.apply)(variables, SEQUENCES)
    assert_same(sq.convert(qmodel, variables, SEQUENCES)(SEQUENCES), y)


def test_noise_on_a_kernel_leaves_it_a_kernel():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            w = self.param("w", NORMAL, (6, 4))
            if train:
                w = w + 0.01 * jax.random.normal(self.make_rng("noise"), w.shape)
            return x @ w

    qmodel, variables = initialized(Noisy(), ROWS)
    trained = qmodel.plan(variables, ROWS, train=True, rngs={"noise": KEY})
    assert list(trained.quantizers) == list(qmodel.plan(variables, ROWS).quantizers)
    rngs = {"noise": KEY}
    y, _ = qmodel.apply(variables, ROWS, train=True, rngs=rngs, mutable=["quant_stats"])
    np.testing.assert_allclose(y, Noisy().apply({"params": variables["params"]}, ROWS), atol=0.2)


def test_a_convolution_of_a_kernel_with_data_is_named():
    def body(x, param):
        kernel = param("k", 1, 8, 8, 4)
        y = lax.conv(kernel.transpose(0, 3, 1, 2), x.transpose(0, 3, 1, 2)[:, :4], (1, 1), "SAME")
        return x.mean((1, 2)) + y.mean()

    with pytest.raises(ValueError, match=r"  k: its kernel is what the data slides over"):
        initialized(Written(body), IMAGES)
    initialized(Written(body), IMAGES, exclude=("k",))
    initialized(Written(body), IMAGES, strict=False)


def in_fourier_space(x, param):
    """What a Fourier neural operator does: complex kernels, of pairs of real numbers here."""
    w = lax.complex(param("real", 4, 6, 3), param("imaginary", 4, 6, 3))
    return jnp.fft.irfft(jnp.einsum("bkc,kcd->bkd", jnp.fft.rfft(x, 6, 1), w), 6, 1)


def test_a_product_of_complex_numbers_is_named():
    with pytest.raises(ValueError, match="matmul: it multiplies numbers of type complex") as error:
        initialized(Written(in_fourier_space), SEQUENCES)
    assert "exclude=('matmul',)" in str(error.value)
    _, variables, y = observed(
        Written(in_fourier_space), SEQUENCES, config=sq.SimQATConfig(exclude=("matmul",))
    )
    floats = Written(in_fourier_space).apply({"params": variables["params"]}, SEQUENCES)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)


def test_a_product_is_excluded_by_the_name_in_the_plan():
    def body(x, param):
        return nn.relu(x @ param("w", 6, 4) + param("b", 4)) @ param("v", 4, 4)

    _, variables = initialized(Written(body), ROWS, exclude=("w",))
    assert set(variables["quant_stats"]) == {"add/output", "v/output", "last/output", "step"}
    with pytest.raises(ValueError, match=r"'u', which matches no .*\['last', 'w', 'v'\]"):
        initialized(Written(body), ROWS, exclude=("u",))

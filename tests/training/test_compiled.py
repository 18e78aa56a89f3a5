"""Evaluation is one compiled program: eagerly, under jit and as an integer model the same codes."""

import functools
import gc

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same

import simqat_jax as sq

pytestmark = pytest.mark.usefixtures("optimized")
KEY = jax.random.key(0)
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def every_pixel():
    x = np.array(jax.random.randint(jax.random.key(0), (64, 8, 8, 3), 0, 256), np.uint8)
    x[0, 0, :2] = [[0] * 3, [255] * 3]
    return x


def wide(v, x):
    return np.asarray(v)[None, None, None]


def learned(module, x):
    scale = module.param("scale", nn.initializers.constant(0.0171), (3,))
    return x * scale[None, None, None] - module.param("shift", nn.initializers.constant(1.7), ())


FRONT_ENDS = {
    "x/127.5-1": lambda m, x: x / 127.5 - 1.0,
    "x*2/255-1": lambda m, x: x * 2.0 / 255.0 - 1.0,
    "(x-mean)/std": lambda m, x: (x - 255 * MEAN[None, None, None]) / (255 * STD)[None, None, None],
    "(x/255-m)/s": lambda m, x: (x / 255.0 - MEAN[None, None, None]) / STD[None, None, None],
    "(x/255-m)/s of scalars": lambda m, x: (x / 255.0 - 0.449) / 0.226,
    "x/255": lambda m, x: x / 255.0,
    "sqrt(x/255)*2-1": lambda m, x: jnp.sqrt(x / 255.0) * 2.0 - 1.0,
    "of the image": lambda m, x: (x - x.mean((1, 2, 3), keepdims=True)) / 64.0,
    "learned": learned,
    "of two": lambda m, x: jnp.concatenate([x / 255.0 - 0.5, jnp.square(x / 255.0) - 0.5], -1),
}


class Behind(nn.Module):
    """A small network behind float arithmetic on pixels."""

    front: str

    @nn.compact
    def __call__(self, x):
        x = FRONT_ENDS[self.front](self, x.astype(jnp.float32))
        return nn.Dense(4)(nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)))


@functools.cache
def trained(model, x=None):
    x = every_pixel()
    qmodel = sq.SimQAT().apply(model)
    variables = jax.jit(qmodel.init)(KEY, x)
    for _ in range(2):
        _, updates = jax.jit(functools.partial(qmodel.apply, mutable=["quant_stats"]))(variables, x)
        variables = {**variables, **updates}
    return qmodel, variables, x


EACH_TIME = ("x/127.5-1", "learned")
NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "front",
    [
        name if name in EACH_TIME else pytest.param(name, marks=NIGHTLY)
        for name in FRONT_ENDS
    ],
)
def test_a_float_front_end_has_one_result(front, tmp_path):
    """Pixels are whole numbers: half of them may lie on ties of the grid behind it."""
    qmodel, variables, x = trained(Behind(front))
    eager = qmodel.apply(variables, x)
    integer = sq.convert(qmodel, variables, x)
    assert_same(eager, jax.jit(qmodel.apply)(variables, x))
    assert_same(eager, integer(x))
    integer.save(tmp_path / "model")
    assert_same(eager, sq.IntegerModel.load(tmp_path / "model")(x))
    assert_same(eager[:5], integer(x[:5]))


# One program ---------------------------------------------------------------------------------


@jax.custom_vjp
def reversed_gradient(x, weight):
    return x


reversed_gradient.defvjp(lambda x, weight: (x, weight), lambda weight, g: (-weight * g, None))


class Everything(nn.Module):
    """Own derivatives, constants, a functional random key, initializers made anew in each call."""

    weight: float = 1.0
    offset: float = 0.5

    @nn.compact
    def __call__(self, x, noise=False, scale=1.0):
        x = nn.Conv(4, (3, 3), kernel_init=nn.initializers.he_normal())(x)
        x = nn.silu(
            nn.LayerNorm()(x + self.offset * np.arange(4.0, dtype=np.float32)[None, None, None])
        )
        if noise:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        self.sow("intermediates", "hidden", x)
        x = reversed_gradient(x.mean((1, 2)), self.weight)
        return nn.Dense(3)(x * scale)

    def features(self, x):
        return self(x) + 1.0


@pytest.fixture
def compilations():
    """Counts what XLA compiles."""
    seen = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


IMAGE = jax.random.normal(KEY, (2, 8, 8, 3))


@functools.cache
def everything(**attributes):
    qmodel = sq.SimQAT(sq.SimQATConfig(strict=False)).apply(Everything(**attributes))
    variables = jax.jit(qmodel.init)(KEY, IMAGE)
    _, updates = jax.jit(functools.partial(qmodel.apply, mutable=["quant_stats"]))(variables, IMAGE)
    return qmodel, {"params": variables["params"], **updates}


CALLS = {
    "plain": lambda q, v: q.apply(v, IMAGE),
    "static argument": lambda q, v: q.apply(v, IMAGE, scale=2.0),
    "method": lambda q, v: q.apply(v, IMAGE, method="__call__"),
    "random key": lambda q, v: q.apply(v, IMAGE, noise=True, rngs={"noise": jax.random.key(3)}),
    "mutable": lambda q, v: q.apply(v, IMAGE, mutable=["intermediates"]),
    "gradient": lambda q, v: jax.grad(lambda x: q.apply(v, x).sum())(IMAGE),
    "vmap": lambda q, v: jax.vmap(lambda x: q.apply(v, x[None]))(IMAGE),
    "numpy": lambda q, v: q.apply(jax.tree.map(np.asarray, v), np.asarray(IMAGE)),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("plain", "mutable", "gradient") else pytest.param(name, marks=NIGHTLY)
        for name in CALLS
    ],
)
def test_the_second_call_compiles_nothing(name, compilations):
    qmodel, variables = everything()
    first = CALLS[name](qmodel, variables)
    compilations.clear()
    second = CALLS[name](qmodel, variables)
    assert not compilations
    assert_same(first, second)
    if name != "numpy":
        jitted = jax.jit(functools.partial(CALLS[name], qmodel))(variables)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, first, jitted)


@pytest.mark.nightly
def test_without_jit_it_is_the_same():
    qmodel, variables = everything()
    with jax.disable_jit():
        y = qmodel.apply(variables, IMAGE)
    assert_same(y, qmodel.apply(variables, IMAGE))


def test_a_call_that_computes_something_else_is_another_program():
    """A static argument, an attribute, a constant, a derivative, a mode."""
    qmodel, variables = everything()
    y, gradient = CALLS["plain"](qmodel, variables), CALLS["gradient"](qmodel, variables)
    assert (CALLS["static argument"](qmodel, variables) != y).any()
    assert (CALLS["random key"](qmodel, variables) != y).any()
    other, _ = everything(offset=0.75)
    assert (other.apply(variables, IMAGE) != y).any()
    other, _ = everything(weight=-1.0)
    assert_same(other.apply(variables, IMAGE), y)
    assert_same(CALLS["gradient"](other, variables), -gradient)


def test_a_model_that_reads_what_changes_shows_it():
    """The model runs in every call; only what it computes is kept compiled."""
    state = {"factor": 1.0}
    model = nn.Sequential([nn.Dense(3), lambda x: nn.relu(x) * state["factor"], nn.Dense(2)])
    qmodel = sq.SimQAT().apply(model)
    x = IMAGE[:, 0, 0]
    variables = qmodel.init(KEY, x)
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    variables = {**variables, **updates}
    y = np.asarray(qmodel.apply(variables, x))
    state["factor"] = 0.5
    assert not np.array_equal(qmodel.apply(variables, x), y)


def test_under_pmap_and_shard_map():
    qmodel, variables = everything()
    want = qmodel.apply(variables, IMAGE)
    mapped = jax.pmap(qmodel.apply, in_axes=(None, 0))
    assert_same(mapped(variables, IMAGE[None])[0], want)
    mesh = jax.make_mesh((1,), ("batch",))
    one, many = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("batch")
    sharded = jax.shard_map(qmodel.apply, mesh=mesh, in_specs=(one, many), out_specs=many)
    shards = jax.device_put(IMAGE, jax.sharding.NamedSharding(mesh, many))
    assert_same(sharded(variables, shards), want)


def test_calls_leave_nothing_behind():
    """Neither variables nor arguments are kept, and programs are counted."""
    qmodel, variables = everything()
    qmodel.apply(variables, IMAGE)
    gc.collect()
    before = len(jax.live_arrays())
    for k in range(3):
        qmodel.apply(jax.tree.map(lambda x: x + 0, variables), IMAGE + k)
    gc.collect()
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("wrap", [lambda cls: cls, nn.jit, nn.remat])
def test_captures_share_the_traces_of_plain_functions(wrap):
    """Those of other captures' modules are not used: paths and layers are those of this one."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.silu(nn.Dense(4)(x))

    class Outer(nn.Module):
        names: tuple

        @nn.compact
        def __call__(self, x):
            for name in self.names:
                x = wrap(Inner)(name=name)(x)
            return x

    for names in (("a", "b"), ("a", "b"), ("c", "a")):
        qmodel = sq.SimQAT().apply(Outer(names))
        variables = qmodel.init(KEY, IMAGE[:, 0, 0, :1])
        found = {name for name in variables["quant_stats"] if name.endswith("silu/output")}
        assert found == {f"{name}/silu/output" for name in names}


def test_captures_keep_no_traces():
    """What JAX caches of a capture it finds again in the next one."""
    qmodel, variables = everything()
    counts = []
    for _ in range(3):
        qmodel.apply(variables, IMAGE)
        gc.collect()
        counts.append(sum(isinstance(x, jax.extend.core.Jaxpr) for x in gc.get_objects()))
    assert counts[1] == counts[2]

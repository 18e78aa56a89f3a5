"""State that a model keeps and what it sows are as in float, and alter nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import initialized

X = 2.0 + jax.random.normal(jax.random.key(0), (8, 6))


class Centered(nn.Module):
    """Subtracts a running mean that it updates first, as `follow(old, batch)` says."""

    follow: staticmethod

    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, (1, 6))
        if train and not self.is_initializing():
            mean.value = self.follow(mean.value, x)
        return nn.Dense(3)(x - mean.value)


def slowly(old, x):
    return 0.99 * old + 0.01 * x.mean(0, keepdims=True)


def by_difference(old, x):
    return old + 0.01 * (x.mean(0, keepdims=True) - old)


def highest(old, x):
    return jnp.maximum(0.99 * old, x.max(0, keepdims=True))


def of_squares(old, x):
    return 0.99 * old + 0.01 * jnp.sqrt((x * x).mean(0, keepdims=True))


@pytest.mark.parametrize("follow", [slowly, by_difference, highest, of_squares])
def test_a_running_statistic_that_activations_read_is_not_rounded(follow):
    qmodel, variables = initialized(Centered(follow), X)
    mutable = ["batch_stats", "quant_stats"]

    @jax.jit
    def step(v):
        return {**v, **qmodel.apply(v, X, train=True, mutable=mutable)[1]}

    floats = variables["batch_stats"]["mean"]
    for _ in range(60):
        variables, floats = step(variables), follow(floats, X)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], floats, atol=0.03)


class Stored(nn.Module):
    """Stores something between the layers of each group that is fused."""

    store: staticmethod
    where: str

    @nn.compact
    def __call__(self, x, train=True):
        def seen(name, x):
            if name == self.where:
                self.store(self, x)
            return x

        x = seen("layer", nn.Conv(4, (3, 3))(x))
        x = seen("norm", nn.BatchNorm(use_running_average=not train)(x))
        x = seen("relu", nn.relu(x))
        x = nn.gelu(seen("function", 0.5 * nn.Dense(4)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def sow(module, x):
    module.sow("stored", "x", x)


def sow_the_last(module, x):
    module.sow("stored", "x", x, reduce_fn=lambda _, x: x, init_fn=lambda: 0.0)


def sow_a_loss(module, x):
    module.sow("stored", "x", jnp.square(x).mean())


def keep_a_mean(module, x):
    mean = module.variable("stored", "mean", jnp.zeros, 4)
    if module.is_mutable_collection("stored"):
        mean.value = 0.9 * mean.value + 0.1 * x.mean((0, 1, 2))


IMAGES = jax.random.normal(jax.random.key(3), (4, 6, 6, 3))
COLLECTIONS = ["batch_stats", "quant_stats", "stored"]


def step(model):
    qmodel, variables = initialized(model, IMAGES)
    _, updates = jax.jit(lambda v: qmodel.apply(v, IMAGES, mutable=COLLECTIONS))(variables)
    return variables, updates


@pytest.fixture(scope="module")
def without():
    return step(Stored(sow, ""))[1]


@pytest.mark.parametrize(
    "store, where",
    [
        (sow, "layer"),
        (sow_the_last, "norm"),
        (sow_a_loss, "layer"),
        (keep_a_mean, "layer"),
        (sow, "relu"),
        (sow, "function"),
    ],
)
def test_what_is_stored_between_fused_layers_leaves_them_fused(without, store, where):
    model = Stored(store, where)
    variables, updates = step(model)
    for name in ("quant_stats", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, updates[name], without[name])
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    _, want = model.apply(floats, IMAGES, mutable=COLLECTIONS)
    for got, exact in zip(*map(jax.tree.leaves, (updates["stored"], want["stored"])), strict=True):
        np.testing.assert_allclose(got, exact, atol=0.02 * float(jnp.abs(exact).max()))


def test_a_loss_that_is_stored_trains_the_layer_in_front():
    qmodel, variables = initialized(Stored(sow_a_loss, "layer"), IMAGES)

    @jax.jit
    @jax.grad
    def gradient(params):
        given = {**variables, "params": params}
        _, updates = qmodel.apply(given, IMAGES, mutable=COLLECTIONS)
        return updates["stored"]["x"][-1]

    assert jnp.abs(gradient(variables["params"])["Conv_0"]["kernel"]).min() > 0


class Apart(nn.Module):
    """A product that only the state reads leads to what is stored."""

    @nn.compact
    def __call__(self, x, train=True):
        y = nn.Conv(4, (3, 3))(x)
        self.sow("stored", "logits", nn.Dense(2, name="head")(y))
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(y))


def test_a_layer_that_only_training_does_not_fold_is_an_error():
    """Its range in training is not that of the fused layer in evaluation."""
    qmodel, variables = initialized(Apart(), IMAGES)
    _, updates = qmodel.apply(variables, IMAGES, mutable=COLLECTIONS)
    assert "head/output" in updates["quant_stats"]
    with pytest.raises(ValueError, match=r"quant_stats holds BatchNorm_0/output: .* not folded"):
        qmodel.apply({**variables, **updates}, IMAGES, train=False)


def test_what_only_the_state_needs_changes_no_plan():
    class Watched(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            y = nn.relu(nn.Dense(6)(x))
            seen = self.variable("watch", "mean", jnp.zeros, 6)
            if train:
                seen.value = y.mean(0)
            return nn.Dense(3)(y)

    qmodel, variables = initialized(Watched(), X)
    plans = [qmodel.plan(variables, X, train=train) for train in (False, True)]
    assert list(plans[0].quantizers) == list(plans[1].quantizers)


class Covariance(nn.Module):
    """Keeps the covariance of what it returns, and makes a loss of it."""

    read: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(5)(x)
        z = y - y.mean(0, keepdims=True)
        covariance = z.T @ z / x.shape[0]
        kept = self.variable("kept", "covariance", jnp.eye, 5)
        if train and not self.is_initializing():
            kept.value = covariance
        loss = jnp.square(covariance).sum()
        return (y, loss, y @ covariance) if self.read else (y, loss)


@pytest.mark.parametrize("read", [False, True])
def test_a_product_over_the_batch_is_a_statistic(read):
    """What only state and losses need is on no grid, and state is not where activations need it."""
    qmodel, variables = initialized(Covariance(read), X)
    plans = [qmodel.plan(variables, X, train=train) for train in (False, True)]
    assert list(plans[0].quantizers) == list(plans[1].quantizers)
    assert ("dot_general/output" in plans[0].quantizers) == read
    collections = ["kept", "quant_stats"]
    (y, loss, *_), updates = qmodel.apply(variables, X, train=True, mutable=collections)
    kept = updates["kept"]["covariance"]
    if read:
        lo, hi, _ = updates["quant_stats"]["dot_general/output"]
        steps = np.asarray(kept * 255 / (hi - lo))
        assert np.abs(steps - np.round(steps)).max() > 0.1
    else:
        z = np.asarray(y - y.mean(0, keepdims=True))
        np.testing.assert_allclose(kept, z.T @ z / len(z), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(loss, np.square(kept).sum(), rtol=1e-4)

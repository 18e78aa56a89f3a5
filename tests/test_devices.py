"""Devices of a mesh axis observe what one device would, and plan the same."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from models import assert_same

import simqat_jax as sq
from simqat_jax.numerics.observers import OBSERVERS

IMAGE = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))


class Net(nn.Module):
    """What JAX writes otherwise where arrays vary over a mesh axis: whatever has a constant."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(use_running_average=not train, axis_name="d")
        x = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = jnp.clip(nn.relu6(x) + 0.5, 0, 2) * 3
        x = nn.max_pool(nn.hard_swish(nn.Conv(4, (1, 1))(x)), (2, 2), strides=(2, 2))
        x = nn.leaky_relu(x.mean(axis=(1, 2)) @ self.param("w", nn.initializers.ones, (4, 4)))
        x = nn.LayerNorm()(nn.gelu(jnp.where(x > 0, x, 0.1 * x)))
        return nn.softmax(nn.Dense(3)(x))


def test_a_mesh_axis_changes_neither_plan_nor_ranges():
    qmodel = sq.SimQAT().apply(Net())
    variables = qmodel.init(jax.random.key(1), IMAGE)
    plans = []

    def step(variables, x):
        plans.append(str(qmodel.plan(variables, x, train=True)))
        return qmodel.apply(variables, x, train=True, mutable=["batch_stats", "quant_stats"])[1]

    one, many = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(one, many), out_specs=one)
    got = jax.jit(sharded)(variables, IMAGE)
    mapped = jax.vmap(step, in_axes=(None, 0), axis_name="d")
    want = jax.jit(mapped)(variables, IMAGE[None])
    assert plans[0] == plans[1]
    assert_same(got, jax.tree.map(lambda v: v[0], want))
    evaluated = jax.jit(
        jax.shard_map(qmodel.apply, mesh=mesh, in_specs=(one, many), out_specs=many)
    )
    variables = {**variables, **got}
    assert_same(evaluated(variables, IMAGE), qmodel.apply(variables, IMAGE))


def test_two_devices_observe_as_one():
    """Also where one of them has NaN; in a process that has two."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, __file__], env=env, check=True)


def _compare(observer: str, x: np.ndarray) -> None:
    """Compare the state after a batch on two devices, and after all of it on one."""
    o = OBSERVERS[observer](sq.QuantSpec(observer=observer))

    def devices(x):
        return o.update(o.init(), o.reduce(o.measure(x), "d"))

    def whole(x):
        return o.update(o.init(), o.measure(x))

    want = jax.jit(whole)(x)
    one, many = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(devices, mesh=mesh, in_specs=many, out_specs=one))(x)
    parted = jax.jit(whole)(jax.device_put(x, jax.sharding.NamedSharding(mesh, many)))
    for got in (mapped, parted):
        for field, value, wanted in zip(want._fields, got, want, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-4, err_msg=field)


if __name__ == "__main__":
    assert jax.device_count() == 2
    drawn = np.random.default_rng(0).normal(size=64).astype(np.float32)
    drawn[:32] *= 8
    broken = np.where(np.arange(64) == 3, np.float32(np.nan), drawn)
    for observer in ("ema", "percentile", "mse", "entropy"):
        _compare(observer, drawn)
    for observer in ("ema", "percentile"):
        _compare(observer, broken)

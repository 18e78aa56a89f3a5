"""Widths become rules, and what other rules say of other layers stays."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np

import simqat_jax as sq

WEIGHT = dataclasses.replace(sq.SimQATConfig().weight, num_bits=6)


class Parts(nn.Module):
    """Layers in a module, a product beside them, and one outside."""

    @nn.compact
    def __call__(self, x):
        x = Inner(name="block")(x)
        return nn.Dense(2, name="tail")(nn.Dense(3, name="head")(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        w = self.param("w", nn.initializers.lecun_normal(), (4, 4))
        return nn.relu(nn.Dense(4)(x @ w) + x)


def analyzed(config):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    qmodel, floats = sq.SimQAT(config).apply(Parts()), Parts().init(jax.random.key(0), x)
    variables = sq.calibrate(qmodel, floats, [x], progress=False)

    def plan(config):
        return sq.SimQAT(config).apply(Parts()).plan(floats, x)

    return sq.analyze(qmodel, variables, [x], progress=False), plan


def widths(plan):
    return {row.weight.name: row.weight.spec.num_bits for row in plan.rows if row.weight}


def test_every_kernel_gets_its_width():
    """Whatever encloses it: 66 weights, some of which have room for more bits than others."""
    analysis, plan = analyzed(sq.SimQATConfig())
    for nbytes in (17, 24, 35, 66):
        found = sq.suggest(analysis, sq.MaxBytes(nbytes), progress=False)
        assert widths(plan(found.config)) == found.widths
    assert found.config == sq.SimQATConfig()


def test_other_rules_keep_what_they_decide():
    given = sq.SimQATConfig(
        exclude=["tail"],
        rules=[
            sq.Rule(path="block/Dense_0", weight=sq.SimQATConfig().weight),
            sq.Rule(path="block", activation=sq.QuantSpec(num_bits=4), weight=WEIGHT),
        ],
    )
    analysis, plan = analyzed(given)
    found = sq.suggest(analysis, sq.MaxBytes(15), progress=False)  # of 60 weights, 2 bits each
    plan = plan(found.config)
    assert set(widths(plan).values()) == {2} and widths(plan) == found.widths
    outputs = {row.path: row.output.spec.num_bits for row in plan.rows if row.output}
    block = {"block/Dense_0": 8, "block/Dense_1": 4, "block/w": 4, "block/add": 4}
    assert outputs == {**block, "head": 8}
    assert found.config.exclude == ("tail",)
    assert found.config.rules[4:] == (dataclasses.replace(given.rules[1], weight=None),)

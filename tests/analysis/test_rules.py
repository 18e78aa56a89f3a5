"""Widths become rules, and what other rules say of other layers stays."""

import flax.linen as nn
import jax
import numpy as np

import simqat_jax as sq


class Parts(nn.Module):
    """Layers in a module, a product beside them, and one outside."""

    @nn.compact
    def __call__(self, x):
        x = Inner(name="block")(x)
        return nn.Dense(3, name="head")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        w = self.param("w", nn.initializers.lecun_normal(), (4, 4))
        return nn.Dense(4)(x @ w) + x


def suggested(config, nbytes):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    qmodel, floats = sq.SimQAT(config).apply(Parts()), Parts().init(jax.random.key(0), x)
    variables = sq.calibrate(qmodel, floats, [x], progress=False)
    analysis = sq.analyze(qmodel, variables, [x], progress=False)
    found = sq.suggest(analysis, sq.MaxBytes(nbytes), progress=False)
    return found, sq.SimQAT(found.config).apply(Parts()).plan(floats, x)


def widths(plan):
    return {row.weight.name: row.weight.spec.num_bits for row in plan.rows if row.weight}


def test_every_kernel_gets_its_width():
    """Whatever encloses it: 60 weights, of which some have room for more bits than others."""
    for nbytes in (15, 24, 35, 60):
        found, plan = suggested(sq.SimQATConfig(), nbytes)
        assert widths(plan) == found.widths
    assert found.config == sq.SimQATConfig()


def test_other_rules_keep_what_they_decide():
    spec = sq.QuantSpec(num_bits=4)
    given = sq.SimQATConfig(
        exclude=["head"],
        rules=[
            sq.Rule(path="block/Dense_0", weight=sq.SimQATConfig().weight),
            sq.Rule(path="block", activation=spec),
        ],
    )
    found, plan = suggested(given, 12)  # of 48 weights, 2 bits each
    assert set(widths(plan).values()) == {2} and widths(plan) == found.widths
    outputs = {row.path: row.output.spec.num_bits for row in plan.rows if row.output}
    assert outputs["block/Dense_0"] == 8 and outputs["block/Dense_1"] == 4
    assert outputs["block/add"] == 4
    assert found.config.exclude == ("head",)
    assert given.rules[0] not in found.config.rules and given.rules[1] in found.config.rules

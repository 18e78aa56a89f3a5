"""Random networks: the integer model has the codes of evaluation."""

import os

import jax
import pytest
from random_networks import differing, draw, module, shortest, text

import simqat_jax as sq

pytestmark = pytest.mark.optimized
COUNT = int(os.environ.get("SIMQAT_RANDOM_NETWORKS", "12"))
"""How many networks are tried; `.ci/nightly` tries 100."""


@pytest.fixture(autouse=True, scope="module")
def forget():
    yield
    jax.clear_caches()


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_random_network_has_the_codes_of_evaluation(seed):
    backend = ("tflite", "onnx")[seed % 2]
    source = text(seed)
    try:
        count = differing(module(source), draw(seed).shapes["x0"], seed, backend)
    except Exception as error:
        error.add_note(source)
        raise
    assert count == 0, f"{count} numbers differ ({backend}) in\n{shortest(seed, backend)}"


def test_a_seed_draws_one_network_and_others_draw_others():
    assert text(3) == text(3)
    assert len({text(seed) for seed in range(50)}) == 50
    assert draw(3).lines[: len(draw(3, 1).lines)] == draw(3, 1).lines


def test_a_difference_is_counted_and_shortened(monkeypatch):
    convert = sq.convert

    def broken(qmodel, variables, *args):
        params = jax.tree.map(lambda p: 1.1 * p, variables["params"])
        return convert(qmodel, {**variables, "params": params}, *args)

    monkeypatch.setattr(sq, "convert", broken)
    source = shortest(0, "tflite")
    assert len(source) < len(text(0))
    assert differing(module(source), draw(0).shapes["x0"], 0) > 0

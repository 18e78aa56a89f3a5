"""What quantization must make of the kinds of model that people publish."""

import os

import jax
import pytest
from public_models import MODELS
from public_models.measures import Measured

EACH_TIME = ("BiT",)
"""Those that are tried each time; `.ci/nightly` tries all."""
TRIED = MODELS if os.environ.get("SIMQAT_PUBLIC_MODELS") == "all" else EACH_TIME
pytestmark = pytest.mark.optimized
KNOWN: dict[tuple[str, str], str] = {}
"""Laws that a model does not keep yet, and why."""


def each(law: str) -> pytest.MarkDecorator:
    """Parametrise a test over all models; where a law is known to fail, it must."""
    params = [
        pytest.param(
            name,
            marks=pytest.mark.xfail(strict=True, reason=KNOWN[name, law])
            if (name, law) in KNOWN
            else (),
        )
        for name in TRIED
    ]
    return pytest.mark.parametrize("measured", params, indirect=True)


@pytest.fixture(scope="module")
def measured(request):
    with jax.numpy_rank_promotion("allow"):  # as people write models
        yield Measured(MODELS[request.param])
    jax.clear_caches()


@each("strict")
def test_nothing_is_refused(measured):
    assert measured.refusal() == ""


@each("kernels")
def test_every_product_with_a_kernel_is_on_integers(measured):
    assert measured.kernels_left() == 0
    assert measured.share() == 1.0


@each("error")
def test_evaluation_is_close_to_the_float_model(measured):
    assert measured.error() <= 0.1


@each("gradient")
def test_every_kernel_has_a_gradient(measured):
    assert measured.without_gradient() == []


@each("state")
def test_state_is_that_of_the_float_model(measured):
    assert measured.state_error() <= 0.1


@each("files")
@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_both_files_hold_its_codes(measured, backend):
    found = measured.file(backend)
    assert found.codes > 0
    assert found.differing == 0


@each("codes")
def test_the_integer_model_has_the_codes_of_evaluation(measured):
    assert measured.differing_codes() == 0

"""What quantization must make of the kinds of model that people publish."""

import jax
import pytest
from models import assert_same
from public_models import MODELS
from public_models.measures import Measured

_OWN_NORM = "ranges of a BatchNorm by hand have other names in training than in evaluation"
_BY_HAND = "products outside of nn.Conv and nn.Dense are not seen"
_LAWS = ("strict", "kernels", "error", "gradient", "state", "codes")
KNOWN: dict[tuple[str, str], str] = {
    **{("MobileNetV3", law): _OWN_NORM for law in ("kernels", "error", "codes")},
    ("MobileNetV3", "state"): "a BatchNorm by hand computes its statistics on 8 bits",
    ("BiT", "error"): "a subclass that overrides `param` is run as a plain nn.Conv",
    **{("GPT-2", law): _BY_HAND for law in _LAWS},
    ("wav2vec2", "kernels"): _BY_HAND,
    ("U-Net", "strict"): "nn.ConvTranspose has no quantized form",
    ("U-Net", "kernels"): "nn.ConvTranspose has no quantized form",
    ("DLRM", "error"): "ids in a float input are rounded to its grid",
    ("LSTM, unrolled", "kernels"): _BY_HAND,
    ("LSTM, nn.RNN", "kernels"): "what is in a scan is not seen",
}
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
        for name in MODELS
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
    assert measured.share() > 0.7  # attention multiplies data by data, in float


@each("error")
def test_evaluation_is_close_to_the_float_model(measured):
    assert measured.error() <= 0.1


@each("gradient")
def test_every_kernel_has_a_gradient(measured):
    assert measured.without_gradient() == []


@each("state")
def test_state_is_that_of_the_float_model(measured):
    assert measured.state_error() <= 0.1


@each("codes")
def test_the_integer_model_has_the_codes_of_evaluation(measured):
    assert measured.differing_codes() == 0
    model = measured.integer
    codes = model.quantize(*measured.samples)
    results = model.run_codes(*codes) if isinstance(codes, list) else model.run_codes(codes)
    assert_same(model.dequantize(results), measured.evaluated)

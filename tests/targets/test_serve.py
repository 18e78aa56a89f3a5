"""What two processes tell each other arrives as it was sent."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from simqat_jax.targets import serve

ARRAYS = [
    np.arange(6, dtype=np.int8).reshape(2, 3),
    np.asfortranarray(np.linspace(0, 1, 6).reshape(2, 3)),
    np.arange(12, dtype=np.uint8)[::3],
    np.float32(0.1).reshape(()),
    np.zeros((0, 4), np.float32),
    np.asarray(jnp.ones(2, jnp.float16)),
]


def test_messages_and_arrays_arrive():
    stream = io.BytesIO()
    serve.send(stream, {"name": "µ"}, ARRAYS)
    serve.send(stream, {})
    stream.seek(0)
    message, arrays = serve.receive(stream)
    assert message == {"name": "µ"}
    for got, want in zip(arrays, ARRAYS, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)
    assert serve.receive(stream) == ({}, [])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_process_that_has_ended_is_the_end_of_the_file(share):
    stream = io.BytesIO()
    serve.send(stream, {}, ARRAYS)
    sent = stream.getvalue()
    with pytest.raises(EOFError):
        serve.receive(io.BytesIO(sent[: int(share * len(sent))]))

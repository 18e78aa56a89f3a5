"""A call of a Flax model becomes a graph: `capture(Call(...)).graph`."""

from simqat_jax.capture.capture import Call, Capture, capture
from simqat_jax.capture.interception import batch_norm

__all__ = ["Call", "Capture", "batch_norm", "capture"]

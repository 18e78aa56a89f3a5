"""How much XLA optimizes in tests."""

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Compile as users do what is jitted here: with fusions and contractions, which change bits.

    What was compiled before stays as it is, whatever the flag was: jit a function of its own, or
    take the fixture `optimized`, which forgets all.
    """
    before = jax.config.read(_FLAG)
    try:
        jax.config.update(_FLAG, False)
        yield
    finally:
        jax.config.update(_FLAG, before)

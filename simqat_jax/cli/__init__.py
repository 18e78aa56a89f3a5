"""The command `simqat`."""

from simqat_jax.cli.main import main

__all__ = ["main"]

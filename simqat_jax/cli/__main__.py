"""`python -m simqat_jax.cli`: the command `simqat`."""

from simqat_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

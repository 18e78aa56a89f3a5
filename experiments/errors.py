"""Errors that the user of an experiment can put right."""

import sys
from collections.abc import Callable


class ExperimentError(Exception):
    """Wrong input or a state of the disk that the message names, with the remedy."""


def run_or_exit(main: Callable[[], None], if_interrupted: str = "") -> None:
    """Run a command; show an ExperimentError as one message on stderr and exit with status 1.

    Ctrl-C exits with status 130 and the message `if_interrupted`.
    """
    try:
        main()
    except ExperimentError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted. {if_interrupted}", file=sys.stderr)
        sys.exit(130)

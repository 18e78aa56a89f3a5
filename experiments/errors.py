"""Errors that the user of an experiment can put right."""

import sys
from collections.abc import Callable, Collection, Sequence


class ExperimentError(Exception):
    """Wrong input or a state of the disk that the message names, with the remedy."""


class CommonError(ExperimentError):
    """An ExperimentError that every process of a run raises at the same place."""


class Preempted(Exception):
    """SIGTERM has ended the run, after a checkpoint that the message names."""


def check_models(names: Sequence[str], known: Collection[str]) -> None:
    """Check what a benchmark's `--models` names.

    Raises:
      ExperimentError: an unknown model.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ExperimentError(f"--models {unknown[0]} is none of {', '.join(known)}.")


def run_or_exit(main: Callable[[], None], if_interrupted: str = "") -> None:
    """Run a command; show an ExperimentError as one message on stderr and exit with status 1.

    Ctrl-C exits with status 130 and the message `if_interrupted`; SIGTERM with 143, so that what
    started the command does not take the run for finished.
    """
    try:
        main()
    except ExperimentError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted. {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except Preempted as notice:
        print(f"{notice} {if_interrupted}", file=sys.stderr)
        sys.exit(143)

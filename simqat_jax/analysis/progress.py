"""How far the runs of a model are."""

from simqat_jax.calibration.batches import Progress


class Counter:
    """Counts runs of a model on a line of the terminal.

    Args:
      what: the name of the work.
      total: how many there are.
      shown: False: nothing is written.
    """

    def __init__(self, what: str, total: int, shown: bool):
        self._line = Progress(what, "run", total, shown)
        self._count = 0

    def done(self) -> None:
        """Count one."""
        self._count += 1
        self._line.show(self._count)

    def end(self) -> None:
        """End the line."""
        self._line.end(self._count)

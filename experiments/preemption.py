"""SIGTERM, which clusters send before they take a machine away: save at the next step, then end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Notice:
    """Whether this run is to end; every process learns of it at the same step."""

    def __init__(self) -> None:
        self.reached = False
        self._signalled = False
        self._steps = 0

    def signal(self) -> None:
        """Note that this process is to end."""
        self._signalled = True

    def after_step(self) -> bool:
        """Return whether to save and end; to be called after every step, by all processes."""
        self._steps += 1
        if jax.process_count() == 1:
            self.reached |= self._signalled
        else:
            self.reached |= multihost_utils.reached_preemption_sync_point(self._steps)
        return self.reached


@contextmanager
def noticed() -> Iterator[Notice]:
    """Yield a notice that SIGTERM gives; between several processes JAX's own service does."""
    notice = Notice()
    own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    if not own:
        yield notice
        return
    before = signal.signal(signal.SIGTERM, lambda *_: notice.signal())
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)

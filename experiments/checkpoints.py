"""Orbax checkpoints of a training state and its place in the data.

A phase's directory holds one numbered directory per checkpoint, the number being the training
steps done. Orbax writes each under a temporary name and renames it: a killed process leaves no
half a checkpoint under a number.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from experiments.errors import ExperimentError
from experiments.mesh import whole

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a phase stands, and what it has measured so far."""

    seed: int
    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Training steps done in the epoch after those."""
    loss_sum: float = 0.0
    """Sum of the losses of these steps."""
    seconds: float = 0.0
    """Time spent in these steps."""
    compile_seconds: float | None = None
    """Trace, compilation and first execution of the training step."""
    history: tuple[dict[str, Any], ...] = ()
    """One record for each finished epoch."""


def save(directory: Path, step: int, state: Any, progress: Progress, keep: int) -> None:
    """Write checkpoint `step`, wait for it, and remove all but the newest `keep`.

    Of several processes each writes what it holds, and all must call this.

    Raises:
      ExperimentError: the directory cannot be written.
    """
    record = dataclasses.asdict(progress)
    record |= {"digest": _digest(state), "record_digest": _record_digest(record)}
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record)
    )
    try:
        with _unlogged(), ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            manager.save(step, args=arguments, force=True)
    except Exception as error:  # Orbax and TensorStore raise what they meet: no common class.
        if jax.process_index() == 0:  # Others still write: theirs would be another error.
            for part in directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
        raise ExperimentError(
            f"cannot write checkpoint {directory / str(step)}: {_reason(error)}. Earlier "
            "checkpoints are kept; make room or put the cause right, and continue with --resume."
        ) from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep Orbax from logging the traceback of what it raises."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _reason(error: Exception) -> str:
    """Return what the system said, on one line; TensorStore puts paths and more before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split()).partition(" [tensorstore_spec=")[0]
    said, code, _ = words.partition(" [os_error_code")
    return said.rsplit(": ", 1)[-1] if code else f"{type(error).__name__}: {words.rstrip('.')}"


def latest(directory: Path) -> int | None:
    """Return the number of the newest checkpoint, None where there is none."""
    if not directory.is_dir():
        return None
    return max((int(p.name) for p in directory.iterdir() if p.name.isdigit()), default=None)


def restore(directory: Path, step: int, target: Any) -> tuple[Any, Progress]:
    """Read checkpoint `step` into a tree like `target`, and verify every bit.

    Raises:
      ExperimentError: it cannot be read or its content is not what was written (another
        checkpoint is never taken instead); its tree differs from the target's.
    """
    return _restore(directory / str(step), target)


def read(directory: Path, step: int) -> tuple[dict[str, Any], Progress]:
    """Read checkpoint `step` as nested dicts, whatever model wrote it, and verify every bit.

    Raises:
      ExperimentError: it cannot be read or its content is not what was written.
    """
    return _restore(directory / str(step), None)


def _restore(path: Path, target: Any) -> tuple[Any, Progress]:
    try:
        if target is None:
            target = _stored(path)
        else:
            check_tree(leaf_shapes(target), leaf_shapes(_stored(path)), str(path))
        # Handlers, not checkpointers, which wait for other processes: each process reads the whole
        # state, whatever mesh wrote it, and verifies it before it is laid out.
        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target)
        state = ocp.StandardCheckpointHandler().restore(
            epath.Path(path.absolute() / "state"), args=ocp.args.StandardRestore(arrays)
        )
        record: dict[str, Any] = dict(
            ocp.JsonCheckpointHandler().restore(epath.Path(path.absolute() / "progress"))
        )
        digest, written = record.pop("digest"), record.pop("record_digest", None)
        intact = written in (None, _record_digest(record))  # None: by an earlier version
        record["history"] = tuple(record["history"])
        progress = Progress(**record)
    except ExperimentError:
        raise
    except Exception as error:  # Orbax and TensorStore raise what they meet: no common class.
        raise ExperimentError(_corrupt(path, _reason(error))) from error
    if not intact:
        raise ExperimentError(_corrupt(path, "its progress is not what was written"))
    if digest != _digest(state):
        raise ExperimentError(_corrupt(path, "its arrays are not those that were written"))
    return jax.tree.map(jnp.array, state), progress


def check_tree(expected: Shapes, found: Shapes, source: str) -> None:
    """Check that two trees have the same keys and shapes.

    Args:
      expected: the model's leaves, see `leaf_shapes`.
      found: the leaves of what is to be loaded.
      source: names what is loaded, for the message.

    Raises:
      ExperimentError: they have not; lists every missing key, extra key and other shape.

    Examples:
      >>> check_tree({"kernel": (3, 4)}, {"kernel": (3, 4)}, "checkpoint")
    """
    lines = [f"missing: {key} {expected[key]}" for key in sorted(expected.keys() - found.keys())]
    lines += [f"extra:   {key} {found[key]}" for key in sorted(found.keys() - expected.keys())]
    lines += [
        f"shape:   {key} is {found[key]}, the model has {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    if lines:
        raise ExperimentError(
            f"{source} does not fit the model:\n  " + "\n  ".join(lines) + "\n"
            "Load it into the model and the configuration that it was written with."
        )


def leaf_shapes(tree: Any) -> Shapes:
    """Return the shape of every leaf by its path, such as `params/Conv_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_key(path): tuple(leaf.shape) for path, leaf in leaves}


def _stored(path: Path) -> Any:
    """Return shape and dtype of every stored array, as nested dicts."""
    metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(path.absolute() / "state"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def _digest(state: Any) -> str:
    """Return a hash of every array by its path, the same for a state and for nested dicts."""
    leaves = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    sha = hashlib.sha256()
    for key in sorted(leaves):
        sha.update(key.encode() + np.ascontiguousarray(whole(leaves[key])).tobytes())
    return sha.hexdigest()


def _record_digest(record: dict[str, Any]) -> str:
    """Return a hash of a progress record, as JSON holds it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _key(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _corrupt(path: Path, reason: str) -> str:
    return (
        f"checkpoint {path} is corrupt: {reason}.\n"
        "Delete this directory to continue from the checkpoint before it, if there is one, or "
        "start again under another --name."
    )

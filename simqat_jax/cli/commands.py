"""The commands: what each is given, and what it prints."""

import dataclasses
from pathlib import Path
from typing import Protocol

from tyro.conf import Positional

from simqat_jax.cli.bench import bench
from simqat_jax.integer.model import IntegerModel
from simqat_jax.targets import TARGETS
from simqat_jax.targets.listing import sheet_of
from simqat_jax.targets.verify import verify_files


class Command(Protocol):
    """What was asked for."""

    def run(self) -> int:
        """Do it; return the status of the process."""
        ...


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what is in a file: layers, widths, sizes, and what is float."""

    file: Positional[Path]
    """An integer model (IntegerModel.save), *.onnx or *.tflite, of any origin."""
    details: bool = False
    """Show all that is known of each layer."""

    def run(self) -> int:
        """Print a table."""
        if not self.file.is_file():
            raise FileNotFoundError(f"no file at {self.file}.")
        if self.file.suffix in TARGETS:
            sheet = sheet_of(TARGETS[self.file.suffix].listing(self.file), self.file)
            print(sheet.details(sheet.lines) if self.details else sheet.text())
            return 0
        model = IntegerModel.load(self.file)
        print(model.details() if self.details else model)
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Count the codes of exported files that are not those of their integer model.

    The status is 0 where all are equal, 1 where some differ, 2 where it could not be checked.
    """

    model: Positional[Path]
    """An integer model, as IntegerModel.save wrote it."""
    files: Positional[tuple[Path, ...]]
    """*.onnx or *.tflite files written from it."""
    data: tuple[Path, ...]
    """Inputs in real units: one *.npy for each, in order, or one *.npz with all, by name."""

    def run(self) -> int:
        """Print what was found."""
        return verify_files(self.model, self.files, self.data)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure how long a file takes for a call in its runtime, on this machine's CPU."""

    file: Positional[Path]
    """*.onnx or *.tflite."""
    against: Path | None = None
    """Another file, the float model's for instance: the calls of both alternate."""
    threads: int = 1
    """Of the runtime."""
    batch: int = 1
    """Examples a call, where the file leaves the batch size free."""
    calls: int = 200
    """How many calls are measured, after some that are not."""

    def run(self) -> int:
        """Print the median and the 99th percentile."""
        files = [self.file] if self.against is None else [self.file, self.against]
        print(bench(files, self.threads, self.batch, self.calls))
        return 0


COMMANDS: dict[str, type[Command]] = {"inspect": Inspect, "verify": Verify, "bench": Bench}
"""By name."""

"""The commands: what each is given, and what it prints."""

import dataclasses
from pathlib import Path
from typing import Annotated, Protocol

from tyro.conf import Positional, arg

from simqat_jax.analysis.measurement import merged, read_measurements, write_measurements
from simqat_jax.analysis.report import report
from simqat_jax.analysis.result import Analysis
from simqat_jax.cli.bench import bench, table
from simqat_jax.integer.model import IntegerModel
from simqat_jax.targets import TARGETS
from simqat_jax.targets.listing import sheet_of
from simqat_jax.targets.overlays import write_overlays
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
    """Show all that is known of each layer, and all that a file says of itself."""

    def run(self) -> int:
        """Print a table."""
        if not self.file.is_file():
            raise FileNotFoundError(f"no file at {self.file}.")
        if self.file.suffix in TARGETS:
            listing = TARGETS[self.file.suffix].listing(self.file)
            sheet = sheet_of(listing, self.file, whole=self.details)
            print(sheet.whole() if self.details else sheet.text())
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
    json: Path | None = None
    """A file to write what was measured to, for `simqat report --measured`."""

    def run(self) -> int:
        """Print the median and the 99th percentile."""
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"--json {self.json}: there is no folder {self.json.parent}; make it.")
        files = [self.file] if self.against is None else [self.file, self.against]
        found = bench(files, self.threads, self.batch, self.calls)
        foot = f"{self.calls} calls of {self.batch} examples on {self.threads} threads, of "
        print(table(files, found, f"{foot}random inputs."))
        if self.json is not None:
            write_measurements([timed.found for timed in found], self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class Report:
    """Write an analysis as one page of HTML that opens from disk, and as figures."""

    analysis: Positional[Path]
    """A file that Analysis.save wrote."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    measured: tuple[Path, ...] = ()
    """What `simqat bench --json` wrote, or lists of objects with "name" and "accuracy" (0 to 1),
    "nbytes", "p50_ms" or "p99_ms"; what has one name is joined, and compared with the first."""
    title: str = "Why accuracy moved"
    """The page's heading."""
    pngs: Path | None = None
    """A folder to write its figures to."""
    overlay: Path | None = None
    """*.onnx or *.tflite: write node data for its graph in Model Explorer, beside the page."""

    def run(self) -> int:
        """Print what was written."""
        analysis = Analysis.load(self.analysis)
        rows = [row for path in self.measured for row in read_measurements(path)]
        overlays: tuple[Path, ...] = ()
        if self.overlay is not None:
            overlays = write_overlays(analysis, self.overlay, self.out.parent)
        report(analysis, self.out, title=self.title, measurements=merged(rows), pngs=self.pngs)
        print(self.out, *([] if self.pngs is None else [self.pngs]), *overlays, sep="\n")
        return 0


COMMANDS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "verify": Verify,
    "bench": Bench,
    "report": Report,
}
"""By name."""

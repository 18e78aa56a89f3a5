"""What a file says of itself: what goes in, what comes out, and how to read both."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simqat_jax.ir.program import Program, Tensor
from simqat_jax.ir.sheet import number, some
from simqat_jax.numerics.arguments import check_kind, check_mapping, shown

_ABOUT = ("name", "version", "author", "license", "description")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorMetadata:
    """What a file says of one of its inputs or outputs.

    Attributes:
      description: what it is, in words.
      mean: `(raw - mean) / std` makes what the model takes of raw values such as bytes: one number,
        or one for each channel.
      std: likewise; both or none.
      labels: names of classes: of the positions along the last axis, or of the values of an output
        of integers (argmax).

    Raises:
      TypeError: a field of the wrong type.
      ValueError: `mean` without `std`, or of another length; numbers that are not finite; a `std`
        that is not above 0; a label with a line break.

    Examples:
      >>> TensorMetadata(description="a grey image", mean=0, std=255).std
      (255.0,)
    """

    description: str = ""
    mean: float | Sequence[float] = ()
    std: float | Sequence[float] = ()
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_kind("description", self.description, str, "Describe it in a sentence.")
        for field in ("mean", "std"):
            object.__setattr__(self, field, _numbers(field, getattr(self, field)))
        counts = {len(self.means), len(self.stds)}
        if (0 in counts and len(counts) > 1) or len(counts - {1}) > 1:
            raise ValueError(
                f"mean and std belong together, one number or one for each channel, got "
                f"{len(self.means)} and {len(self.stds)} numbers."
            )
        if not all(std > 0 for std in self.stds):
            raise ValueError(f"std must be above 0, got {self.std}: raw values are divided by it.")
        if isinstance(self.labels, str) or not all(isinstance(v, str) for v in self.labels):
            raise TypeError(f"labels must be a list of strings, got {shown(self.labels)}.")
        object.__setattr__(self, "labels", tuple(self.labels))
        broken = [label for label in self.labels if label.splitlines() not in ([], [label])]
        if broken:
            raise ValueError(
                f"a label must be one line of text, got {broken[0]!r}: files hold a label a line."
            )

    @property
    def means(self) -> tuple[float, ...]:
        """What is subtracted, as it was given: none, one number, or one for each channel."""
        assert isinstance(self.mean, tuple)
        return self.mean

    @property
    def stds(self) -> tuple[float, ...]:
        """What is divided by, likewise."""
        assert isinstance(self.std, tuple)
        return self.std


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileMetadata:
    """What an exported file says of itself, for those who run it on a device.

    `TFLITE_METADATA` of a TFLite file, with labels as an associated file; doc strings and
    `metadata_props` of an ONNX file. Names, scales and zero points are written in any case.

    Attributes:
      name: of the model.
      version: of the model.
      author: who made it.
      license: under which it is given.
      description: what it does.
      tensors: what is to say of inputs and outputs, by name: `"input"`, `"output"`.

    Raises:
      TypeError: a field of the wrong type.

    Examples:
      >>> digits = TensorMetadata(labels=[str(k) for k in range(10)])
      >>> FileMetadata(name="LeNet-5", tensors={"output": digits}).tensors["output"].labels[-1]
      '9'
    """

    name: str = ""
    version: str = ""
    author: str = ""
    license: str = ""
    description: str = ""
    tensors: Mapping[str, TensorMetadata] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in _ABOUT:
            check_kind(field, getattr(self, field), str, "Write it as text.")
        check_mapping("tensors", self.tensors, 'Write {"input": TensorMetadata(...)}.')
        for name, tensor in self.tensors.items():
            check_kind(f"tensors[{name!r}]", tensor, TensorMetadata, "Write TensorMetadata(...).")


Described = tuple[FileMetadata, list[tuple[str, TensorMetadata]]]
"""What a file says of itself, and for each of its inputs and outputs a name and what it says."""


def check_metadata(value: object) -> None:
    """Raise TypeError unless `value` is a FileMetadata or None."""
    if value is not None:
        check_kind("metadata", value, FileMetadata, "Write FileMetadata(...), or leave it out.")


@dataclasses.dataclass(frozen=True)
class Codes:
    """What the codes of an input or output stand for: `real = scale * (code - zero_point)`.

    Attributes:
      dtype: their type: that of the file's tensor, or where that is float32 the one inside.
      scale: real units per code.
      zero_point: the code of real zero, as the file holds codes.
    """

    dtype: str
    scale: float
    zero_point: int


@dataclasses.dataclass(frozen=True)
class End:
    """An input or output of a file, with what is said of it.

    Attributes:
      name: its name.
      about: what was given.
      dtype: what it has in the file.
      codes: what its codes stand for; None: it lies on no grid.
      counts: whether it is whole numbers, which labels are those of.
    """

    name: str
    about: TensorMetadata
    dtype: str
    codes: Codes | None
    counts: bool

    @property
    def text(self) -> str:
        """Return what it is: what was given, then type, scale and zero point."""
        return sentences(self.about.description, self.kind)

    @property
    def kind(self) -> str:
        """Return type, scale and zero point."""
        return kind_text(self.dtype, self.codes)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON holds it, without what is empty."""
        fields: dict[str, Any] = {"name": self.name, "dtype": self.dtype}
        if self.codes is not None:
            fields |= {"codes": self.codes.dtype, "scale": self.codes.scale}
            fields |= {"zero_point": self.codes.zero_point}
        fields |= dataclasses.asdict(self.about)
        return {k: v for k, v in fields.items() if v not in ("", ())}


def kind_text(dtype: str, codes: Codes | None) -> str:
    """Write the type of an input or output, and what its codes stand for."""
    if codes is None:
        return dtype
    sign = "-" if codes.zero_point >= 0 else "+"
    zero = f"{sign} {abs(codes.zero_point)}"
    inside = "" if dtype == codes.dtype else f"{dtype}, inside "
    return f"{inside}{codes.dtype} codes: real = {codes.scale:.9g} * (code {zero})"


def file_ends(
    program: Program, metadata: FileMetadata, io: np.dtype | None, inside: np.dtype
) -> tuple[list[End], list[End]]:
    """Return what is said of the inputs and of the outputs of a file, in order.

    Args:
      program: what the file is written from.
      metadata: what was given.
      io: the type of codes of inputs and outputs; None: they are real values.
      inside: the type of codes inside the file.

    Raises:
      ValueError: what is said of no input or output, or does not fit it.
    """
    inputs = [program.tensors[i] for i in program.inputs]
    outputs = [program.tensors[i] for i in program.outputs]
    names = [t.name for t in inputs], list(program.output_names())
    unknown = [name for name in metadata.tensors if name not in (*names[0], *names[1])]
    if unknown:
        raise ValueError(
            f"the metadata speak of {unknown[0]!r}. The model takes {', '.join(names[0])} and "
            f"returns {', '.join(names[1])}."
        )

    def end(name: str, tensor: Tensor) -> End:
        about, grid = metadata.tensors.get(name, TensorMetadata()), tensor.grid
        if grid is None:
            counts = np.issubdtype(np.dtype(tensor.dtype), np.integer)
            found = End(name, about, tensor.dtype, None, counts)
        else:
            kind = inside if io is None else io
            zero = int(grid.zero_point) + grid.offset_in(kind)
            codes = Codes(kind.name, float(grid.scale), zero)
            found = End(name, about, "float32" if io is None else kind.name, codes, False)
        _check_fits(found, tensor)
        return found

    return list(map(end, names[0], inputs)), list(map(end, names[1], outputs))


def notes(
    metadata: FileMetadata, ends: Sequence[tuple[str, TensorMetadata]], *, whole: bool = False
) -> Iterator[str]:
    """Yield what a file says of itself, a line for itself and one for each input and output.

    Args:
      metadata: of the file.
      ends: name and what is said of each.
      whole: a line for each label, too, instead of the first of them.
    """
    title = " ".join(filter(None, (metadata.name, metadata.version)))
    made = ", ".join(filter(None, (title, metadata.author, metadata.license)))
    if made or metadata.description:
        yield sentences(made, metadata.description)
    for name, about in ends:
        parts = (about.description, *told(about, whole))
        if any(parts):
            yield f"{name}: {sentences(*parts)}"
        if whole:
            yield from (f"  {place} {label}" for place, label in enumerate(about.labels))


def told(about: TensorMetadata, whole: bool = False) -> Iterator[str]:
    """Yield what is said besides a description; `whole`: labels are listed elsewhere."""
    if about.means:
        mean, std = (_listed(v) for v in (about.means, about.stds))
        yield f"made of raw values by (raw - {mean}) / {std}"
    if about.labels:
        listed = "" if whole else f": {some(about.labels)}"
        yield f"{len(about.labels)} labels{listed}"


def _numbers(field: str, given: Any) -> tuple[float, ...]:
    """Return one number or several as a tuple.

    Raises:
      TypeError: no numbers.
      ValueError: one that is not finite.
    """
    try:
        numbers = tuple(np.atleast_1d(np.asarray(given, np.float64)).tolist())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{field} must be a number or a list of them, got {shown(given)}."
        ) from error
    if np.ndim(given) > 1:
        raise ValueError(f"{field} must be a number or one a channel, got {shown(given)}.")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{field} must be finite, got {shown(given)}.")
    return numbers


def _check_fits(end: End, tensor: Tensor) -> None:
    last = tensor.shape[-1] if tensor.shape else 1
    means, labels = max(len(end.about.means), len(end.about.stds)), len(end.about.labels)
    if means not in (0, 1, last):
        raise ValueError(
            f"{end.name}: mean and std are of {means} channels, and its last axis has length "
            f"{last}. Give one number, or one for each channel."
        )
    if labels and not end.counts and labels != last:
        raise ValueError(
            f"{end.name}: {labels} labels, and its last axis has length {last}. Give a label for "
            "each position."
        )


def sentences(*parts: str) -> str:
    """Join what is not empty."""
    return ". ".join(part.rstrip(".") for part in parts if part)


def _listed(values: Sequence[float]) -> str:
    text = ", ".join(map(number, values))
    return text if len(values) == 1 else f"[{text}]"

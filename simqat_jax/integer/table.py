"""The printed integer model: its operations, their outputs and sizes."""

from collections.abc import Sequence

from simqat_jax.ir.program import Program, Tensor


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape, with the batch size by name."""
    dims = ["batch" if d == -1 else f"{-d}*batch" if d < 0 else str(d) for d in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def _cells(tensor: Tensor) -> tuple[str, ...]:
    grid = tensor.grid
    if grid is None:
        return tensor.name, shape_text(tensor.shape), tensor.dtype, ""
    return tensor.name, shape_text(tensor.shape), f"{grid.scale:.6g}", str(grid.zero_point)


def table(program: Program) -> str:
    """Return one line for each input and operation, and a line that counts."""
    rows = [("operation", "where", "output", "shape", "scale", "zero", "bytes")]
    rows += [("input", "", *_cells(program.tensors[i]), "") for i in program.inputs]
    floats = set(map(id, program.float_ops))
    for op in program.ops:
        kind = f"{op.kind} (float)" if id(op) in floats else op.kind
        constants = (program.tensors[i].value for i in op.inputs)
        size = op.nbytes + sum(value.nbytes for value in constants if value is not None)
        cells = _cells(program.tensors[op.outputs[0]])
        rows.append((kind, op.path, *cells, f"{size:,}" if size else ""))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append(
        f"{len(program.ops)} operations, {len(floats)} of them in float; {program.nbytes:,} bytes; "
        f"rounding as in {program.backend}."
    )
    return "\n".join(lines)

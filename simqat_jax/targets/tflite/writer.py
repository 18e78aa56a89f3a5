"""Write a program as a TFLite model: its operations, inputs and outputs."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np

from simqat_jax.ir.program import Op, Program, Tensor
from simqat_jax.targets.refusals import each
from simqat_jax.targets.tflite.repeated import false_of_each, repeated_codes, repeated_values
from simqat_jax.targets.tflite.staying_whole import staying_whole
from simqat_jax.targets.tflite.subgraph import (
    Codes,
    Plain,
    SchemaObject,
    Subgraph,
    reshape_target,
)


class Writer(Subgraph):
    """Collects the tensors and operators of a program.

    Attributes:
      source: the program.
      values: what stands for each of its tensors on a grid that has been written.
      reals: likewise for each tensor in real values, integers or truth values.
      wholes: the number of the tensor that holds codes less their zero point, as float32.
      staying_whole: the tensors of which there is nothing else.
      falses: the number of a tensor that is false for each example, once it is needed.
    """

    def __init__(
        self,
        program: Program,
        schema: ModuleType,
        versions: Mapping[str, tuple[str | None, int]],
    ):
        super().__init__(schema, versions)
        self.source = program
        self.values: dict[int, Codes] = {}
        self.wholes: dict[int, int] = {}
        self.staying_whole = staying_whole(program)
        self.reals: dict[int, Plain] = {}
        self.falses: int | None = None

    def model(self, io: np.dtype | None, write: Callable[["Writer", Op], None]) -> SchemaObject:
        """Return the model; `write` writes one operation; `io`: of codes that go in and out."""
        inputs = [self.input(self.source.tensors[i], i, io) for i in self.source.inputs]
        for i, tensor in enumerate(self.source.tensors):
            if tensor.value is not None and tensor.grid is not None:
                self.values[i] = self.code_constant(tensor.value, tensor.grid)

        each(self.source.ops, lambda op: write(self, op), "TFLite")
        names = self.source.output_names()
        outputs = [self.output(k, name, io) for k, name in enumerate(names)]
        return self.packed(inputs, outputs)

    def hold(self, model: SchemaObject, name: str, content: bytes) -> None:
        """Give a model metadata of a name."""
        entry, buffer = self.schema.MetadataT(), self.schema.BufferT()
        buffer.data = np.frombuffer(content, np.uint8)
        entry.name, entry.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or []), entry]

    def whole(self, i: int) -> int:
        """Return the tensor of codes less their zero point, as float32."""
        if i not in self.wholes:
            x, target = self.values[i], self.tensor(None, self.values[i].shape, np.float32)
            bytes_ = self.tensor(None, x.shape, np.int8, 1.0, x.grid.stored_zero)
            self.emit("RESHAPE", [x.index], bytes_, newShape=reshape_target(x.shape))
            self.emit("DEQUANTIZE", [bytes_], target)
            self.wholes[i] = target
        return self.wholes[i]

    def reshaped(self, real: int, shape: Sequence[int]) -> int:
        """Return a tensor of real values in another shape."""
        target = self.tensor(None, shape, np.float32)
        self.emit("RESHAPE", [real], target, newShape=reshape_target(shape))
        return target

    def full(self, i: int) -> Codes | None:
        """Return what stands for a tensor; a constant that repeats along the batch at full length.

        None stands for a tensor that is no code, or stays whole.
        """
        tensor, held = self.source.tensors[i], self.values.get(i)
        if held is not None and tensor.repeats and held.shape != tensor.shape:
            held = self.values[i] = repeated_codes(self, tensor, held, self.false())
        return held

    def false(self) -> int:
        """Return a truth value of each example, which is false."""
        if self.falses is None:
            i, axis = next(
                (i, axis)
                for i in self.source.inputs
                for axis, d in enumerate(self.source.tensors[i].shape)
                if d == -1
            )
            self.falses = false_of_each(self, self.values.get(i) or self.reals[i], axis)
        return self.falses

    def quantize(self, real: int, shape: Sequence[int], codes: Codes) -> None:
        """Map real values to codes.

        QUANTIZE alone multiplies with the rounded inverse of the scale, and so rounds values in
        the middle between two codes, which normalized images often are, to either of them.
        """
        scale = self.constant(codes.grid.scale, np.float32)
        for name in ("DIV", "ROUND", "MUL"):
            result = self.tensor(name.lower(), shape, np.float32)
            self.emit(name, [real] if name == "ROUND" else [real, scale], result)
            real = result
        limits = (codes.grid.qmin - codes.grid.offset, codes.grid.qmax - codes.grid.offset)
        free = limits == (-128, 127)
        target = codes if free else self.codes("unclamped", shape, codes.grid)
        self.emit("QUANTIZE", [real], target.index)
        if not free:
            self.limit(target, limits, codes)

    def packed(self, inputs: list[int], outputs: list[int]) -> SchemaObject:
        """Return the model of one subgraph, with a signature that names inputs and outputs."""
        s = self.schema
        subgraph, signature, model = s.SubGraphT(), s.SignatureDefT(), s.ModelT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs = inputs, outputs
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        names = [self.source.tensors[i].name for i in self.source.inputs]
        signature.inputs = self.named(names, inputs)
        signature.outputs = self.named(self.source.output_names(), outputs)
        model.version, model.description = 3, "simqat_jax"
        model.operatorCodes = [self.opcode(name) for name in self.opcodes]
        model.subgraphs, model.buffers, model.signatureDefs = [subgraph], self.buffers, [signature]
        return model

    def named(self, names: Sequence[str], indices: Sequence[int]) -> list[SchemaObject]:
        """Name tensors in a signature."""
        maps = [self.schema.TensorMapT() for _ in names]
        for entry, name, index in zip(maps, names, indices, strict=True):
            entry.name, entry.tensorIndex = name, index
        return maps

    def plain(self, name: str, shape: Sequence[int], dtype: str) -> Plain:
        """Add a tensor of real values, integers or truth values."""
        return Plain(self.tensor(name, shape, np.dtype(dtype)), tuple(shape), dtype)

    def real(self, i: int) -> Plain:
        """Return a tensor in real values; of what is on no grid, as it is."""
        tensor = self.source.tensors[i]
        if i not in self.reals and tensor.grid is not None:
            self.reals[i] = self.plain(f"{tensor.name}/real", tensor.shape, "float32")
            codes = self.full(i)
            assert codes is not None
            self.emit("DEQUANTIZE", [codes.index], self.reals[i].index)
        elif i not in self.reals and tensor.repeats:
            self.reals[i] = repeated_values(self, tensor, self.false())
        elif i not in self.reals:
            assert tensor.value is not None
            index = self.constant(tensor.value, tensor.value.dtype)
            self.reals[i] = Plain(index, tensor.value.shape, tensor.dtype)
        return self.reals[i]

    def input(self, tensor: Tensor, i: int, io: np.dtype | None) -> int:
        """Add an input of the file, quantized where it takes real values; return its number."""
        if tensor.grid is None:
            self.reals[i] = self.plain(tensor.name, tensor.shape, tensor.dtype)
            return self.reals[i].index
        codes = self.values[i] = self.codes(tensor.name, tensor.shape, tensor.grid)
        if io == np.int8:
            return codes.index
        if io is not None:
            return self.retyped(codes, f"{tensor.name}/{io}", io, into=True)
        real = self.tensor(f"{tensor.name}/real", tensor.shape, np.float32)
        self.quantize(real, tensor.shape, codes)
        return real

    def retyped(self, codes: Codes, name: str, dtype: np.dtype, *, into: bool = False) -> int:
        """Add a tensor of codes of another type that becomes `codes` (`into`), or is made of them.

        QUANTIZE between int8 and uint8 of one scale inverts the highest bit.
        """
        zero = int(codes.grid.zero_point) + codes.grid.offset_in(dtype)
        other = self.tensor(name, codes.shape, dtype, codes.grid.scale, zero)
        source, target = (other, codes.index) if into else (codes.index, other)
        self.emit("QUANTIZE", [source], target)
        return other

    def output(self, position: int, name: str, io: np.dtype | None) -> int:
        """Return the number of an output of the file, a copy where codes are one already."""
        i = self.source.outputs[position]
        if self.source.tensors[i].grid is None:
            x = self.real(i)
            real = self.tensor(name, x.shape, np.dtype(x.dtype))
            self.emit("RESHAPE", [x.index], real, newShape=reshape_target(x.shape))
            return real
        codes = self.values[i]
        if io is None:
            real = self.tensor(name, codes.shape, np.float32)
            self.emit("DEQUANTIZE", [codes.index], real)
            return real
        if io != np.int8:
            return self.retyped(codes, name, io)
        earlier = [*self.source.inputs, *self.source.outputs[:position]]
        if i in earlier or self.source.tensors[i].value is not None:
            copy = self.codes(name, codes.shape, codes.grid)
            return self.reshape(codes, codes.shape, copy).index
        self.tensors[codes.index].name = name
        return codes.index

"""Write a program as a TFLite model: its operations, inputs and outputs."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np

from simqat_jax.ir.program import Op, Program, Tensor, grid_of
from simqat_jax.targets.refusals import each
from simqat_jax.targets.tflite.subgraph import Codes, SchemaObject, Subgraph


class Writer(Subgraph):
    """Collects the tensors and operators of a program.

    Attributes:
      source: the program.
      values: what stands for each of its tensors that has been written.
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

    def model(self, integer_io: bool, write: Callable[..., Codes | None]) -> SchemaObject:
        """Return the model; `write` writes one operation on codes, and may return others."""
        inputs = [self.input(self.source.tensors[i], i, integer_io) for i in self.source.inputs]
        for i, tensor in enumerate(self.source.tensors):
            if tensor.value is not None and tensor.grid is not None:
                self.values[i] = self.code_constant(tensor.value, tensor.grid)

        def written(op: Op) -> None:
            tensor = self.source.tensors[op.outputs[0]]
            target = self.codes(tensor.name, tensor.shape, grid_of(tensor))
            inputs = [
                self.values[i] if self.source.reads_thin(op, i) else self.whole(i)
                for i in op.inputs
            ]
            replaced = write(self, op, *inputs, target)
            self.values[op.outputs[0]] = replaced or target

        each(self.source.ops, written, "TFLite")
        names = self.source.output_names()
        outputs = [self.output(k, name, integer_io) for k, name in enumerate(names)]
        return self.packed(inputs, outputs)

    def whole(self, i: int) -> Codes:
        """Return what stands for a tensor; a constant that repeats along the batch at full length.

        TFLite has no lengths that are computed, but its sums broadcast: one code of each example
        times zero, plus the constant.
        """
        tensor, held = self.source.tensors[i], self.values[i]
        if not tensor.repeats:
            return held
        x = self.one_of_each(tensor)
        scale = np.float32(held.grid.scale) / np.float32(x.grid.scale)
        zeros = self.codes("zeros", x.shape, held.grid)
        self.emit("MUL", [x.index, self.constant(0, np.int8, scale=scale)], zeros.index)
        whole = self.values[i] = self.codes(tensor.name, tensor.shape, held.grid)
        self.emit("ADD", [zeros.index, held.index], whole.index)
        return whole

    def one_of_each(self, tensor: Tensor) -> Codes:
        """Return one code of each example, along the axis of the batch in a constant."""
        x, axis = next(
            (self.values[n], axis)
            for n in self.source.inputs
            for axis, d in enumerate(self.source.tensors[n].shape)
            if d == -1 and n in self.values
        )
        ends = [None if k == axis else 1 for k in range(len(x.shape))]
        one = self.codes("one", [d if k == axis else 1 for k, d in enumerate(x.shape)], x.grid)
        self.strided_slice(x, [0] * len(ends), ends, [1] * len(ends), one)
        return self.reshape(one, [min(d, 1) for d in tensor.shape])

    def constant_output(self, tensor: Tensor, name: str) -> int:
        """Return the number of an output of real values that does not depend on the data."""
        assert tensor.value is not None
        held = self.constant(tensor.value, np.float32)
        output = self.tensor(name, tensor.shape, np.float32)
        if not tensor.repeats:
            self.emit("RESHAPE", [held], output, newShape=np.asarray(tensor.shape, np.int32))
            return output
        x = self.one_of_each(tensor)
        real, zeros = (self.tensor(stem, x.shape, np.float32) for stem in ("real", "zeros"))
        self.emit("DEQUANTIZE", [x.index], real)
        self.emit("MUL", [real, self.constant(0, np.float32)], zeros)
        self.emit("ADD", [zeros, held], output)
        return output

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

    def input(self, tensor: Tensor, i: int, integer_io: bool) -> int:
        """Add an input of the file, quantized where it takes real values; return its number."""
        codes = self.values[i] = self.codes(tensor.name, tensor.shape, grid_of(tensor))
        if integer_io:
            return codes.index
        real = self.tensor(f"{tensor.name}/real", tensor.shape, np.float32)
        self.quantize(real, tensor.shape, codes)
        return real

    def output(self, position: int, name: str, integer_io: bool) -> int:
        """Return the number of an output of the file, a copy where codes are one already."""
        i = self.source.outputs[position]
        if self.source.tensors[i].grid is None:
            return self.constant_output(self.source.tensors[i], name)
        codes = self.values[i]
        if not integer_io:
            real = self.tensor(name, codes.shape, np.float32)
            self.emit("DEQUANTIZE", [codes.index], real)
            return real
        earlier = [*self.source.inputs, *self.source.outputs[:position]]
        if i in earlier or self.source.tensors[i].value is not None:
            copy = self.codes(name, codes.shape, codes.grid)
            return self.reshape(codes, codes.shape, copy).index
        self.tensors[codes.index].name = name
        return codes.index

"""Patching a TFLite flatbuffer: float weights of known products become packed integers.

`_litert_convert.convert` hands the weights of every product to the converter as *inputs* of the
graph. A graph input cannot be folded, fused, transposed away or merged with an equal constant,
and it keeps its name, so here each weight is found by name, with certainty, and replaced by a
constant of the type we want.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_rq.export.interpreter import require

# The oldest operator versions that know run-time quantized input with scales per output channel
# and, for DEQUANTIZE, scales per channel.
_MIN_VERSION = {"FULLY_CONNECTED": 12, "CONV_2D": 8, "DEQUANTIZE": 6}
_FILE_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
_STORED_SUFFIX = b"/codes"


@dataclasses.dataclass(frozen=True)
class WeightPatch:
    """One weight to be stored as integers.

    Attributes:
        marker: name of the graph input that stands for the weight.
        name: the caller's name for the product, for messages and for the tensor in the file.
        op: the operator the weight must feed. Anything else is an error, never a fallback.
            `"DEQUANTIZE"` stands for a float weight that any operators may use.
        kernel: `"integer"` if `op` computes with the integer weights; `"float"` if a `DEQUANTIZE`
            operator turns them into float32 first.
        codes: the integer weights, in the layout they have in the traced function.
        scale: float32 scales along `axis` of `codes`; one element means one scale for all.
        axis: the axis of `codes` that `scale` runs along.
        bits: storage width: 8, 4 or 2.
    """

    marker: str
    name: str
    op: str
    kernel: str
    codes: np.ndarray
    scale: np.ndarray
    axis: int
    bits: int

    @property
    def storage(self) -> str:
        """The TFLite type of the stored weight."""
        return f"INT{self.bits}"


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs signed integers, the first of them in the lowest bits of the first byte.

    Args:
        codes: integers that fit `bits` bits in two's complement; flattened in C order.
        bits: 8, 4 or 2.

    Returns:
        A uint8 vector. The last byte is filled up with zeros.
    """
    if bits not in (8, 4, 2):
        raise ValueError(f"`bits` must be 8, 4 or 2. Received: bits={bits}.")
    flat = np.asarray(codes).reshape(-1).astype(np.int16)
    per_byte = 8 // bits
    flat = np.pad(flat, (0, -len(flat) % per_byte)) & ((1 << bits) - 1)
    shifts = np.arange(per_byte, dtype=np.int16) * bits
    return (flat.reshape(-1, per_byte) << shifts).sum(axis=1).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The caller's names of a file's inputs and outputs, in order."""

    inputs: Sequence[str]
    outputs: Sequence[str]


def patch_weights(
    buffer: bytes, patches: Sequence[WeightPatch], signature: Signature | None = None
) -> bytes:
    """Replaces the graph inputs named in `patches` by integer constants.

    Args:
        buffer: a TFLite flatbuffer straight from the converter.
        patches: the weights; each must be found exactly once.
        signature: names of the remaining inputs and outputs, stored in the file when given.

    Returns:
        The patched flatbuffer.
    """
    model = _Model(buffer)
    for patch in patches:
        model.apply(patch)
    model.graph.inputs = np.array(
        [i for i in model.graph.inputs if int(i) not in model.replaced], np.int32
    )
    if signature is not None:
        model.sign(signature)
    return model.serialize()


class _Model:
    """A parsed flatbuffer while it is being patched."""

    def __init__(self, buffer: bytes):
        self.schema = require("ai_edge_litert.schema_py_generated")
        self.model = self.schema.ModelT.InitFromPackedBuf(buffer, 0)
        self.graph = self.model.subgraphs[0]
        self.replaced: set[int] = set()
        self._stored: dict[bytes, int] = {}

    def apply(self, patch: WeightPatch) -> None:
        """Stores the weight of one product as integers."""
        markers = [i for i in self._list(self.graph.inputs) if self._marker(i) == patch.marker]
        if not markers:
            raise ValueError(
                f"The weight of {patch.name!r} is not in the converted file, so it cannot be "
                "stored as integers. Use one IntegerGraph for one traced function."
            )
        for marker in markers:  # More than one if a nested function was called repeatedly.
            self.replaced.add(marker)
            self._apply_to(marker, patch)

    def _apply_to(self, marker: int, patch: WeightPatch) -> None:
        index, patch = self._skip_layout_changes(marker, patch)
        consumers = self._consumers(index)
        self._check(patch, index, consumers)
        self._store(patch, index)
        if patch.kernel == "float":
            self._dequantize(patch, index, consumers)
        else:
            for op in consumers:
                op.builtinOptions.asymmetricQuantizeInputs = True
                op.opcodeIndex = self._opcode(patch.op)

    def _marker(self, tensor: int) -> str:
        """A tensor's name without the name scopes that it was emitted in."""
        return self.graph.tensors[tensor].name.decode().rpartition("/")[2]

    def sign(self, signature: Signature) -> None:
        """Stores the caller's names of the inputs and outputs as the default signature."""
        schema = self.schema

        def tensor_maps(names: Sequence[str], tensors: Sequence[int]) -> list[Any]:
            maps = []
            for name, tensor in zip(names, tensors, strict=True):
                maps.append(schema.TensorMapT())
                maps[-1].name, maps[-1].tensorIndex = name, int(tensor)
            return maps

        entry = schema.SignatureDefT()
        entry.signatureKey = "serving_default"
        entry.inputs = tensor_maps(signature.inputs, self.graph.inputs)
        entry.outputs = tensor_maps(signature.outputs, self.graph.outputs)
        self.model.signatureDefs = [entry]

    def serialize(self) -> bytes:
        """Drops what nothing refers to any more and packs the model into bytes."""
        flatbuffers = require("flatbuffers")
        self._drop_unused_tensors()
        self._share_buffers()
        self._drop_empty_fields()
        self._drop_unused_buffers()

        class Builder(flatbuffers.Builder):
            """The schema aligns constants to 16 bytes; its generated Python code does not."""

            def StartVector(self, elemSize, numElems, alignment):
                alignment = _ALIGNMENT if elemSize == 1 else alignment
                return super().StartVector(elemSize, numElems, alignment)

        builder = Builder(1024)
        builder.Finish(self.model.Pack(builder), _FILE_IDENTIFIER)
        return bytes(builder.Output())

    def _consumers(self, tensor: int) -> list[Any]:
        return [op for op in self.graph.operators if tensor in self._list(op.inputs)]

    @staticmethod
    def _list(tensors: Any) -> list[int]:
        """An absent vector of the flatbuffer is `None`, a present one an array."""
        return [] if tensors is None else [int(i) for i in tensors]

    def _op_name(self, op: Any) -> str:
        code = self.model.operatorCodes[op.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        return _name_of(self.schema.BuiltinOperator, number)

    def _skip_layout_changes(self, tensor: int, patch: WeightPatch) -> tuple[int, WeightPatch]:
        """Follows a weight through the TRANSPOSE or RESHAPE that gives it TFLite's layout.

        The converter emits these because the weight is an input to it. They would run at every
        inference; instead the codes change their layout here, once, and the operator goes.
        """
        while True:
            consumers = self._consumers(tensor)
            if len(consumers) != 1 or tensor in self.graph.outputs:
                return tensor, patch
            op, name = consumers[0], self._op_name(consumers[0])
            shape = tuple(int(d) for d in self.graph.tensors[op.outputs[0]].shape)
            if name == "TRANSPOSE":
                order = [int(i) for i in self._constant(op.inputs[1])]
                codes, axis = patch.codes.transpose(order), order.index(patch.axis)
            elif name == "RESHAPE":  # Also what the converter makes of a trivial transpose.
                codes, axis = patch.codes.reshape(shape), _reshaped_axis(patch, shape)
            else:
                return tensor, patch
            if axis is None:
                return tensor, patch
            patch = dataclasses.replace(patch, codes=codes, axis=axis)
            self.graph.operators.remove(op)
            tensor = int(op.outputs[0])

    def _constant(self, tensor: int) -> np.ndarray:
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.int32)

    def _check(self, patch: WeightPatch, tensor: int, consumers: Sequence[Any]) -> None:
        """Raises unless the converter used the weight exactly as it was meant."""
        shape = tuple(int(d) for d in self.graph.tensors[tensor].shape)
        names = [self._op_name(op) for op in consumers]
        if patch.op == "DEQUANTIZE":  # A float weight, for any operator to use.
            expected = bool(names) or tensor in self.graph.outputs
        else:
            expected = names == [patch.op] and int(consumers[0].inputs[1]) == tensor
        if not expected:
            raise ValueError(
                f"The weight of {patch.name!r} must feed exactly one {patch.op} in "
                f"the converted file. Received: {names or 'no operator at all'}. The converter "
                "rewrote the product, or its result is unused; nothing was stored as integers."
            )
        if shape != patch.codes.shape:
            raise ValueError(
                f"The weight of {patch.name!r} has the shape {shape} in the converted file; "
                f"expected {patch.codes.shape}."
            )

    def _store(self, patch: WeightPatch, index: int) -> None:
        """Gives the tensor its integer type, its codes and its scales."""
        tensor = self.graph.tensors[index]
        tensor.type = getattr(self.schema.TensorType, patch.storage)
        tensor.name = patch.name.encode() + _STORED_SUFFIX
        tensor.shape = np.array(patch.codes.shape, np.int32)
        tensor.buffer = self._buffer(pack_bits(patch.codes, patch.bits))
        parameters = self.schema.QuantizationParametersT()
        parameters.scale = np.asarray(patch.scale, np.float32)
        parameters.zeroPoint = np.zeros(patch.scale.size, np.int64)
        parameters.quantizedDimension = patch.axis
        tensor.quantization = parameters

    def _buffer(self, packed: np.ndarray) -> int:
        """Adds a buffer, or finds the equal one that a shared layer has already stored."""
        key = packed.tobytes()
        if key not in self._stored:
            buffer = self.schema.BufferT()
            buffer.data = packed
            self.model.buffers.append(buffer)
            self._stored[key] = len(self.model.buffers) - 1
        return self._stored[key]

    def _dequantize(self, patch: WeightPatch, index: int, consumers: Sequence[Any]) -> None:
        """Puts a DEQUANTIZE between the stored codes and the operators that read the weight."""
        schema, graph = self.schema, self.graph
        weight = schema.TensorT()
        weight.name, weight.type, weight.buffer = patch.name.encode(), schema.TensorType.FLOAT32, 0
        weight.shape = np.array(patch.codes.shape, np.int32)
        graph.tensors.append(weight)
        new = len(graph.tensors) - 1
        for op in consumers:
            op.inputs = np.where(op.inputs == index, new, op.inputs).astype(np.int32)
        graph.outputs = np.where(graph.outputs == index, new, graph.outputs).astype(np.int32)
        op = schema.OperatorT()
        op.opcodeIndex = self._opcode("DEQUANTIZE")
        op.inputs, op.outputs = np.array([index], np.int32), np.array([new], np.int32)
        op.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
        op.builtinOptions = schema.DequantizeOptionsT()
        graph.operators.insert(0, op)  # Operators run in file order; a constant is ready first.

    def _opcode(self, name: str) -> int:
        """Returns the index of an operator code new enough for integer weights."""
        number = getattr(self.schema.BuiltinOperator, name)
        version = _MIN_VERSION[name]
        for index, code in enumerate(self.model.operatorCodes):
            same = max(code.builtinCode, code.deprecatedBuiltinCode) == number
            if same and code.version >= version:
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
        code.version = version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _drop_unused_tensors(self) -> None:
        graph = self.graph
        used = {*self._list(graph.inputs), *self._list(graph.outputs)}
        for op in graph.operators:
            for tensors in (op.inputs, op.outputs, op.intermediates):
                used.update(i for i in self._list(tensors) if i >= 0)
        renumber = {old: new for new, old in enumerate(sorted(used))}
        renumber[-1] = -1  # An optional input that is absent.

        def renumbered(tensors: Any) -> Any:
            return np.array([renumber[i] for i in self._list(tensors)], np.int32)

        graph.tensors = [graph.tensors[old] for old in sorted(used)]
        graph.inputs, graph.outputs = renumbered(graph.inputs), renumbered(graph.outputs)
        for op in graph.operators:
            op.inputs, op.outputs = renumbered(op.inputs), renumbered(op.outputs)
            if op.intermediates is not None:
                op.intermediates = renumbered(op.intermediates)
        for entry in self.model.signatureDefs or ():
            for tensor_map in (*entry.inputs, *entry.outputs):
                tensor_map.tensorIndex = renumber[tensor_map.tensorIndex]

    def _share_buffers(self) -> None:
        """Points tensors without data at buffer 0, and tensors with equal data at one buffer."""
        first: dict[bytes, int] = {b"": 0}
        for tensor in self.graph.tensors:
            data = self.model.buffers[tensor.buffer].data
            key = b"" if data is None else np.asarray(data, np.uint8).tobytes()
            tensor.buffer = first.setdefault(key, tensor.buffer)

    def _drop_empty_fields(self) -> None:
        """Names of intermediate tensors and empty tables can outweigh the weights of a model."""
        kept = {*self._list(self.graph.inputs), *self._list(self.graph.outputs)}
        for index, tensor in enumerate(self.graph.tensors):
            if index not in kept and not (tensor.name or b"").endswith(_STORED_SUFFIX):
                tensor.name = None
            if tensor.quantization is not None and tensor.quantization.scale is None:
                tensor.quantization = None
            if np.array_equal(tensor.shape, tensor.shapeSignature):
                tensor.shapeSignature = None
        for op in self.graph.operators:
            op.intermediates = op.intermediates if self._list(op.intermediates) else None
            if not np.any(op.mutatingVariableInputs):
                op.mutatingVariableInputs = None

    def _drop_unused_buffers(self) -> None:
        """Buffer 0 is the empty one by convention; tensors and metadata refer to the others."""
        tensors = [tensor for graph in self.model.subgraphs for tensor in graph.tensors]
        owners = [*tensors, *(self.model.metadata or ())]
        legacy = self._list(self.model.metadataBuffer)
        used = sorted({0, *legacy, *(owner.buffer for owner in owners)})
        renumber = {old: new for new, old in enumerate(used)}
        self.model.buffers = [self.model.buffers[old] for old in used]
        for owner in owners:
            owner.buffer = renumber[owner.buffer]
        self.model.metadataBuffer = [renumber[i] for i in legacy] or None


def _reshaped_axis(patch: WeightPatch, shape: tuple[int, ...]) -> int | None:
    """Returns where the axis of the scales goes when the codes take `shape`, if it survives."""
    if patch.scale.size == 1:
        return 0
    before = math.prod(patch.codes.shape[: patch.axis])
    for axis, size in enumerate(shape):
        if size == patch.scale.size and math.prod(shape[:axis]) == before:
            return axis
    return None


def _name_of(enum: type, number: int) -> str:
    """Returns the name of a number of one of the schema's enumerations."""
    for name, value in vars(enum).items():
        if value == number and isinstance(value, int):
            return name
    return f"operator {number}"

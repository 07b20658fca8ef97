"""Quantized cells of recurrent layers, and what the loop around a quantized cell does.

Both products of a cell are quantized, that of the input and that of the state, each with its
kernel; biases, gates and the states themselves stay in float. A state is quantized anew in every
step, with the statistics of that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

from keras_rq import backend
from keras_rq.layers.base import QuantizedLayer, is_quantized
from keras_rq.layers.convolutional import pad_input
from keras_rq.layers.products import Convolution, MatMul, Product
from keras_rq.layers.registry import built_shape, contains, quantizes
from keras_rq.layers.sharing import held_for_loop

Shape = tuple[int | None, ...]


class _Cell(QuantizedLayer):
    """Products whose output channels are gates, side by side.

    Keras drops elements of the input either alike for all gates or, then with a list of masks,
    anew for each of them. What is dropped is dropped first and quantized afterwards.
    """

    kernel_names = ("kernel", "recurrent_kernel")
    gates: int
    channel_axis = -1

    def products(self) -> dict[str, Product]:
        return {"kernel": MatMul(), "recurrent_kernel": MatMul()}

    def input_masks(self, inputs: Any, training: bool) -> Any:
        """Keras's dropout masks: None, one, or a list with one for each gate."""
        return self.get_dropout_mask(inputs) if training and 0.0 < self.dropout < 1.0 else None

    def state_masks(self, state: Any, training: bool) -> Any:
        """Those of the state."""
        wanted = training and 0.0 < self.recurrent_dropout < 1.0
        return self.get_recurrent_dropout_mask(state) if wanted else None

    def multiply_gates(
        self, name: str, x: Any, masks: Any = None, gates: Sequence[int] | None = None
    ) -> Any:
        """The product of `x` and the kernel's columns of some gates, or of all."""
        if isinstance(masks, (list, tuple)):
            each = range(self.gates) if gates is None else gates
            parts = [self.multiply_gates(name, x * masks[gate], None, (gate,)) for gate in each]
            return ops.concatenate(parts, axis=self.channel_axis)
        x = self.prepare(name, x if masks is None else x * masks)
        if gates is None:
            return self.multiply(name, x)
        self.note_product(name)
        x, master = ops.convert_to_tensor(x), self.float32_kernel(name)
        width = master.shape[-1] // self.gates
        columns = (gates[0] * width, (gates[-1] + 1) * width)
        if (lowered := self.lowered) is not None:
            whole = lowered(name, self.products()[name], x)
            return ops.take(whole, range(*columns), axis=self.channel_axis)
        return backend.call_in_graph(self, "multiply_columns", x, master, (name, *columns))

    def multiply_columns(self, x: Any, master: Any, part: tuple[str, int, int]) -> Any:
        """`multiply_by` with some of the kernel's output channels."""
        name, start, stop = part
        return self.apply_product(name, x, self.quantized_kernel(name, master)[..., start:stop])

    def prepare(self, name: str, x: Any) -> Any:
        """The input of a product, as the product takes it."""
        return x

    def output_shape_of(self, input_shape: Shape) -> Shape:
        return (input_shape[0], self.units)


@quantizes(keras.layers.SimpleRNNCell)
class QuantizedSimpleRNNCell(_Cell, keras.layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell` on quantized operands."""

    gates = 1

    def call(self, sequence: Any, states: Any, training: bool = False) -> Any:
        state = states[0] if isinstance(states, (list, tuple)) else states
        masks = None, None
        if self.lowered is None:
            # Keras makes the masks in inference too, which moves its random state.
            masks = self.get_dropout_mask(sequence), self.get_recurrent_dropout_mask(state)
        masks = masks if training else (None, None)
        outputs = self.multiply_gates("kernel", sequence, masks[0])
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        outputs = outputs + self.multiply_gates("recurrent_kernel", state, masks[1])
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs, [outputs] if isinstance(states, (list, tuple)) else outputs


@quantizes(keras.layers.LSTMCell)
class QuantizedLSTMCell(_Cell, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` on quantized operands."""

    gates = 4

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        state, carry = states
        z = self.multiply_gates("kernel", inputs, self.input_masks(inputs, training))
        z = ops.add(
            z, self.multiply_gates("recurrent_kernel", state, self.state_masks(state, training))
        )
        if self.use_bias:
            z = ops.add(z, self.bias)
        carry, gate = self._compute_carry_and_output_fused(ops.split(z, 4, axis=1), carry)
        state = gate * self.activation(carry)
        return state, [state, carry]


@quantizes(keras.layers.GRUCell)
class QuantizedGRUCell(_Cell, keras.layers.GRUCell):
    """`keras.layers.GRUCell` on quantized operands, with the reset gate before or after."""

    gates = 3

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        is_nested = isinstance(states, (list, tuple))
        state = states[0] if is_nested else states
        bias = recurrent_bias = None
        if self.use_bias:
            bias, recurrent_bias = self.bias, None
            if self.reset_after:
                bias, recurrent_bias = self.bias[0], self.bias[1]
        x = self.multiply_gates("kernel", inputs, self.input_masks(inputs, training))
        x = x if bias is None else ops.add(x, bias)
        x_update, x_reset, x_new = ops.split(x, 3, axis=-1)

        masks = self.state_masks(state, training)
        before = None if self.reset_after else (0, 1)  # gates of which the reset gate is one
        inner = self.multiply_gates("recurrent_kernel", state, masks, before)
        inner = inner if recurrent_bias is None else ops.add(inner, recurrent_bias)
        update, reset, *new = ops.split(inner, 3 if self.reset_after else 2, axis=-1)
        update = self.recurrent_activation(x_update + update)
        reset = self.recurrent_activation(x_reset + reset)
        if self.reset_after:
            new = reset * new[0]
        else:
            new = self.multiply_gates("recurrent_kernel", reset * state, masks, (2,))
        state = update * state + (1 - update) * self.activation(x_new + new)
        return state, [state] if is_nested else state


@quantizes(ConvLSTMCell)
class QuantizedConvLSTMCell(_Cell, ConvLSTMCell):
    """The cell of `keras.layers.ConvLSTM1D`, `2D` and `3D` on quantized operands."""

    gates = 4

    @property
    def channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    def products(self) -> dict[str, Product]:
        geometry, ones = (self.strides, self.dilation_rate), (1,) * self.rank
        return {
            "kernel": Convolution.create(self.rank, *geometry, self.data_format),
            "recurrent_kernel": Convolution.create(self.rank, ones, ones, self.data_format),
        }

    def prepare(self, name: str, x: Any) -> Any:
        padding, strides, dilation = self.padding, self.strides, self.dilation_rate
        if name == "recurrent_kernel":
            padding, strides, dilation = "same", (1,) * self.rank, (1,) * self.rank
        return pad_input(x, padding, self.kernel_size, strides, dilation, self.data_format)

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        state, carry = states
        z = self.multiply_gates("kernel", inputs, self.input_masks(inputs, training))
        if self.use_bias:
            shape = [1] * (self.rank + 2)
            shape[self.channel_axis] = -1
            z = ops.add(z, ops.reshape(self.bias, shape))
        z = z + self.multiply_gates("recurrent_kernel", state, self.state_masks(state, training))
        enter, forget, new, leave = ops.split(z, 4, axis=self.channel_axis)
        carry = self.recurrent_activation(forget) * carry
        carry = carry + self.recurrent_activation(enter) * self.activation(new)
        state = self.recurrent_activation(leave) * self.activation(carry)
        return state, [state, carry]

    def output_shape_of(self, input_shape: Shape) -> Shape:
        return self.compute_output_shape(input_shape)[0]


@contains(keras.layers.RNN)
class LoopOverCell:
    """What `keras.layers.RNN`, `LSTM` and the like do differently around a quantized cell.

    The kernels are quantized once a sequence and not once a step, and the fused loops of cuDNN and
    of PyTorch, which know no quantized operands, are left alone.
    """

    @property
    def use_cudnn(self) -> bool:
        return False

    @use_cudnn.setter
    def use_cudnn(self, value: Any) -> None:
        self.__dict__["use_cudnn"] = value  # where it lies when the layer is in float again

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: bool = False
    ) -> Any:
        with held_for_loop(self._prepare_kernels):
            return super().inner_loop(sequences, initial_state, mask, training)

    def _prepare_kernels(self) -> None:
        for layer in self._quantized_inside():
            layer.prepare_for_loop()

    def _maybe_config_dropout_masks(self, cell: Any, *args: Any) -> None:
        # In a file nothing is dropped, and there is no place for a random state.
        if all(layer.lowered is None for layer in self._quantized_inside()):
            super()._maybe_config_dropout_masks(cell, *args)

    def _quantized_inside(self) -> list[QuantizedLayer]:
        return [layer for layer in self.cell._flatten_layers() if is_quantized(layer)]


def steps_of(container: keras.layers.Layer) -> int | None:
    """How often a call of `container` calls what is inside: its time steps; None if unknown."""
    if not isinstance(container, (keras.layers.RNN, keras.layers.TimeDistributed)):
        return 1
    shape = built_shape(container)
    return None if shape is None else shape[1]

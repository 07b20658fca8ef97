"""The two directions of a quantizer that has variables of its own, for any such quantizer.

Its gradient is a closed form too: the derivative of every output element to its own input and to
every parameter, given the codes (`Quantizer.slopes`). Automatic differentiation does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from keras import ops
from keras.src.backend.common import global_state

from keras_rq import backend
from keras_rq.numerics.blocks import Blocks, BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.slopes import with_slopes

if TYPE_CHECKING:
    from keras_rq.quantizers.base import Quantizer

Parameters = Mapping[str, Any]

_FORWARD_ONLY = "keras_rq_forward_only"


@contextmanager
def forward_only() -> Iterator[None]:
    """A scope whose caller asks for no gradients: values are the same, and slopes are not made.

    For operations that run one by one, most of whose time slopes take. What is compiled within is
    compiled with its gradient, since it may be called again outside.
    """
    before = global_state.get_global_attribute(_FORWARD_ONLY)
    global_state.set_global_attribute(_FORWARD_ONLY, backend.where_traced())
    try:
        yield
    finally:
        global_state.set_global_attribute(_FORWARD_ONLY, before)


def _is_forward_only() -> bool:
    where = global_state.get_global_attribute(_FORWARD_ONLY)
    return where is not None and where == backend.where_traced()


def fake_quantize(
    quantizer: Quantizer, x: Any, blocks: Blocks, parameters: Parameters | None
) -> Any:
    """Quantizes and dequantizes a float32 tensor (already rotated), with its gradient."""
    view = blocks.view(tuple(x.shape))
    values = view.split(x)
    parameters = _given(quantizer, values, view, parameters)
    data, fixed = ops.stop_gradient(values), _without_gradient(parameters)
    codes, line = quantizer.encode_with(data, view, fixed)
    made = line(codes)
    kept = _kept(quantizer, x, view, blocks)
    made = made if kept is None else made * kept
    if _is_forward_only():
        return view.merge(made)
    to_values, to_parameters = quantizer.slopes(data, codes, view, fixed)
    if kept is not None:
        # Data that is pruned keeps its gradient, as in `numerics.dequantizers`; it moves no range.
        to_parameters = {name: slope * kept for name, slope in to_parameters.items()}
    terms = [(parameters[name], slope) for name, slope in to_parameters.items()]
    return view.merge(with_slopes(made, (values, to_values), *terms))


def encode(
    quantizer: Quantizer, x: Any, view: BlockView, blocks: Blocks, parameters: Parameters | None
) -> tuple[Any, Line]:
    """Codes (0 where pruned or padded) and the line of every block, of a rotated tensor."""
    values = view.split(x)
    parameters = _given(quantizer, values, view, parameters)
    codes, line = quantizer.encode_with(values, view, parameters)
    kept = _kept(quantizer, x, view, blocks)
    codes = view.present(codes if kept is None else codes * kept)
    rank = len(values.shape)
    return codes, Line(*(part if part is None else _with_rank(part, rank) for part in line))


def _given(
    quantizer: Quantizer, values: Any, view: BlockView, parameters: Parameters | None
) -> Parameters:
    if not parameters:
        return quantizer.initial(ops.stop_gradient(values), view)
    return {k: ops.convert_to_tensor(v, dtype="float32") for k, v in parameters.items()}


def _without_gradient(parameters: Parameters) -> Parameters:
    return {name: ops.stop_gradient(value) for name, value in parameters.items()}


def _kept(quantizer: Quantizer, x: Any, view: BlockView, blocks: Blocks) -> Any:
    mask = quantizer.keep_mask(ops.stop_gradient(x), blocks)
    return None if mask is None else view.split(mask)


def _with_rank(statistic: Any, rank: int) -> Any:
    """A statistic of the whole tensor gets one axis of size 1 for each of the tensor's."""
    return statistic if len(statistic.shape) == rank else ops.reshape(statistic, (1,) * rank)

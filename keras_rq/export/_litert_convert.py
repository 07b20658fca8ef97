"""From a traced function with integer products to the bytes of a TFLite file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from keras_rq.export._flatbuffer import Signature, patch_weights
from keras_rq.export._litert_graph import IntegerGraph
from keras_rq.export.interpreter import require


def convert(graph: IntegerGraph, concrete_function: Any) -> bytes:
    """Converts a traced function to a TFLite file with integer weights.

    The file has a default signature with the names of the function's arguments and, if it
    returns a dictionary, of its results.

    Args:
        graph: the `IntegerGraph` that was used while tracing.
        concrete_function: what `tf.function.get_concrete_function` returned.

    Returns:
        The bytes of the TFLite file.

    Raises:
        ValueError: if the weight of a recorded product is missing, or does not feed the operator
            it is meant for, or if the converter fails. Nothing falls back to float silently.
    """
    tf = require("tensorflow")
    function, signature = _lift_weights(graph, concrete_function)
    with _quiet():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
        try:
            buffer = converter.convert()
        except Exception as error:  # the class has no public name
            raise ValueError(_what_failed(error)) from error
    return patch_weights(buffer, graph.patches, signature)


def _what_failed(error: Exception) -> str:
    """What the converter says, without the call sites."""
    text = str(error)
    lacking = sorted(set(re.findall(r"'(tf\.\w+)' op is neither a custom op nor a flex op", text)))
    if lacking:
        return (
            f"The model computes {', '.join(lacking)}, which LiteRT has no operator for. Export "
            "the part of the model without it, or write it with other operations."
        )
    errors = re.findall(r"error: (.*)", text) or text.splitlines() or [repr(error)]
    return f"TensorFlow's converter cannot translate the model: {errors[0][:500]}"


def _lift_weights(graph: IntegerGraph, concrete_function: Any) -> tuple[Any, Signature]:
    """Returns the function with every recorded weight as an additional input.

    What the converter sees as an input it cannot fold into a neighbouring multiplication, or
    merge with an equal constant, and it keeps its name.
    """
    tf = require("tensorflow")
    freezing = require("tensorflow.python.framework.convert_to_constants")
    frozen = freezing.convert_variables_to_constants_v2(concrete_function, lower_control_flow=False)
    definition = frozen.graph.as_graph_def()
    markers = [_lift(node) for node in definition.node if _is_marker(node, graph)]
    found = {marker.rpartition("/")[2] for marker in markers}
    missing = [patch.name for patch in graph.patches if patch.marker not in found]
    if missing:
        raise ValueError(
            f"The weights of {missing} are not in the traced function. Use one IntegerGraph for "
            "one trace of one function, use the result of every product, and emit products "
            "outside of loops and branches."
        )
    wrapped = tf.compat.v1.wrap_function(
        lambda: tf.graph_util.import_graph_def(definition, name=""), []
    )
    inputs = [wrapped.graph.get_tensor_by_name(tensor.name) for tensor in frozen.inputs]
    outputs = [wrapped.graph.get_tensor_by_name(tensor.name) for tensor in frozen.outputs]
    weights = [wrapped.graph.get_tensor_by_name(f"{marker}:0") for marker in markers]
    names = [tensor.op.name for tensor in inputs]
    signature = Signature(names, _output_names(concrete_function, len(outputs)))
    return wrapped.prune([*inputs, *weights], outputs), signature


def _is_marker(node: Any, graph: IntegerGraph) -> bool:
    return node.op == "Const" and node.name.rpartition("/")[2].startswith(graph.key)


def _lift(node: Any) -> str:
    """Turns a constant of a graph definition into a placeholder, and returns its name."""
    node.attr["shape"].shape.CopyFrom(node.attr["value"].tensor.tensor_shape)
    node.op = "Placeholder"
    del node.attr["value"]
    return node.name


def _output_names(concrete_function: Any, count: int) -> list[str]:
    results = concrete_function.structured_outputs
    if isinstance(results, dict) and len(results) == count:
        return sorted(results)  # TensorFlow flattens a dictionary in this order.
    return [f"output_{i}" for i in range(count)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the converter's advice to pass an object that owns variables: we have none."""
    logging = require("absl.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)

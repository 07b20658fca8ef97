"""`quantize`: a float model becomes a trainable quantized one, in place.

Everything is resolved before anything changes, and what has changed is undone if a later step
fails: a model is quantized whole or not at all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import keras

from keras_rq import backend
from keras_rq.layers import folding, paths
from keras_rq.layers.base import QuantizedLayer, is_quantized
from keras_rq.layers.integer import reason_for_float
from keras_rq.layers.products import Convolution
from keras_rq.layers.registry import (
    owns_weights,
    pairs_of,
    products_of,
    quantized_class,
    refuse_keras_quantization,
)
from keras_rq.policy import LayerQuantization, QuantizationPolicy, Rule
from keras_rq.training import containers, guards, optimizers, unreached

Filters = str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None


@dataclass
class Plan:
    """What a policy comes to on one model.

    Attributes:
        quantized: the layers to swap, with their quantizers.
        kept: layers with weights that stay in float, and why.
        unused_rules: rules that matched no layer.
        folded: how many layers fold the BatchNormalization behind them into their kernel.
    """

    quantized: list[tuple[keras.layers.Layer, LayerQuantization]] = field(default_factory=list)
    kept: list[tuple[keras.layers.Layer, str]] = field(default_factory=list)
    unused_rules: list[Rule] = field(default_factory=list)
    folded: int = 0


def quantize(
    model: keras.layers.Layer, policy: QuantizationPolicy, filters: Filters = None
) -> Plan:
    """Swaps the layers that `policy` names for quantized ones, in place.

    Args:
        model: a built Keras model (or layer) of any kind.
        policy: which layer gets which quantizers.
        filters: as in `keras.Model.quantize`: a regular expression or several, searched in layer
            names, or a callable that takes a layer; others stay in float.

    Returns:
        The `Plan` that was carried out.

    Raises:
        TypeError, ValueError: wrong arguments, an unbuilt model, a model quantized before, or
            quantizers that a layer cannot have. The model is then as it was.
    """
    plan = make_plan(model, policy, filters)
    for rule in plan.unused_rules:
        warnings.warn(
            f"{rule!r} decided for no layer of {model.name!r}: nothing matches it, or an earlier "
            "rule does. Layer paths are listed by `keras_rq.report(model)`.",
            stacklevel=3,
        )
    _warn_of_float_products(plan)
    _warn_of_flash_attention(plan)
    if policy.fold_batch_norm and not plan.folded:
        warnings.warn(
            f"fold_batch_norm=True folds nothing in {model.name!r}: no BatchNormalization can "
            "become a part of a quantized kernel. The report names the reasons.",
            stacklevel=3,
        )
    _carry_out(model, plan)
    return plan


def _warn_of_float_products(plan: Plan) -> None:
    found: dict[str, list[str]] = {}
    for layer, quantization in plan.quantized:
        if quantization.forward is None:
            continue
        for product in products_of(layer).values():
            if (reason := reason_for_float(product, quantization)) is not None:
                found.setdefault(reason, []).append(layer.path)
    for reason, of in found.items():
        warnings.warn(
            f"forward='int8' leaves the products of {len(of)} layers in float, because of each "
            f"{reason}: {', '.join(of[:3])}{', ...' if len(of) > 3 else ''}.",
            stacklevel=4,
        )


def _warn_of_flash_attention(plan: Plan) -> None:
    found = [
        layer.path
        for layer, quantization in plan.quantized
        if quantization.matmuls is not None and getattr(layer, "_flash_attention", None)
    ]
    if found:
        warnings.warn(
            "Flash attention fuses the products that `matmuls` quantizes, and is not used in "
            f"{len(found)} layers: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}.",
            stacklevel=4,
        )


def make_plan(model: keras.layers.Layer, policy: QuantizationPolicy, filters: Filters) -> Plan:
    """Resolves a policy against a model and changes nothing."""
    _check_arguments(model, policy, filters)
    layers = model._flatten_layers()
    _check_state(model, layers)
    paths.complete(model)
    plan, used, containers_of = Plan(), set(), containers_around(model)
    for layer in layers:
        around = containers_of.get(id(layer), [])
        rule, quantization = policy.rule_for(layer, around), policy.resolve(layer, around)
        if not owns_weights(layer):
            if quantization.matmuls is not None or policy.matmuls is not None:
                used.add(id(rule))
                _plan_matmuls(plan, layer, quantization, rule, filters)
            continue
        used.add(id(rule))
        quantization = suited(layer, quantization)
        reason = _reason_for_float(layer, quantization, rule, filters) or _reason_around(
            [model, *around]
        )
        if reason is not None:
            plan.kept.append((layer, reason))
        else:
            check_fit(layer, quantization)
            plan.quantized.append((layer, quantization))
    if policy.fold_batch_norm:
        _plan_folding(plan, model)
    plan.unused_rules = [rule for rule in policy.rules if id(rule) not in used]
    return plan


def _plan_folding(plan: Plan, model: keras.layers.Layer) -> None:
    """Decides which layers fold the BatchNormalization behind them, and says why others do not."""
    pairs = folding.find(model)
    waiting = dict(pairs.norms)
    for at, (layer, quantization) in enumerate(plan.quantized):
        norm = waiting.pop(id(layer), None) if quantization.weights is not None else None
        plan.folded += norm is not None
        plan.quantized[at] = layer, replace(quantization, fold_batch_norm=norm is not None)
    reasons = {id(norm): f"not folded: {reason}" for norm, reason in pairs.reasons}
    reasons |= {
        id(norm): "not folded: the kernel before it stays in float" for norm in waiting.values()
    }
    folded = {id(norm) for norm in pairs.norms.values()} - set(reasons)
    plan.kept = [
        (layer, reasons.get(id(layer), reason))
        for layer, reason in plan.kept
        if id(layer) not in folded
    ]


def _plan_matmuls(
    plan: Plan,
    layer: keras.layers.Layer,
    quantization: LayerQuantization,
    rule: Rule | None,
    filters: Filters,
) -> None:
    """Decides on the products of activations of a layer without weights of its own."""
    if not pairs_of(layer):
        reason = None if quantization.matmuls is None else unreached.reason_for_float(layer)
    elif quantization.matmuls is None:
        reason = f"{rule or 'the policy'} leaves its products of activations in float"
    elif not _passes(layer, filters):
        reason = "excluded by `filters`"
    else:
        plan.quantized.append((layer, suited(layer, quantization)))
        return
    if reason is not None:
        plan.kept.append((layer, reason))


def suited(layer: keras.layers.Layer, quantization: LayerQuantization) -> LayerQuantization:
    """What of a quantization a layer can use: that of kernels, or of products of activations.

    A rotation of both operands is dropped where a product of the layer would have to undo it.
    """
    if pairs_of(layer):
        return LayerQuantization(None, None, matmuls=quantization.matmuls)
    quantization = replace(quantization, matmuls=None, fold_batch_norm=False)
    weights, activations = quantization.weights, quantization.activations
    rotations = {None if one is None else one.rotation for one in (weights, activations)}
    if len(rotations) > 1 or None in rotations:
        return quantization
    products = products_of(layer).items()
    if all(product.shares_rotation(getattr(layer, name).shape) for name, product in products):
        return quantization
    weights, activations = (one.replace(rotation=None) for one in (weights, activations))
    return replace(quantization, weights=weights, activations=activations)


def containers_around(model: keras.layers.Layer) -> dict[int, list[keras.layers.Layer]]:
    """The layers around each layer, the model itself left out, by the id of the inner one."""
    found: dict[int, list[keras.layers.Layer]] = {}
    for outer in model._flatten_layers(include_self=False):
        for inner in outer._flatten_layers(include_self=False):
            found.setdefault(id(inner), []).append(outer)
    return found


def _reason_for_float(
    layer: keras.layers.Layer,
    quantization: LayerQuantization,
    rule: Rule | None,
    filters: Filters,
) -> str | None:
    if quantized_class(type(layer)) is None:
        return unreached.reason_for_unknown(layer)
    if not _passes(layer, filters):
        return "excluded by `filters`"
    if quantization.weights is None and quantization.activations is None:
        return f"{rule or 'the policy'} leaves it in float"
    has_input = any(product.input_axes for product in products_of(layer).values())
    if quantization.weights is None and not has_input:
        return f"the policy quantizes activations only, and {type(layer).__name__} multiplies none"
    return None


def _reason_around(containers_of_layer: list[keras.layers.Layer]) -> str | None:
    for outer in containers_of_layer:
        if getattr(outer, "use_cudnn", None) is True:
            return f"{outer.name!r} asks for use_cudnn=True, and cuDNN quantizes no operands"
    return None


def _passes(layer: keras.layers.Layer, filters: Filters) -> bool:
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    return any(re.search(pattern, layer.name) for pattern in patterns)


def _check_arguments(model: object, policy: object, filters: object) -> None:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: {model!r}")
    if not isinstance(policy, QuantizationPolicy):
        raise TypeError(
            "`policy` must be a keras_rq.QuantizationPolicy, as in "
            f"keras_rq.QuantizationPolicy('A4W1'). Received: {policy!r}"
        )
    if filters is not None and not (callable(filters) or isinstance(filters, (str, list, tuple))):
        raise TypeError(
            "`filters` must be a regular expression, a list of them, or a callable that takes a "
            f"layer. Received: {filters!r}"
        )
    if callable(filters):
        return
    for pattern in [filters] if isinstance(filters, str) else filters or ():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`filters` holds no regular expression: {pattern!r} ({error})."
            ) from None


def _check_state(model: keras.layers.Layer, layers: list[keras.layers.Layer]) -> None:
    for layer in layers:
        if is_quantized(layer):
            raise ValueError(
                f"Layer {layer.path!r} is quantized already ({layer.quantization}). Quantize the "
                "float model once, with all rules in one policy."
            )
        refuse_keras_quantization(layer)
        if quantized_class(type(layer)) is not None and not layer.built:
            raise ValueError(
                f"Layer {layer.name!r} of {model.name!r} is not built: its kernel does not exist "
                "yet. Call the model on a batch of data, or model.build(input_shape), first."
            )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built. Call it on a batch of data, or "
            "model.build(input_shape), first."
        )


def check_fit(layer: keras.layers.Layer, quantization: LayerQuantization) -> None:
    """Raises if a layer cannot have these quantizers; names the layer."""
    try:
        for name, product in products_of(layer).items():
            kernel_shape = tuple(getattr(layer, name).shape)
            if quantization.weights is not None:
                blocks = product.kernel_blocks(quantization.weights)
                quantization.weights.kernel_parameters(blocks.view(kernel_shape))
                _check_groups(product, blocks.size, kernel_shape)
            if quantization.activations is not None and product.input_axes:
                quantization.activations.input_parameters()
                size = product.input_blocks(quantization.activations).size
                _check_groups(product, size, kernel_shape)
    except ValueError as error:
        raise ValueError(f"Layer {layer.path!r} ({type(layer).__name__}): {error}") from error


def _check_groups(product: object, size: int | str, kernel_shape: tuple[int, ...]) -> None:
    if not isinstance(product, Convolution) or isinstance(size, str) or product.groups == 1:
        return
    channels, groups = kernel_shape[-2], product.groups
    if size < channels * groups and channels % size:
        raise ValueError(
            f"conv_block_size={size} must divide the {channels} input channels of each of the "
            f"{groups} groups: a block that straddles two groups has no integer product."
        )


def _carry_out(model: keras.layers.Layer, plan: Plan) -> None:
    changed: list[tuple[keras.layers.Layer, type]] = []
    try:
        for layer, quantization in plan.quantized:
            changed.append((layer, type(layer)))
            containers.attach(layer, quantization)
        for layer in model._flatten_layers():
            if containers.needs_envelope(layer):
                changed.append((layer, type(layer)))
                containers.enclose(layer)
        models = [layer for layer in model._flatten_layers() if isinstance(layer, keras.Model)]
        renewed = [(one, optimizers.renewed(one)) for one in models]
    except BaseException:
        for layer, original in reversed(changed):
            if is_quantized(layer):
                layer.drop_quantization()
            containers.swap_class(layer, original)
        raise
    for one, optimizer in renewed:
        if optimizer is not None:
            one.optimizer = optimizer
    guards.set_guards(model)
    forget_compiled_functions(model)


def change(model: keras.layers.Layer, quantizations: Iterable[LayerQuantization]) -> None:
    """Gives the quantized layers of a model, in their order, other quantizations."""
    for layer, quantization in zip(quantized_layers(model), quantizations, strict=True):
        layer.take_quantization(quantization)
    forget_compiled_functions(model)


def forget_compiled_functions(model: keras.layers.Layer) -> None:
    """Makes a model, and all within it, trace again what was compiled."""
    layers = model._flatten_layers()
    for layer in layers:
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
        if hasattr(layer, "generate_function"):  # where KerasHub's tasks keep theirs
            layer.generate_function = None
    backend.forget_traces(layers)


def quantized_layers(model: keras.layers.Layer) -> list[QuantizedLayer]:
    """All quantized layers of a model, each once."""
    return [layer for layer in model._flatten_layers() if is_quantized(layer)]

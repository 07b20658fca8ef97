"""Which layer gets which quantizer: shorthand, rules, policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import keras

from keras_rq import quantizers, shorthand
from keras_rq.quantizers import Quantizer

_VERSION = 2
# Fields that later versions added, with what their absence meant.
_ADDED = {1: {"forward": None}}


@dataclass(frozen=True)
class LayerQuantization:
    """What one layer does with its operands; None leaves an operand in float.

    Attributes:
        weights: quantizer of the layer's kernels.
        activations: quantizer of the layer's inputs.
        forward: None, or "int8": the forward product runs on integers (see `QuantizationPolicy`).
        is_calibrated: whether the layer's variables hold ranges of its inputs.
    """

    weights: Quantizer | None
    activations: Quantizer | None
    forward: str | None = None
    is_calibrated: bool = False

    def get_config(self) -> dict[str, Any]:
        calibrated = {"is_calibrated": True} if self.is_calibrated else {}
        return calibrated | {
            "version": _VERSION,
            "weights": _serialize(self.weights),
            "activations": _serialize(self.activations),
            "forward": self.forward,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerQuantization:
        names = ("weights", "activations", "forward")
        is_calibrated = isinstance(config, dict) and config.get("is_calibrated", False) is True
        if is_calibrated:
            config = {name: value for name, value in config.items() if name != "is_calibrated"}
        fields = _checked_fields(config, "a layer's quantization", names)
        forward = _check_forward(fields.pop("forward"))
        operands = {name: _deserialize(value) for name, value in fields.items()}
        return cls(**operands, forward=forward, is_calibrated=is_calibrated)


class Rule:
    """What the layers that match get instead of the policy's default.

    Args:
        match: a regular expression, searched in the layer's path; a layer class, by name, whose
            subclasses match too, and so does what lies inside such a layer (a MultiHeadAttention
            holds four EinsumDense); or a callable that takes the layer and returns a bool.
        weights: a quantizer, a bit width (then `Ridge`), or None for float. Left out: the policy's.
        activations: likewise.
        matmuls: quantizer of products of two activations; not available yet.
        skip: leave the layer in float altogether.

    Raises:
        TypeError, ValueError: name the argument, the value received and what is accepted.

    Example:

    >>> import keras, keras_rq as rq
    >>> rule = rq.Rule(keras.layers.Embedding, weights=8)
    """

    def __init__(
        self,
        match: str | type | Callable[[keras.layers.Layer], bool],
        *,
        weights: Any = ...,
        activations: Any = ...,
        matmuls: Any = ...,
        skip: bool = False,
    ) -> None:
        self.match = _check_match(match)
        self.weights = weights if weights is ... else quantizers.get(weights)
        self.activations = activations if activations is ... else quantizers.get(activations)
        _refuse_matmuls(None if matmuls is ... else matmuls)
        self.skip = skip
        if skip and not (weights is ... and activations is ...):
            raise ValueError(
                "A rule with skip=True leaves its layers in float; it takes no quantizers. "
                f"Received: weights={weights!r}, activations={activations!r}"
            )

    def matches(
        self, layer: keras.layers.Layer, containers: Sequence[keras.layers.Layer] = ()
    ) -> bool:
        """Whether the rule speaks of `layer`, or by class of one of the containers it lies in."""
        if isinstance(self.match, str):
            return re.search(self.match, layer.path or layer.name) is not None
        if isinstance(self.match, _ClassNamed):
            return any(self.match.matches(one) for one in (layer, *containers))
        return bool(self.match(layer))

    def get_config(self) -> dict[str, Any]:
        if isinstance(self.match, str):
            match = {"path": self.match}
        elif isinstance(self.match, _ClassNamed):
            match = {"class": self.match.name}
        else:
            raise ValueError(
                f"A rule that matches by a callable cannot be saved: {self.match!r}. "
                "Use a regular expression on the layer's path, or a layer class."
            )
        return {
            "match": match,
            "weights": _serialize(self.weights),
            "activations": _serialize(self.activations),
            "skip": self.skip,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rule:
        names = ("match", "weights", "activations", "skip")
        # A rule is saved within a policy, which has the version.
        config = {"version": _VERSION, **config} if isinstance(config, dict) else config
        fields = _checked_fields(config, "a rule", names)
        match = fields.pop("match")
        if not isinstance(match, dict) or set(match) not in ({"path"}, {"class"}):
            raise ValueError(
                "The 'match' of a saved rule must be {'path': pattern} or {'class': name}. "
                f"Received: {match!r}"
            )
        found = match["path"] if "path" in match else _ClassNamed(match["class"])
        operands = ("weights", "activations")
        return cls(found, **{k: _deserialize(v) if k in operands else v for k, v in fields.items()})

    def __repr__(self) -> str:
        match = self.match.name if isinstance(self.match, _ClassNamed) else repr(self.match)
        return f"Rule({match})"


@dataclass(frozen=True)
class _ClassNamed:
    """A layer class by name: what a saved rule holds, so that loading one imports nothing."""

    name: str

    def matches(self, layer: keras.layers.Layer) -> bool:
        return any(base.__name__ == self.name for base in type(layer).__mro__)


@keras.saving.register_keras_serializable("keras_rq")
class QuantizationPolicy(keras.quantizers.QuantizationConfig):
    """Says which layer gets which quantizer.

    Args:
        spec: shorthand, `A<bits>W<bits>[-<block>|-channel|-tensor][-<N>:<M>[-paired]]`: "A4W1",
            "A1W1-channel", "A4W1-128-2:4", "W4" (weights only). Bits are 1, 1.5 (ternary), 2 to 8
            or fp4; N:M sparsity falls on the weights. The quantizers are `Ridge`;
            `keras_rq.presets` has others.
        weights: quantizer of kernels, or a bit width; replaces what `spec` says.
        activations: quantizer of layer inputs, or a bit width; replaces what `spec` says. None
            leaves what `spec` says; for weights alone write "W4".
        matmuls: quantizer of products of two activations; not available yet.
        rules: `Rule` objects; the first that matches a layer decides.
        forward: how products are computed while training. None: in float, from dequantized
            operands. "int8": on the integer units, from codes of up to 8 bits (Theorem 1 of
            arXiv 2409.09245); gradients are the same, the outputs equal up to rounding.
            `Dense` and `EinsumDense` have such products; others are named in a warning.

    Raises:
        TypeError, ValueError: name the argument, the value received and what is accepted.

    Example:

    >>> import keras_rq as rq
    >>> policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("head", weights=8, activations=8)])
    >>> policy.weights.bits, policy.activations.bits
    (1, 4)
    """

    def __init__(
        self,
        spec: str | None = None,
        *,
        weights: Any = None,
        activations: Any = None,
        matmuls: Any = None,
        rules: Sequence[Rule] = (),
        forward: str | None = None,
    ) -> None:
        self.forward = _check_forward(forward)
        of_weights, of_activations = (None, None) if spec is None else shorthand.read(spec)
        self.weights = of_weights if weights is None else quantizers.get(weights)
        self.activations = of_activations if activations is None else quantizers.get(activations)
        _refuse_matmuls(matmuls)
        super().__init__(self.weights, self.activations)
        self.rules = tuple(rules)
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"`rules` must hold keras_rq.Rule objects. Received: {rule!r}")
        if self.weights is None and self.activations is None and not self.rules:
            raise ValueError(
                "A policy without quantizers and rules does nothing. Give a shorthand such as "
                "'A4W1', `weights=`, `activations=` or `rules=`."
            )

    @property
    def mode(self) -> str:
        """The name Keras asks of a quantization config."""
        return "keras_rq"

    def rule_for(
        self, layer: keras.layers.Layer, containers: Sequence[keras.layers.Layer] = ()
    ) -> Rule | None:
        """The first rule that matches `layer`, which lies in `containers`."""
        return next((rule for rule in self.rules if rule.matches(layer, containers)), None)

    def resolve(
        self, layer: keras.layers.Layer, containers: Sequence[keras.layers.Layer] = ()
    ) -> LayerQuantization:
        """The quantizers of `layer`; both None where the policy leaves it in float."""
        rule = self.rule_for(layer, containers)
        if rule is None:
            return LayerQuantization(self.weights, self.activations, self.forward)
        if rule.skip:
            return LayerQuantization(None, None)
        return LayerQuantization(
            self.weights if rule.weights is ... else rule.weights,
            self.activations if rule.activations is ... else rule.activations,
            self.forward,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "weights": _serialize(self.weights),
            "activations": _serialize(self.activations),
            "rules": [rule.get_config() for rule in self.rules],
            "forward": self.forward,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationPolicy:
        names = ("weights", "activations", "rules", "forward")
        fields = _checked_fields(config, "a policy", names)
        return cls(
            weights=_deserialize(fields["weights"]),
            activations=_deserialize(fields["activations"]),
            rules=[Rule.from_config(rule) for rule in fields["rules"]],
            forward=fields["forward"],
        )

    def __repr__(self) -> str:
        return (
            f"QuantizationPolicy(weights={self.weights!r}, activations={self.activations!r}, "
            f"rules={list(self.rules)!r}, forward={self.forward!r})"
        )


def _check_match(match: Any) -> Any:
    if isinstance(match, _ClassNamed):
        return match
    if isinstance(match, str):
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"`match` is no regular expression: {match!r} ({error}).") from None
        return match
    if isinstance(match, type) and issubclass(match, keras.layers.Layer):
        return _ClassNamed(match.__name__)
    if callable(match) and not isinstance(match, type):
        return match
    raise TypeError(
        "`match` must be a regular expression, a Keras layer class or a callable that takes a "
        f"layer. Received: match={match!r}"
    )


def _check_forward(forward: Any) -> str | None:
    if forward is not None and (not isinstance(forward, str) or forward != "int8"):
        raise ValueError(f"`forward` must be None or 'int8'. Received: forward={forward!r}")
    return forward


def _refuse_matmuls(matmuls: Any) -> None:
    if matmuls is not None:
        raise ValueError(
            "`matmuls` (products of two activations, as inside attention) cannot be quantized by "
            f"this version; leave it None. Received: matmuls={matmuls!r}"
        )


def _serialize(quantizer: Quantizer | EllipsisType | None) -> Any:
    if quantizer is ...:
        return "inherit"
    return keras.saving.serialize_keras_object(quantizer)


def _deserialize(config: Any) -> Any:
    if config == "inherit":
        return ...
    try:
        quantizer = None if config is None else keras.saving.deserialize_keras_object(config)
    except Exception as error:  # whatever Keras, or a quantizer of unknown fields, makes of it
        raise ValueError(
            f"A saved quantizer could not be read. Received: {config!r}. Its class or one of its "
            "fields is unknown to this release of keras_rq, or the class is your own: then import "
            "the module that registers it first."
        ) from error
    if quantizer is not None and not isinstance(quantizer, Quantizer):
        raise ValueError(f"A saved quantizer was expected. Received: {config!r}")
    return quantizer


def _checked_fields(config: Any, what: str, names: Sequence[str]) -> dict[str, Any]:
    version = config.get("version") if isinstance(config, dict) else config
    if version in _ADDED:
        added = {name: value for name, value in _ADDED[version].items() if name in names}
        config, version = {**added, **config}, _VERSION
    if version != _VERSION:
        raise ValueError(
            f"The saved form of {what} must have version {_VERSION}. Received: version={version!r}."
            " It was written by another release of keras_rq."
        )
    fields = {name: value for name, value in config.items() if name != "version"}
    if set(fields) != set(names):
        raise ValueError(
            f"The saved form of {what} must have the fields {sorted(names)}. "
            f"Received: {sorted(fields)}"
        )
    return fields

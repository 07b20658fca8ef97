"""Which layer gets which quantizer: shorthand, rules, policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import keras

from keras_rq import quantizers, shorthand
from keras_rq.quantizers import Quantizer

_VERSION = 4
# Fields that later versions added, with what their absence meant.
_ADDED = {
    1: {"forward": None, "matmuls": None, "fold_batch_norm": False},
    2: {"matmuls": None, "fold_batch_norm": False},
    3: {"fold_batch_norm": False},
}
_ADDED_TO_RULES = {1: {"matmuls": "inherit"}, 2: {"matmuls": "inherit"}}


@dataclass(frozen=True)
class LayerQuantization:
    """What one layer does with its operands; None leaves an operand in float.

    Attributes:
        weights: quantizer of the layer's kernels.
        activations: quantizer of the layer's inputs.
        forward: None, or "int8": the forward product runs on integers (see `QuantizationPolicy`).
        matmuls: quantizer of both operands of products of two activations.
        is_calibrated: whether the layer's variables hold ranges of its inputs.
        fold_batch_norm: the BatchNormalization behind the layer is folded into the kernel that is
            quantized (see `QuantizationPolicy`).
    """

    weights: Quantizer | None
    activations: Quantizer | None
    forward: str | None = None
    matmuls: Quantizer | None = None
    is_calibrated: bool = False
    fold_batch_norm: bool = False

    @property
    def without_input(self) -> LayerQuantization:
        """The same for a layer that multiplies no input."""
        return replace(self, activations=None)

    @property
    def label(self) -> str:
        """Bit widths in short: "A4W1", "W4", or "M8" for products of two activations."""
        operands = {"A": self.activations, "W": self.weights, "M": self.matmuls}
        return "".join(f"{letter}{q.bits}" for letter, q in operands.items() if q is not None)

    def get_config(self) -> dict[str, Any]:
        calibrated = {"is_calibrated": True} if self.is_calibrated else {}
        return calibrated | {
            "version": _VERSION,
            "weights": _serialize(self.weights),
            "activations": _serialize(self.activations),
            "forward": self.forward,
            "matmuls": _serialize(self.matmuls),
            "fold_batch_norm": self.fold_batch_norm,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerQuantization:
        names = ("weights", "activations", "forward", "matmuls", "fold_batch_norm")
        is_calibrated = isinstance(config, dict) and config.get("is_calibrated", False) is True
        if is_calibrated:
            config = {name: value for name, value in config.items() if name != "is_calibrated"}
        fields = _checked_fields(config, "a layer's quantization", names)
        others = {
            "forward": _check_forward(fields.pop("forward")),
            "fold_batch_norm": _check_fold(fields.pop("fold_batch_norm")),
        }
        operands = {name: _deserialize(value) for name, value in fields.items()}
        return cls(**operands, **others, is_calibrated=is_calibrated)


class Rule:
    """What the layers that match get instead of the policy's default.

    Args:
        match: a regular expression, searched in the layer's path, which `keras_rq.report` shows
            (what it lies in and its name, as `encoder/dense`); a layer class, by name, whose
            subclasses match too, and so does what lies inside such a layer (a MultiHeadAttention
            holds four EinsumDense); or a callable that takes the layer and returns a bool.
        weights: a quantizer, a bit width (then `Ridge`), or None for float. Left out: the policy's.
        activations: likewise.
        matmuls: quantizer of products of two activations; likewise.
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
        self.matmuls = matmuls if matmuls is ... else _check_matmuls(matmuls)
        self.skip = skip
        if skip and not (weights is ... and activations is ... and matmuls is ...):
            raise ValueError(
                "A rule with skip=True leaves its layers in float; it takes no quantizers. "
                f"Received: weights={weights!r}, activations={activations!r}, matmuls={matmuls!r}"
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
            "matmuls": _serialize(self.matmuls),
            "skip": self.skip,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rule:
        names = ("match", "weights", "activations", "matmuls", "skip")
        # A rule is saved within a policy, which has the version.
        config = {"version": _VERSION, **config} if isinstance(config, dict) else config
        fields = _checked_fields(config, "a rule", names)
        match = fields.pop("match")
        is_known = isinstance(match, dict) and set(match) in ({"path"}, {"class"})
        if not is_known or not all(isinstance(text, str) for text in match.values()):
            raise ValueError(
                "The 'match' of a saved rule must be {'path': pattern} or {'class': name}. "
                f"Received: {match!r}"
            )
        if not isinstance(fields["skip"], bool):
            raise ValueError(
                f"The 'skip' of a saved rule must be true or false. Received: {fields['skip']!r}"
            )
        found = match["path"] if "path" in match else _ClassNamed(match["class"])
        operands = ("weights", "activations", "matmuls")
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
            or fp4; N:M sparsity falls on the weights. The quantizers are `Ridge`, at up to two bits
            with fading gradients; ternary inputs have an offset; where both operands have one bit,
            or both two, both are rotated. `keras_rq.presets` has others.
        weights: quantizer of kernels, or a bit width; replaces what `spec` says.
        activations: quantizer of layer inputs, or a bit width; replaces what `spec` says. None
            leaves what `spec` says; for weights alone write "W4". A rotation that both operands
            have ends where one of them is replaced by something that is not rotated, here or in a
            rule.
        matmuls: quantizer of the products of two activations, or a bit width; both operands get it.
            In MultiHeadAttention and GroupedQueryAttention those are queries and keys, along the
            head, and probabilities and values, along the keys: the number of keys may be unknown,
            so that each row has one block there. `keras_rq.layers.Matmul` and `Einsum` are such
            products in a layer of one's own. None leaves them in float.
        rules: `Rule` objects; the first that matches a layer decides.
        forward: how products are computed while training. None: in float, from dequantized
            operands. "int8": on the integer units, from codes of up to 8 bits (Theorem 1 of
            arXiv 2409.09245); gradients are the same, the outputs equal up to rounding.
            `Dense` and `EinsumDense` have such products; others are named in a warning.
        fold_batch_norm: train the kernels that are deployed. `keras_rq.export` always makes a
            BatchNormalization part of the layer before it, `g = gamma / sqrt(variance + epsilon)`
            of the kernel and the rest of the bias, where that layer is a Dense, EinsumDense or
            convolution without an activation and all that it returns goes there. With True, what
            is quantized in training is that kernel, too, as in sec. 3.2.2 of arXiv 1806.08342: it
            is multiplied by `|g|` of the moving variance, quantized, and divided by `|g|` again.
            The BatchNormalization then normalizes as ever, in training by the batch: that is the
            paper's correction by both deviations, which keeps codes from jittering from batch to
            batch, without its switch to moving averages in the end. Gradients are those of the
            folded kernel. Kernels with statistics per channel, which is what a shorthand gives but
            for "-tensor", have the same values either way; a scale for the whole kernel, a learned
            step and unstructured sparsity do not. What cannot be folded is reported with the
            reason; a warning says so if that is all.

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
        fold_batch_norm: bool = False,
    ) -> None:
        self.forward = _check_forward(forward)
        self.fold_batch_norm = _check_fold(fold_batch_norm)
        weights, activations = quantizers.get(weights), quantizers.get(activations)
        if spec is not None:
            said = shorthand.read(spec, beside=(weights, activations))
            weights = said[0] if weights is None else weights
            activations = said[1] if activations is None else activations
        self.weights, self.activations = weights, activations
        self.matmuls = _check_matmuls(matmuls)
        super().__init__(self.weights, self.activations)
        self.rules = tuple(rules)
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"`rules` must hold keras_rq.Rule objects. Received: {rule!r}")
        operands = (self.weights, self.activations, self.matmuls)
        if all(quantizer is None for quantizer in operands) and not self.rules:
            raise ValueError(
                "A policy without quantizers and rules does nothing. Give a shorthand such as "
                "'A4W1', `weights=`, `activations=`, `matmuls=` or `rules=`."
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
        others = {"forward": self.forward, "fold_batch_norm": self.fold_batch_norm}
        if rule is None:
            operands = self.weights, self.activations
            return LayerQuantization(*operands, matmuls=self.matmuls, **others)
        if rule.skip:
            return LayerQuantization(None, None)
        operands = self.weights, self.activations
        return LayerQuantization(
            _with_rule(*operands, rule.weights, rule.activations),
            _with_rule(*operands[::-1], rule.activations, rule.weights),
            matmuls=self.matmuls if rule.matmuls is ... else rule.matmuls,
            **others,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "weights": _serialize(self.weights),
            "activations": _serialize(self.activations),
            "matmuls": _serialize(self.matmuls),
            "rules": [rule.get_config() for rule in self.rules],
            "forward": self.forward,
            "fold_batch_norm": self.fold_batch_norm,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationPolicy:
        names = ("weights", "activations", "matmuls", "rules", "forward", "fold_batch_norm")
        fields = _checked_fields(config, "a policy", names)
        if not isinstance(fields["rules"], (list, tuple)):
            raise ValueError(
                f"The 'rules' of a saved policy must be a list. Received: {fields['rules']!r}"
            )
        added = _ADDED_TO_RULES.get(config["version"], {})
        return cls(
            weights=_deserialize(fields["weights"]),
            activations=_deserialize(fields["activations"]),
            matmuls=_deserialize(fields["matmuls"]),
            rules=[
                Rule.from_config({**added, **rule} if isinstance(rule, dict) else rule)
                for rule in fields["rules"]
            ],
            forward=fields["forward"],
            fold_batch_norm=fields["fold_batch_norm"],
        )

    def __repr__(self) -> str:
        return (
            f"QuantizationPolicy(weights={self.weights!r}, activations={self.activations!r}, "
            f"matmuls={self.matmuls!r}, rules={list(self.rules)!r}, forward={self.forward!r}, "
            f"fold_batch_norm={self.fold_batch_norm!r})"
        )


def _with_rule(own: Any, other: Any, rule_for_own: Any, rule_for_other: Any) -> Quantizer | None:
    """One operand of a policy as a rule has it, given both of either.

    A rotation that the operands share ends where the rule replaces the other one by something that
    is not rotated: one operand alone would be rotated back before the product.
    """
    if rule_for_own is not ...:
        return rule_for_own
    if rule_for_other is ... or own is None or other is None or own.rotation is None:
        return own
    stays = rule_for_other is not None and rule_for_other.rotation == own.rotation
    return own if stays or other.rotation != own.rotation else own.replace(rotation=None)


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


def _check_fold(fold_batch_norm: Any) -> bool:
    if not isinstance(fold_batch_norm, bool):
        raise ValueError(
            "`fold_batch_norm` must be True or False. "
            f"Received: fold_batch_norm={fold_batch_norm!r}"
        )
    return fold_batch_norm


def _check_matmuls(matmuls: Any) -> Quantizer | None:
    quantizer = quantizers.get(matmuls)
    if quantizer is not None and quantizer.pattern is not None:
        raise ValueError(
            "`matmuls` quantizes activations, which have no weights to prune; leave out its "
            f"sparsity. Received: matmuls={matmuls!r}"
        )
    if quantizer is not None and quantizer.has_parameters:
        raise ValueError(
            "`matmuls` takes its statistics from the data at hand: it takes no quantizer that "
            "learns, or whose range is static, because the product has no variables to hold it. "
            f"Received: matmuls={matmuls!r}"
        )
    return quantizer


def _serialize(quantizer: Quantizer | EllipsisType | None) -> Any:
    if quantizer is ...:
        return "inherit"
    return keras.saving.serialize_keras_object(quantizer)


def _deserialize(config: Any) -> Any:
    if config == "inherit":
        return ...
    if config is None:
        return None
    # Nothing but classes that are registered already: Keras would import modules and, where a user
    # has switched its safe mode off, unpickle functions.
    name = config.get("registered_name") if isinstance(config, dict) else None
    cls = keras.saving.get_registered_object(name) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, Quantizer)):
        raise ValueError(
            f"A saved quantizer could not be read. Received: {config!r}. Its class is no quantizer "
            "that this release of keras_rq knows. If it is your own, import the module that "
            "registers it with Keras first."
        )
    try:
        return cls.from_config(dict(config["config"]))
    except Exception as error:  # whatever a quantizer makes of unknown or missing fields
        raise ValueError(
            f"A saved quantizer could not be read. Received: {config!r}. One of its fields is "
            f"unknown to this release of keras_rq, or missing, or has a wrong value: {error}"
        ) from error


def _checked_fields(config: Any, what: str, names: Sequence[str]) -> dict[str, Any]:
    version = config.get("version") if isinstance(config, dict) else config
    if isinstance(version, int) and version in _ADDED:
        added = {name: value for name, value in _ADDED[version].items() if name in names}
        config, version = {**added, **config}, _VERSION
    if version != _VERSION:
        raise ValueError(
            f"The saved form of {what} must have a version from 1 to {_VERSION}. Received: "
            f"version={version!r}. Load it with the release of keras_rq that wrote it, or a newer "
            "one."
        )
    fields = {name: value for name, value in config.items() if name != "version"}
    if set(fields) != set(names):
        raise ValueError(
            f"The saved form of {what} must have the fields {sorted(names)}. "
            f"Received: {sorted(fields)}"
        )
    return fields

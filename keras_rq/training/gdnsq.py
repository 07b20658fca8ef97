"""GDNSQ's training: a penalty that presses bit widths down to their targets, within plain `fit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rq import quantizers
from keras_rq.layers import parameters, paths
from keras_rq.layers.base import QuantizedLayer
from keras_rq.training.annealing import anneal, rate_at, rate_of
from keras_rq.training.surgery import forget_compiled_functions, quantized_layers

# How far below its target a width is pressed, and how much of an inactive penalty remains.
EPSILON = 1e-3
_PROGRESS = "training_gdnsq"


class GDNSQ(keras.callbacks.Callback):
    """Presses the bit widths of `keras_rq.quantizers.GDNSQ` down to their targets during `fit`.

    The exterior-point method of arXiv 2508.14004. To the loss `L` of every training batch it adds

        mean(L so far) * t * (m_w W + m_a A)

    where `W` is the mean over all blocks of all kernels of `max(0, width - (target - 0.001))`, `A`
    that over all inputs, and `m_w`, `m_a` are the shares of kernels' blocks and of inputs among
    those above. The temperature `t` is 0 for `warmup` batches, and then grows by `growth` a batch:
    widths come down gradually, while the network adapts. Once all codes fit their targets, which is
    looked at after every epoch, the learning rate is multiplied by `decay` a batch. (The warm-up of
    the learning rate itself, which the authors begin with, is the optimizer's schedule's.)

    All of it happens in the training step: it is compiled with it, and several steps per execution
    differ in nothing. What it knows (batches, mean loss, batches of decay) is a variable of the
    first such layer and saved with it, so that training goes on where it was. Step functions are
    compiled anew when training begins, and when widths have reached their targets or left them.

    Epochs log `bits_weights` and `bits_activations` (mean widths), `base_loss` (the mean of `L`)
    and `temperature`. Where the optimizer's rate is a plain number, it is a schedule afterwards.

    Args:
        warmup: batches before the penalty sets in.
        growth: of the temperature a batch; None: twice the learning rate, at the end of the
            warm-up where that is a schedule.
        decay: of the learning rate a batch, once all codes fit; 1 leaves it alone.

    Attributes:
        converged: whether all codes fit their targets.
        widths: the mean widths after every epoch, by layer and kernel: a list of
            `{"dense/kernel": {"weights": 4.2, "activations": 5.1}}`.

    Raises:
        ValueError: names the argument, the value received and what is accepted; when `fit` begins,
            also for a model without such a quantizer, or whose learning rate cannot be changed.
        RuntimeError: when an epoch ends and no training step has called the model's `compute_loss`.

    Example:

    >>> import keras, numpy as np, keras_rq as rq
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    >>> four = rq.quantizers.GDNSQ(4)
    >>> _ = rq.quantize(model, rq.QuantizationPolicy(weights=four, activations=four), verbose=False)
    >>> x, y = np.linspace(-1, 1, 512).reshape(64, 8), np.ones((64, 2))
    >>> _ = rq.calibrate(model, x, verbose=False)
    >>> model.compile(keras.optimizers.Adam(0.05), "mse")
    >>> gdnsq = rq.callbacks.GDNSQ(warmup=4, growth=1.0)
    >>> history = model.fit(x, y, batch_size=8, epochs=12, callbacks=[gdnsq], verbose=0)
    >>> history.history["bits_weights"][0] > 8.0, gdnsq.converged
    (True, True)
    """

    def __init__(
        self, *, warmup: int = 50, growth: float | None = None, decay: float = 0.9985
    ) -> None:
        super().__init__()
        is_count = isinstance(warmup, int) and not isinstance(warmup, bool)
        if not (is_count and warmup >= 0):
            raise ValueError(f"`warmup` must be an integer >= 0. Received: warmup={warmup!r}")
        if growth is not None and not (isinstance(growth, (int, float)) and 0 <= growth < np.inf):
            raise ValueError(
                f"`growth` must be a number >= 0, or None. Received: growth={growth!r}"
            )
        if not (isinstance(decay, (int, float)) and 0 < decay <= 1):
            raise ValueError(f"`decay` must be in (0, 1]. Received: decay={decay!r}")
        self.warmup, self.growth, self.decay = warmup, growth, decay
        self.converged = False
        self.widths: list[dict[str, dict[str, float]]] = []

    # What `fit` calls.

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        paths.complete(model)
        self._operands = _operands(model)
        self._progress = parameters.keep(self._operands[0].layer, _PROGRESS, (3,))
        # Now, because a rate that is a number is a variable of the optimizer, and a backup that is
        # restored when training begins must find as many variables as it was made of.
        if self.decay < 1 and getattr(model, "optimizer", None) is not None:
            anneal(model.optimizer, self.decay, 0, False)

    def on_train_begin(self, logs: Any = None) -> None:
        rate = rate_of(self.model.optimizer)
        self._growth = 2.0 * rate_at(rate, self.warmup) if self.growth is None else self.growth
        self._has_begun = self._has_stepped = False
        _penalise(self.model, self.add_penalty)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not when training begins: a callback that comes after this one may restore variables then.
        if not self._has_begun:
            self._has_begun = True
            self._batches, self._mean, self._annealed = self._read()
            self.converged = self._batches > 0 and self._has_converged()
            self._anneal()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._has_stepped = True

    def on_train_end(self, logs: Any = None) -> None:
        _release(self.model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        before, mean_before = self._batches, self._mean
        self._batches, self._mean, self._annealed = self._read()
        new = self._batches - before
        if self._has_stepped and self._batches == 0:
            raise RuntimeError(
                f"No training step of model {self.model.name!r} has called `compute_loss`, where "
                "GDNSQ adds its penalty: bit widths stay as they are. Let `train_step` take its "
                "loss from `self.compute_loss(x, y, y_pred, sample_weight, training=True)`."
            )
        self._log(logs, (self._mean * self._batches - mean_before * before) / max(new, 1.0))
        was, self.converged = self.converged, self._has_converged()
        if self.converged != was:
            self._anneal()
            self.model.make_train_function(force=True)

    def _read(self) -> list[float]:
        return [float(value) for value in ops.convert_to_numpy(self._progress)]

    def _has_converged(self) -> bool:
        return all(operand.fits() for operand in self._operands)

    def _anneal(self) -> None:
        if self.decay < 1 and (self.converged or self._annealed):
            anneal(self.model.optimizer, self.decay, int(self._annealed), self.converged)

    def _log(self, logs: dict[str, Any] | None, base_loss: float) -> None:
        widths: dict[str, dict[str, float]] = {}
        means: dict[str, list[np.ndarray]] = {}
        for operand in self._operands:
            found = ops.convert_to_numpy(operand.width()).reshape(-1)
            widths.setdefault(operand.path, {})[operand.kind] = float(found.mean())
            means.setdefault(operand.kind, []).append(found)
        self.widths.append(widths)
        if logs is not None:
            for kind, values in means.items():
                logs[f"bits_{kind}"] = float(np.concatenate(values).mean())
            logs["base_loss"] = base_loss
            logs["temperature"] = self._growth * max(self._batches - self.warmup, 0.0)

    # What the training step does.

    def add_penalty(self, loss: Any) -> Any:
        """The loss of a training batch with the penalty; takes note of the batch."""
        base = ops.cast(ops.stop_gradient(loss), "float32")
        batches, mean, annealed = ops.unstack(ops.convert_to_tensor(self._progress))
        temperature = self._growth * ops.maximum(batches - float(self.warmup), 0.0)
        # The authors count one batch more than there were.
        scale = mean * batches / (batches + 1.0)
        excess = {"weights": [], "activations": []}
        for operand in self._operands:
            above = operand.width() - (operand.quantizer.target - EPSILON)
            excess[operand.kind].append(ops.reshape(ops.relu(above), (-1,)))
        penalty = exterior_penalty(*(ops.concatenate(e) if e else None for e in excess.values()))
        # A step that loss scaling will skip is counted, and its loss is not.
        change = ops.where(ops.isfinite(base), base - mean, 0.0)
        mean = mean + change / (batches + 1.0)
        annealed = annealed + float(self.converged)
        self._progress.assign(ops.stack([batches + 1.0, mean, annealed]))
        return loss + ops.cast(scale * temperature * penalty, loss.dtype)


def exterior_penalty(weights: Any, activations: Any) -> Any:
    """`m_w W + m_a A` of arXiv 2508.14004.

    Args:
        weights: float32 vector: by how many bits every block of kernels lies above its target, 0
            where it does not; None without.
        activations: likewise of inputs.

    Returns:
        A float32 scalar.
    """
    given = [excess for excess in (weights, activations) if excess is not None]
    active = [ops.sum(ops.cast(excess > 0.0, "float32")) for excess in given]
    shares = [(one + EPSILON) / (sum(active) + EPSILON) for one in active]
    return sum(share * ops.mean(excess) for share, excess in zip(shares, given, strict=True))


@dataclass(frozen=True)
class _Operand:
    """A kernel or an input whose width is trained."""

    layer: QuantizedLayer
    name: str
    kind: str

    @property
    def path(self) -> str:
        return f"{self.layer.path}/{self.name}"

    @property
    def quantizer(self) -> quantizers.GDNSQ:
        return getattr(self.layer.quantization, self.kind)

    def width(self) -> Any:
        """One width for every block of a kernel, or of the input; with their gradient."""
        if self.kind == "activations":
            return self.quantizer.input_width(self.layer.input_parameters(self.name))
        blocks = self.layer.products()[self.name].kernel_blocks(self.quantizer)
        kernel = self.quantizer.rotate(self.layer.kernel_to_quantize(self.name), blocks)
        view = blocks.view(tuple(kernel.shape))
        given = self.layer.kernel_parameters(self.name)
        return self.quantizer.kernel_width(view.split(kernel), view, given)

    def fits(self) -> bool:
        of_kernel, of_input = self.layer.bits_now(self.name)
        return (of_kernel if self.kind == "weights" else of_input) == self.quantizer.bits


def _operands(model: keras.Model) -> list[_Operand]:
    found = []
    for layer in quantized_layers(model):
        for name in layer.products():
            of = parameters.of_kernel(layer, name)
            for kind, variables in (("weights", of.weights), ("activations", of.inputs)):
                is_ours = isinstance(getattr(layer.quantization, kind), quantizers.GDNSQ)
                if is_ours and variables and variables["log_step"].trainable:
                    found.append(_Operand(layer, name, kind))
    if not found:
        raise ValueError(
            f"Model {model.name!r} has no width to train: no trainable layer has a "
            "keras_rq.quantizers.GDNSQ. Quantize it first, with "
            "QuantizationPolicy(weights=GDNSQ(4), activations=GDNSQ(4)), for example."
        )
    return found


def _penalise(model: keras.Model, add: Callable[[Any], Any]) -> None:
    """Lets `add` have the loss of training batches, until `_release`."""
    _release(model)  # an interrupted `fit` ends without saying so
    original, takes_training = model.compute_loss, model._compute_loss_has_training_arg

    def compute_loss(
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        told = {"training": training} if takes_training else {}
        loss = original(x, y, y_pred, sample_weight, **told)
        return add(loss) if training else loss

    model.__dict__["compute_loss"] = compute_loss
    model.__dict__["_rq_takes_training"] = takes_training
    model._compute_loss_has_training_arg = True
    model.make_train_function(force=True)


def _release(model: keras.Model) -> None:
    if "_rq_takes_training" in model.__dict__:
        model._compute_loss_has_training_arg = model.__dict__.pop("_rq_takes_training")
        del model.__dict__["compute_loss"]
        forget_compiled_functions(model)

"""Train Keras models that survive 1-bit and sparse arithmetic, then run them as integers."""

from keras_rq import callbacks, distillation, layers, ops, presets, quantizers
from keras_rq.api import dequantize, quantize
from keras_rq.api import install as _install
from keras_rq.export.api import export
from keras_rq.layers.registration import register_layer
from keras_rq.policy import QuantizationPolicy, Rule
from keras_rq.quantizers.tensor import QuantizedTensor
from keras_rq.reports.frontier import plot_frontier
from keras_rq.reports.report import Report, report
from keras_rq.training.calibration import calibrate

__version__ = "0.1.0"
__all__ = [
    "QuantizationPolicy",
    "QuantizedTensor",
    "Report",
    "Rule",
    "calibrate",
    "callbacks",
    "dequantize",
    "distillation",
    "export",
    "layers",
    "ops",
    "plot_frontier",
    "presets",
    "quantize",
    "quantizers",
    "register_layer",
    "report",
]

_install()

"""From a trained quantized model to files that run as integers."""

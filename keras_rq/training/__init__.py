"""From a float model to a trainable quantized one."""

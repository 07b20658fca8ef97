"""What a quantized model costs, layer by layer."""

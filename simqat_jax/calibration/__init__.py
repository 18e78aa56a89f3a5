"""From a trained float model to a quantized one without training."""

"""Why accuracy moved: which tensor, and which layer, quantization hurts."""

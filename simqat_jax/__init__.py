"""Quantization-aware training of Flax (linen) models."""

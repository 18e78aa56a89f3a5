"""Experiments with simqat_jax: models, data, training and evaluation."""

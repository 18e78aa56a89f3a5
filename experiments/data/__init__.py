"""Data sets behind one interface, `ImageData`: arrays in memory or streams."""

from experiments.data.batches import ALL, Batch, ImageData, MaskedBatch, Rows, Transform, in_batches
from experiments.data.sets import NAMES, Dataset, cache_dir, check_name, load, split_stratified

__all__ = [
    "ALL",
    "NAMES",
    "Batch",
    "Dataset",
    "ImageData",
    "MaskedBatch",
    "Rows",
    "Transform",
    "cache_dir",
    "check_name",
    "in_batches",
    "load",
    "split_stratified",
]

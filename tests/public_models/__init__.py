"""Small models of the kinds that people publish, and what quantization makes of each.

The table of the documentation: `cd tests && ../.venv/bin/python -m public_models`.
"""

from public_models import attention, convolutional, others
from public_models.kinds import Public

MODELS: dict[str, Public] = {**convolutional.MODELS, **attention.MODELS, **others.MODELS}

__all__ = ["MODELS", "Public"]

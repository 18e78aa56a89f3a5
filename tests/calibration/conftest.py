"""A calibrated model that several files look at."""

from typing import Any

import jax
import numpy as np
import pytest
from small_model import Calibrated, Small, few_bits

import simqat_jax as sq


@pytest.fixture(scope="session")
def small() -> Calibrated:
    rng = np.random.default_rng(3)
    x = rng.gamma(1.0, size=(24, 4, 4, 3)).astype(np.float32)
    qmodel = sq.SimQAT(few_bits()).apply(Small())
    floats: Any = Small().init(jax.random.key(0), x)
    # Statistics and scales as training leaves them.
    floats["batch_stats"]["BatchNorm_0"] = {
        "mean": rng.normal(size=6).astype(np.float32),
        "var": rng.gamma(2.0, size=6).astype(np.float32),
    }
    floats["params"]["BatchNorm_0"]["scale"] = rng.normal(size=6).astype(np.float32)
    quiet = {"progress": False, "train": False}
    return Calibrated(qmodel, floats, sq.calibrate(qmodel, floats, [x], **quiet), x, quiet)

"""`python -m experiments.train` with a config of seconds, `--config tiny`."""

import os
import resource
import signal

import flax.linen as nn
import jax
import numpy as np

from experiments import configs, data, train
from experiments.errors import run_or_exit


class Tiny(nn.Module):
    """A convolution with BatchNorm, and a dense layer."""

    num_classes: int = 2
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


def dataset(train: int = 96, test: int = 20) -> data.Dataset:
    """Dark images of class 0, bright images of class 1; of another seed where TINY_DATA is set."""
    rng = np.random.default_rng(int(os.environ.get("TINY_DATA", "0")))
    labels = rng.integers(0, 2, train + test).astype(np.int32)
    noise = rng.random((train + test, 6, 6, 1), np.float32)
    images = noise * np.float32(0.5) + np.float32(0.5) * labels[:, None, None, None]
    return data.Dataset(
        name="tiny",
        train_images=images[:train],
        train_labels=labels[:train],
        test_images=images[train:],
        test_labels=labels[train:],
        num_classes=2,
    )


def experiment() -> configs.Experiment:
    """The config."""
    return configs.Experiment(
        config="tiny",
        model=Tiny,
        data="mnist5k",
        batch_size=16,
        epochs=3,
        learning_rate=0.05,
        schedule="cosine",
        test_batch_size=8,
    )


def main() -> None:
    """Run the command with this config and data; TINY_FILE_LIMIT stands for a full disk."""
    if limit := int(os.environ.get("TINY_FILE_LIMIT", "0")):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    configs.CONFIGS["tiny"] = experiment
    setattr(data, "load", lambda *_: dataset())  # noqa: B010  # a function, replaced on purpose
    run_or_exit(train.main, "The same command with --resume continues the run.")


if __name__ == "__main__":
    main()

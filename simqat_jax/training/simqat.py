"""SimQAT: wrap a Flax module so that it trains and evaluates with simulated quantization."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn

from simqat_jax.config import SimQATConfig
from simqat_jax.numerics.arguments import shown
from simqat_jax.training.module import QuantizedModule
from simqat_jax.training.network import short


class SimQAT:
    """Simulated quantization-aware training.

    Args:
      config: what to quantize and how; `SimQATConfig()` by default.

    Raises:
      TypeError: `config` is no SimQATConfig.

    Examples:
      >>> qmodel = SimQAT(SimQATConfig()).apply(nn.Dense(10))
      >>> variables = qmodel.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> sorted(variables["quant_stats"])
      ['input', 'output', 'step']
    """

    def __init__(self, config: SimQATConfig | None = None):
        config = SimQATConfig() if config is None else config
        if not isinstance(config, SimQATConfig):
            raise TypeError(
                f"SimQAT takes a SimQATConfig, got {shown(config)} of type "
                f"{type(config).__name__}. {_remedy(config)}"
            )
        self.config = config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({short(self.config)})"

    def apply(self, module: nn.Module, *, name: str | None = None) -> "QuantizedModule":
        """Return a module that computes `module` with simulated quantization.

        Its `params` (and `batch_stats`) have the tree, the names and, for one key, the initial
        values of the float module's; the new collection `quant_stats` holds the ranges.

        Args:
          module: any linen module; it is not changed.
          name: its name inside a surrounding module's compact method.

        Raises:
          TypeError: `module` is no linen Module instance.
          ValueError: it is bound to variables, or is already quantization-aware.
        """
        if _is_nnx(module):
            name = getattr(module, "__name__", type(module).__name__)
            raise TypeError(
                f"SimQAT.apply takes modules of flax.linen alone, and {name} is one of flax.nnx. "
                "Write the model as a flax.linen Module."
            )
        if isinstance(module, type) or not isinstance(module, nn.Module):
            remedy = f" Construct it: {module.__name__}(...)." if isinstance(module, type) else ""
            if isinstance(module, Mapping):
                remedy = " These may be its variables: the module comes first."
            raise TypeError(
                "SimQAT.apply takes an instance of a flax.linen Module, got "
                f"{shown(module)}.{remedy}"
            )
        if isinstance(module, QuantizedModule):
            raise ValueError("SimQAT was applied twice: the module is already quantization-aware.")
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a string or None, got {name!r}.")
        if module.scope is not None:
            raise ValueError(
                f"SimQAT.apply takes an unbound module, and this {type(module).__name__} is bound "
                "to variables. Apply it to the module as constructed, before bind or setup; inside "
                "a compact method, construct the module with parent=None."
            )
        return QuantizedModule(module, self.config, name=name)


SimulatedQuantizationAwareTraining = SimQAT
"""`SimQAT` under the full name that MindSpore Golden Stick uses."""


class LearnedStepSizeQuantizationAwareTraining(SimQAT):
    """`SimQAT` with learned steps (LSQ), under the name that MindSpore Golden Stick uses.

    `SimQAT` of the same configuration with `observer="learned"` for weights and activations. The
    steps are the collection `quant_params`, which is trained as `params` are:

    1. Set them from data: by `calibrate` where parameters are trained; or by a call with
       `mutable=["batch_stats", "quant_stats", "quant_params"]`; with a `quant_delay` by one,
       when that is over.
    2. Train `params` and `quant_params`, with `mutable=["batch_stats", "quant_stats"]`.

    Args:
      config: all else; `SimQATConfig()` by default.

    Raises:
      TypeError: `config` is no SimQATConfig.

    Examples:
      >>> qmodel = LearnedStepSizeQuantizationAwareTraining().apply(nn.Dense(10))
      >>> variables = qmodel.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> sorted(variables["quant_params"])
      ['input', 'kernel', 'output']

    Source:
      Esser et al., arXiv:1902.08153.
    """

    def __init__(self, config: SimQATConfig | None = None):
        config = SimQAT(config).config
        weight, activation = (
            dataclasses.replace(spec, observer="learned")
            for spec in (config.weight, config.activation)
        )
        super().__init__(dataclasses.replace(config, weight=weight, activation=activation))


def _remedy(config: object) -> str:
    if isinstance(config, nn.Module):
        return "Write SimQAT().apply(model)."
    return "Write SimQAT(SimQATConfig(weight_bits=4)), for example, or SimQAT()."


def _is_nnx(module: object) -> bool:
    """Whether it is a module of flax.nnx, or such a class; without an import of that."""
    classes = (module if isinstance(module, type) else type(module)).__mro__
    return any(c.__module__.startswith("flax.nnx") for c in classes)

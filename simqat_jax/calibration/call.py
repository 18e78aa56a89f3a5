"""The call that calibration makes of a model: the one of evaluation."""

import dataclasses
from collections.abc import Hashable

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from simqat_jax.capture import Capture
from simqat_jax.ir.plan import Placement
from simqat_jax.numerics.arguments import check_kind, check_mapping
from simqat_jax.training.module import Kwargs, Method, QuantizedModule, trace
from simqat_jax.training.planner import place_quantizers
from simqat_jax.training.ranges import (
    COLLECTION,
    STEP,
    Stats,
    check,
    initial,
    ranges_and_steps,
    restored,
)


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationCall:
    """How a model is called in evaluation.

    Attributes:
      qmodule: the quantized model.
      method: of the float model; None: its `__call__`.
      kwargs: keyword arguments, the same for every batch.

    Raises:
      TypeError: no QuantizedModule.
    """

    qmodule: QuantizedModule
    method: Method
    kwargs: Kwargs

    def __post_init__(self) -> None:
        check_kind(
            "qmodule", self.qmodule, QuantizedModule, "SimQAT(...).apply(model) returns one."
        )

    def captured(self, variables: VariableDict, args: tuple) -> Capture:
        """Trace the call; nothing that it would update is.

        Raises:
          ValueError: what the call itself raises; it is one of training.
        """
        try:
            captured = self._traced(variables, args)
        except flax.errors.InvalidRngError as error:
            raise ValueError(_TRAINS.format(path="the model")) from error
        except Exception as error:  # the model's own: nothing tells labels from an argument
            if len(args) > 1:
                error.add_note(_SEVERAL.format(count=len(args)))
            raise
        training = [n.where for n in captured.graph.nodes if n.only_training]
        if training:
            raise ValueError(_TRAINS.format(path=training[0]))
        return captured

    def _traced(self, variables: VariableDict, args: tuple) -> Capture:
        call = (self.qmodule, variables, args, self.kwargs, self.method)
        try:
            return trace(*call, rngs={}, mutable=[])
        except flax.errors.ModifyScopeVariableError:  # the model does, whatever the mode
            return trace(*call, rngs={})

    def planned(self, captured: Capture) -> Placement:
        """Place its quantizers."""
        return place_quantizers(captured.graph, self.qmodule.config)

    def arrays(self, args: tuple) -> tuple[list[jax.Array], Hashable]:
        """Return the call's arrays, and what calls that have one plan have in common."""
        leaves = jax.tree.leaves((args, dict(self.kwargs)))
        key = tuple((np.shape(x), x.dtype) if hasattr(x, "dtype") else x for x in leaves)
        return [jnp.asarray(x) for x in leaves if hasattr(x, "dtype")], key

    def observed(self, variables: VariableDict, args: tuple) -> tuple[Placement, Stats]:
        """Return the plan and the state of every range.

        Raises:
          ValueError: as `captured`; a range is missing, or was never observed.
        """
        placement = self.planned(self.captured(variables, args))
        return placement, check(placement, *ranges_and_steps(variables))

    def start(self, variables: VariableDict, args: tuple) -> tuple[Placement, Stats]:
        """Return the plan and the state of every range; create what is missing.

        Learned steps are none yet, whatever they were.
        """
        held = variables.get(COLLECTION, {})
        check_mapping(COLLECTION, held, "Pass the collection that init and apply return.")
        placement = self.planned(self.captured(variables, args))
        new = {name: initial(q) for name, q in placement.stateful.items()}
        none = {name: observer.init().step for name, observer in placement.learned.items()}
        known = restored(placement, held, none)
        return placement, {STEP: initial(None), **new, **held, **known}


_TRAINS = (
    "{path}: calibration makes the call of evaluation, and here it drops out values or uses batch "
    "statistics. Pass the arguments of evaluation, such as train=False, deterministic=True or "
    "use_running_average=True."
)
_SEVERAL = (
    "The batch is a tuple of {count}: these are the positional arguments of the call. Where one of "
    "them is labels, leave them out: [x for x, y in batches]."
)

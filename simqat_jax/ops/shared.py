"""What a layer's arrays take to compute is spent once: most of it goes into compiling."""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.typing import ArrayLike

Arrays = dict[str, np.ndarray]
"""Of a deployed layer, by name."""

_LARGE = 2**20
"""Numbers in operands that take longer in code without optimization than it takes to compile."""


@functools.cache
def _options(large: bool) -> Mapping[str, bool | int]:
    """Return options with which XLA compiles quickly what runs once or a few times.

    In a fifth of the time, or two thirds of it where operands are large; none where there is
    another compiler or one that does not know them. What is computed is exact by construction: its
    bits are the same with all of them.
    """
    if jax.default_backend() != "cpu":
        return {}
    plain = {} if large else {"xla_backend_optimization_level": 0}
    options = {
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
        **plain,
    }
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except JaxRuntimeError:
        return {}
    return options


class SharedLayers:
    """Computes the arrays of layers.

    Layers that are alike share a compiled function; two lowerings of one model, which have the same
    operands, the arrays.
    """

    def __init__(self) -> None:
        self._functions: dict[Hashable, Callable[..., dict[str, jax.Array]]] = {}
        # With the operands, so that their ids stay theirs.
        self._known: dict[Hashable, tuple[object, Arrays]] = {}

    def arrays(
        self,
        alike: Hashable,
        function: Callable[..., dict[str, jax.Array]],
        operands: Sequence[Mapping[str, ArrayLike]],
        numbers: Sequence[ArrayLike],
        arguments: Callable[[], Sequence[object]],
    ) -> Arrays:
        """Return what a function computes of a layer.

        Args:
          alike: equal for layers whose function is the same.
          function: the layer's.
          operands: the arrays that are computed from, for another call the same objects.
          numbers: few of them, likewise, compared by their values.
          arguments: makes the function's arguments of both.
        """
        values = tuple(np.asarray(n).tobytes() for n in numbers)
        leaves, structure = jax.tree.flatten(operands)
        key = (alike, structure, tuple(map(id, leaves)), values)
        if key not in self._known:
            compiled = self._compiled(alike, function, sum(math.prod(np.shape(x)) for x in leaves))
            self._known[key] = operands, jax.device_get(compiled(*arguments()))
        return dict(self._known[key][1])

    def _compiled(
        self, alike: Hashable, function: Callable[..., dict[str, jax.Array]], size: int
    ) -> Callable[..., dict[str, jax.Array]]:
        large = size >= _LARGE
        if (alike, large) not in self._functions:
            options = dict(_options(large))
            self._functions[alike, large] = jax.jit(function, compiler_options=options)
        return self._functions[alike, large]

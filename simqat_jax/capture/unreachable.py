"""Products with a kernel that stand where they cannot be quantized: in loops and branches."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from simqat_jax.capture.interception import Recorder, Scope
from simqat_jax.capture.passes import dependent
from simqat_jax.capture.unroll import MAX_STEPS, Loop, steps_of
from simqat_jax.ir.graph import CONTRACTIONS, Graph, Unquantizable
from simqat_jax.rules import left_out


class Origin(NamedTuple):
    """What a value depends on.

    Attributes:
      arguments: on the model's arguments.
      parameters: on its parameters.
    """

    arguments: bool = False
    parameters: bool = False

    def joined(self, other: "Origin") -> "Origin":
        """Return what a value depends on that is made of two."""
        return Origin(self.arguments or other.arguments, self.parameters or other.parameters)


class Inside(NamedTuple):
    """A product inside of a call.

    Attributes:
      path: of its module.
      outermost: of the outermost module that the call calls for it.
    """

    path: tuple[str, ...]
    outermost: tuple[str, ...]


def unreachable_products(graph: Graph, recorder: Recorder) -> tuple[Unquantizable, ...]:
    """Return the products of data and parameters inside of what stays a call, each path once."""
    fed = dependent(graph.nodes, graph.arguments)
    trained = dependent(graph.nodes, graph.parameters)
    found: dict[tuple[str, ...], Unquantizable] = {}
    for node in graph.nodes:
        if node.layer is None and list(core.jaxprs_in_params(node.eqn.params)):
            origins = [Origin(v in fed, v in trained) for v in node.inputs]
            inside = products_inside(node.eqn, origins, Scope(node.path, None), recorder)
            found.update((p.path, Unquantizable(p.path, _reason(node.eqn))) for p in inside)
    return tuple(found.values())


def _reason(eqn: core.JaxprEqn) -> str:
    reason = f"it is called inside `{eqn.primitive.name}`"
    if eqn.primitive.name == "scan" and steps_of(eqn) > MAX_STEPS:
        return f"{reason} of {steps_of(eqn)} steps, and at most {MAX_STEPS} are unrolled"
    return reason


def products_inside(
    eqn: core.JaxprEqn, inputs: Sequence[Origin], scope: Scope, recorder: Recorder
) -> list[Inside]:
    """Return the products of data and parameters inside of an equation.

    Args:
      eqn: the equation.
      inputs: what each of its operands depends on.
      scope: where it stands.
      recorder: knows the scopes, and which products are left out.
    """
    search = _Search(recorder)
    search.call(eqn, inputs, [scope])
    return search.found


class _Search:
    """Looks for products inside of one equation, which stands in the first scope of each list."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.found: list[Inside] = []

    def call(
        self, eqn: core.JaxprEqn, inputs: Sequence[Origin], scopes: Sequence[Scope]
    ) -> Sequence[Origin]:
        """Search what an equation calls; return the origins of what it returns."""
        if eqn.primitive.name == "scan":
            return self.scan(eqn, inputs, scopes)
        results: list[Sequence[Origin]] = [
            self.jaxpr(sub, _at_entry(eqn, sub, inputs), scopes)
            for sub in core.jaxprs_in_params(eqn.params)
        ]
        if len(results) == 1 and len(results[0]) == len(eqn.outvars):
            return results[0]
        return [_joined(inputs)] * len(eqn.outvars)

    def scan(
        self, eqn: core.JaxprEqn, inputs: Sequence[Origin], scopes: Sequence[Scope]
    ) -> Sequence[Origin]:
        """Search a loop until what it carries depends on nothing more."""
        loop, inputs = Loop(eqn), list(inputs)
        while True:
            outputs = self.jaxpr(loop.closed.jaxpr, inputs, scopes)
            before = inputs[loop.constants : loop.read_whole]
            carry = [a.joined(b) for a, b in zip(before, outputs, strict=False)]
            if carry == before:
                return outputs
            inputs[loop.constants : loop.read_whole] = carry

    def jaxpr(
        self, jaxpr: core.Jaxpr, inputs: Sequence[Origin], scopes: Sequence[Scope]
    ) -> Sequence[Origin]:
        origins = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(v: core.Var | core.Literal) -> Origin:
            return Origin() if isinstance(v, core.Literal) else origins.get(v, Origin())

        for eqn in jaxpr.eqns:
            at = [*scopes, *self.recorder.scopes_of(eqn)]
            operands = list(map(read, eqn.invars))
            if eqn.primitive.name in CONTRACTIONS:
                self.contraction(operands, at)
            origins.update(zip(eqn.outvars, self.call(eqn, operands, at), strict=True))
        return list(map(read, jaxpr.outvars))

    def contraction(self, operands: Sequence[Origin], scopes: Sequence[Scope]) -> None:
        kernels = [o for o in operands if not o.arguments]
        if len(kernels) != 1 or not kernels[0].parameters:
            return
        path = scopes[-1].path
        if left_out(self.recorder.rules, path) is None:
            self.found.append(Inside(path, scopes[:2][-1].path))


def _joined(origins: Sequence[Origin]) -> Origin:
    whole = Origin()
    for origin in origins:
        whole = whole.joined(origin)
    return whole


def _at_entry(eqn: core.JaxprEqn, sub: core.Jaxpr, inputs: Sequence[Origin]) -> Sequence[Origin]:
    """Return the origins of what a called function takes; what a loop carries is all one."""
    whole, params = _joined(inputs), eqn.params
    match eqn.primitive.name:
        case "while":
            conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
            consts = inputs[:conditions]
            if sub is params["body_jaxpr"].jaxpr:
                consts = inputs[conditions : conditions + bodies]
            return [*consts, *[whole] * (len(sub.invars) - len(consts))]
        case "cond":
            return inputs[1:]
    same = len(sub.invars) == len(inputs)
    return inputs if same else [whole] * len(sub.invars)

"""Products with a kernel that stand where they cannot be quantized: in loops and branches."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from simqat_jax.capture.classify import CONTRACTIONS
from simqat_jax.capture.interception import Recorder, Scope, excluded
from simqat_jax.capture.passes import dependent
from simqat_jax.ir.graph import Graph, Node, Unquantizable


class _Origin(NamedTuple):
    """What a value depends on."""

    arguments: bool = False
    parameters: bool = False

    def joined(self, other: "_Origin") -> "_Origin":
        return _Origin(self.arguments or other.arguments, self.parameters or other.parameters)


def unreachable_products(graph: Graph, recorder: Recorder) -> tuple[Unquantizable, ...]:
    """Return the products of data and parameters inside of what stays a call, each path once."""
    fed = dependent(graph.nodes, graph.arguments)
    trained = dependent(graph.nodes, graph.parameters)
    found: dict[tuple[str, ...], Unquantizable] = {}
    for node in graph.nodes:
        if node.layer is None and list(core.jaxprs_in_params(node.eqn.params)):
            origins = [_Origin(v in fed, v in trained) for v in node.inputs]
            search = _Search(recorder, node)
            search.call(node.eqn, origins, Scope(node.path, None))
            found.update((u.path, u) for u in search.found)
    return tuple(found.values())


class _Search:
    """Looks for products inside of one node."""

    def __init__(self, recorder: Recorder, node: Node):
        self.recorder = recorder
        self.where = node.primitive
        self.found: list[Unquantizable] = []

    def call(self, eqn: core.JaxprEqn, inputs: list[_Origin], scope: Scope) -> _Origin:
        """Search what an equation calls; return the origin of all that it returns."""
        whole = _joined(inputs)
        for sub in core.jaxprs_in_params(eqn.params):
            self.jaxpr(sub, _at_entry(eqn, sub, inputs), scope)
        return whole

    def jaxpr(self, jaxpr: core.Jaxpr, inputs: Sequence[_Origin], scope: Scope) -> None:
        origins = dict(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            at = self.recorder.scope_of(eqn, scope)
            operands = [
                _Origin() if isinstance(v, core.Literal) else origins.get(v, _Origin())
                for v in eqn.invars
            ]
            if eqn.primitive.name in CONTRACTIONS:
                self.contraction(operands, at)
            result = self.call(eqn, operands, at)
            origins.update(dict.fromkeys(eqn.outvars, result))

    def contraction(self, operands: Sequence[_Origin], scope: Scope) -> None:
        kernels = [o for o in operands if not o.arguments]
        if len(kernels) != 1 or not kernels[0].parameters:
            return
        if not excluded(scope.path, self.recorder.exclude):
            self.found.append(Unquantizable(scope.path, f"it is called inside `{self.where}`"))


def _joined(origins: Sequence[_Origin]) -> _Origin:
    whole = _Origin()
    for origin in origins:
        whole = whole.joined(origin)
    return whole


def _at_entry(eqn: core.JaxprEqn, sub: core.Jaxpr, inputs: list[_Origin]) -> list[_Origin]:
    """Return the origins of what a called function takes; what a loop carries is all one."""
    whole, params = _joined(inputs), eqn.params
    match eqn.primitive.name:
        case "scan":
            start = params["num_consts"]
            stop = start + params["num_carry"]
            return [*inputs[:start], *[whole] * params["num_carry"], *inputs[stop:]]
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

"""A training step that is compiled once and called again and again."""

from typing import Any

import flax.linen as nn
import jax
import optax

State = tuple[Any, dict[str, Any], optax.OptState]
"""Parameters, other collections and the optimizer's state."""
Batch = tuple[jax.Array, jax.Array]
"""Images and labels."""


class Trainer:
    """A model with momentum SGD, whose compiled step is called again and again."""

    def __init__(
        self,
        model: nn.Module,
        image: tuple[int, int, int],
        batch_size: int,
        *,
        init_compiled: bool = True,
    ):
        self.model = model
        keys = jax.random.split(jax.random.key(0), 3)
        self.batch = (
            jax.random.normal(keys[0], (batch_size, *image)),
            jax.random.randint(keys[1], (batch_size,), 0, 10),
        )
        self.optimizer = optax.sgd(0.01, momentum=0.9)
        self._init = jax.jit(model.init) if init_compiled else model.init
        self._key = keys[2]
        self.state = self.first()

    def first(self) -> State:
        """Return a state before the first step, always the same one."""
        variables = dict(self._init(self._key, self.batch[0]))
        params = variables.pop("params")
        return params, variables, self.optimizer.init(params)

    def step(self, state: State, batch: Batch) -> tuple[State, jax.Array]:
        """Take one optimizer step on a batch; return the new state and the loss."""
        params, collections, opt_state = state
        images, labels = batch

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = self.model.apply(
                {"params": params, **collections}, images, train=True, mutable=list(collections)
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        deltas, opt_state = self.optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, deltas), {**collections, **updates}, opt_state), loss

    def trace(self) -> None:
        """Trace the step and lower it, from the beginning."""
        jax.clear_caches()
        self.lowered = jax.jit(self.step, donate_argnums=0).lower(self.state, self.batch)

    def compile(self) -> None:
        """Compile what has been traced."""
        self.compiled = self.lowered.compile()

    def __call__(self) -> jax.Array:
        """Run the compiled step once; return the loss, not waited for."""
        self.state, loss = self.compiled(self.state, self.batch)
        return loss

"""From a graph to values: plan, simulate, evaluate."""

"""Three forms of a model, as data: Graph, Placement, Program."""

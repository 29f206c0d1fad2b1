"""From a sub-graph or an optimizer to one flat graph of core ATen calls."""

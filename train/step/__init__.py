"""One training step: loss, gradients, selection, update."""

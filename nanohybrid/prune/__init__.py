"""Pruning: importance from activations, which entries of each axis to keep, and cutting every parameter to
them (paper, section 4.2)."""

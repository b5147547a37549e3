"""Tensor parallelism: every matrix is split over the tp ranks, activations between blocks along tokens."""

"""Hand-written kernels, by target. They know metrics and arrays, and nothing of backends."""

"""The training loop, its metrics and `verify`."""

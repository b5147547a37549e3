"""Planners: which ranks share which sequences. Pure: no torch, no clock, no file system."""

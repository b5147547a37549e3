"""Checkpoints of Megatron-core's GPT models as a source of weights."""

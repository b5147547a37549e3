"""Tensors in files: safetensors headers, pieces of tensors, checksums, folders here or elsewhere."""

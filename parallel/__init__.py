"""How work is split: mesh, layouts, collectives, attention over a split sequence, FSDP. Knows nothing of longctx."""

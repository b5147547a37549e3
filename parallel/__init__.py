"""How work is split: mesh, layouts, collectives, attention over split sequences, FSDP."""

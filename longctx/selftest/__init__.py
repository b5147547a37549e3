"""The parity matrix: every legal combination of axes against one process, on the machine at hand."""

"""The verbs of `python -m launch`."""

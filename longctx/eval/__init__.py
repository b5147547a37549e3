"""Where in the context a model works: loss by position, needles, generated tasks."""

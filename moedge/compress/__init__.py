"""Make a model smaller for a task: what experts are worth, which to keep, and the files of what is left."""

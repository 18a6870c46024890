"""The run: configuration, curriculum, steps."""

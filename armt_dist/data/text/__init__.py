"""Long text from files or a `datasets` name."""

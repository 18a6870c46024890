"""The DeepSpeed engine: the only room that knows DeepSpeed's insides."""

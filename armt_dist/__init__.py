"""armt_dist: distributed training of the Associative Recurrent Memory Transformer."""

__version__ = "0.1.0"

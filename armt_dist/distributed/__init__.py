"""Ranks and nodes: who they are, how they meet, what they do together."""

"""The model as an export carries it: torch and transformers only."""

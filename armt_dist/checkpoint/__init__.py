"""What is on disk: checkpoints, exports, and the code that exports carry."""

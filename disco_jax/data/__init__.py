"""Data: sources, transforms, and the way to batches."""

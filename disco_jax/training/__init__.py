"""The training loop, with its setup, progress display, health checks and profiler."""

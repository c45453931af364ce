"""A run's folder: config, checkpoints, logs."""

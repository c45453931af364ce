"""Will it fit? Compiles the training step for accelerators this machine does not have."""

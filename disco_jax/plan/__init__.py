"""Will it fit? Compiles the training step for accelerators that are not there."""

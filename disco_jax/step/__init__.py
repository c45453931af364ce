"""One optimiser update: state, gradients, the jitted step. Pure: no files, no flags."""

"""One optimizer update: state, gradients and the jitted step. Pure: no files or flags."""

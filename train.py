"""Trains CLIP: python train.py --config=shapes --workdir=DIR; the same as `disco-jax train`."""

from disco_jax.train import main

if __name__ == "__main__":
    main()

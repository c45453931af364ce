"""Evaluates CLIP: python eval.py --config=shapes --workdir=DIR; the same as `disco-jax eval`."""

from disco_jax.evaluate import main

if __name__ == "__main__":
    main()

"""How long a run is, given its data: steps, epochs, warm-up, and whether the data fill a batch."""

from ml_collections import ConfigDict

from disco_jax.config.validation import ROUNDING
from disco_jax.data.source import Joined
from disco_jax.errors import UserError


def with_steps(config: ConfigDict, samples: int) -> ConfigDict:
    """Returns `config` with `num_steps` computed from `num_epochs` and the data if it is 0."""
    if config.num_steps:
        return config
    config = config.copy_and_resolve_references()
    config.num_steps = _steps(config, samples)
    return config


def check_length(config: ConfigDict, source: Joined) -> None:
    """Checks a new run's batch size and epochs against the data.

    Raises:
      UserError: if a batch would hold a sample twice, because there are too few, or if `num_steps`
        and `num_epochs` disagree by more than 5 %.
    """
    sizes = [end - start for start, end in zip(source.starts, source.starts[1:], strict=False)]
    names, weights = str(config.data.name).split("::"), config.data.weights
    # Each source of a mixture has its own epochs, and fills its share of a batch.
    parts = zip(names, sizes, weights, strict=True) if weights else [("", len(source), 1.0)]
    for name, size, weight in parts:
        share = int(config.batch_size * weight / (sum(weights) or 1.0))
        if size < share:
            found = f"{name} has {size:,} samples, fewer than its share of" if name else ""
            found = found or f"the data have {size:,} samples, fewer than"
            raise UserError(
                f"data.name: {found} a batch, {share:,}, which would hold samples several times; "
                f"lower batch_size or add data"
            )
    steps = config.num_steps
    if config.num_epochs and abs(steps / _steps(config, len(source)) - 1) > ROUNDING:
        raise UserError(
            f"num_steps {steps:,} at batch_size {config.batch_size:,} is "
            f"{steps * config.batch_size / len(source):.2f} epochs of the {len(source):,} samples "
            f"in data.name, not num_epochs {config.num_epochs:g}; "
            f"{_steps(config, len(source)):,} steps would be, and num_steps = 0 computes them"
        )


def warm_up_note(config: ConfigDict) -> str:
    """Returns a line about a warm-up that is longer than the run; empty if it is not."""
    steps, warm_up = config.num_steps, config.optimizer.warmup_steps
    if warm_up <= steps:
        return ""
    return (
        f"note: optimizer.warmup_steps {warm_up:,} is longer than the run, {steps:,} steps: the "
        f"learning rate reaches {steps / warm_up:.1%} of its peak"
    )


def _steps(config: ConfigDict, samples: int) -> int:
    return max(round(config.num_epochs * samples / config.batch_size), 1)

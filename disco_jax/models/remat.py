"""What the backward pass recomputes instead of saving, block by block."""

from collections.abc import Callable
from typing import Any

import jax

# Values in a block, marked with `checkpoint_name`.
BLOCK_INPUT = "block_input"
ATTENDED = "attended"  # attention's output, before its projection
HIDDEN = "hidden"  # the MLP's hidden layer, before its activation


def rematerialize(function: Callable, remat: str) -> Callable:
    """Wraps `function` so that `remat` decides what is saved for the backward pass.

    Args:
      function: The body of a scan, i.e. a block. The scan keeps the compiler from undoing this.
      remat: `none` saves everything; `dots` the outputs of matmuls with weights and of cuDNN's
        attention; `branches` the outputs of attention and the MLP's hidden layer; `full` only the
        block's input; `offload` is like `full`, with the input kept in host memory until it is
        needed, which pays off on GPUs and TPUs.

    Raises:
      ValueError: if `remat` is none of these.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return function
    if remat == "full":
        return jax.checkpoint(function, prevent_cse=False)
    if remat == "dots":
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, _outputs_of_cudnn
        )
    elif remat == "branches":
        policy = policies.save_from_both_policies(
            policies.save_only_these_names(ATTENDED, HIDDEN), _outputs_of_cudnn
        )
    elif remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        raise ValueError(f"remat {remat!r} is not known")
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def _outputs_of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that saves the output and the softmax statistics of cuDNN's attention.

    Its backward pass then does not run the forward kernel again.
    """
    return primitive.name.startswith("dot_product_attention_fwd")

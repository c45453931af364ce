"""The contrastive losses of CLIP and SigLIP, exact over a device mesh.

`contrastive_loss` takes global arrays on a mesh; `local_contrastive_loss` takes local shards inside
your own `jax.shard_map`. Both compute the full-batch loss and its gradients. See docs/losses.md.
"""

from disco_jax.losses.arguments import KINDS, METHODS
from disco_jax.losses.contrastive import contrastive_loss, local_contrastive_loss
from disco_jax.losses.reference import Teacher

__all__ = ["KINDS", "METHODS", "Teacher", "contrastive_loss", "local_contrastive_loss"]

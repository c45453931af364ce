"""Finds the groups in which a run processes its texts (models/text_groups.py)."""

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from ml_collections import ConfigDict

from disco_jax.config.text_groups import AUTO
from disco_jax.data.caption_lengths import caption_lengths
from disco_jax.data.source import Joined
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.models import TextConfig
from disco_jax.models.group_choice import choose_text_groups
from disco_jax.processes.backend import first_then_all
from disco_jax.step.gradients import texts_at_once

LONGEST = 256  # bytes of a value of `model.text_groups`


def find_text_groups(config: ConfigDict, text: TextConfig, source: Joined) -> str:
    """Returns `model.text_groups`, or what suits a sample of the data if it is `auto`.

    The sample is the same at every start. Only the first process reads it, so that all of them
    compile the same program.
    """
    if text.pool != "argmax":
        return ""
    if config.model.text_groups != AUTO:
        return config.model.text_groups

    def choose() -> str:
        if jax.process_index() != 0:
            return ""
        lengths = caption_lengths(source, CLIPTokenizer(text.context_length), config.data)
        at_once = texts_at_once(config, jax.device_count())
        return choose_text_groups(lengths, at_once, text.context_length)

    found = first_then_all(choose)  # the others wait without a collective, which would time out
    if jax.process_count() == 1:
        return found
    sent = np.frombuffer(found.encode().ljust(LONGEST), np.uint8)
    return bytes(np.asarray(broadcast_one_to_all(sent))).decode().strip()

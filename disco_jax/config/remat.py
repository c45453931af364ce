"""Reads `model.image_remat` and `model.text_remat`: what the backward pass recomputes."""

# From the most memory to the least (models/remat.py).
REMAT = ("none", "dots", "branches", "full", "offload")
PARTIAL = REMAT[:3]  # can be limited to the last blocks


def parse_remat(text: str) -> tuple[str, int]:
    """Returns the policy in e.g. `dots:4` and the number of last blocks it applies to.

    The blocks before them are recomputed in full. 0 stands for all blocks.

    Raises:
      ValueError: if `text` is not of this form.
    """
    policy, colon, last = text.partition(":")
    plain = last.isascii() and last.isdecimal() and int(last) > 0
    if policy not in (PARTIAL if colon else REMAT) or (colon and not plain):
        raise ValueError(text)
    return policy, int(last) if colon else 0

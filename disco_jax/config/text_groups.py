"""Reads `model.text_groups`, the lengths at which shares of the texts are processed."""

from itertools import pairwise

AUTO = "auto"


def parse_text_groups(text: str) -> tuple[tuple[int, float], ...]:
    """Returns the pairs in e.g. `16:0.5,32:0.9`: half of the texts at 16 tokens, then 0.4 at 32.

    The fractions are cumulative. What they leave is processed at full length.

    Raises:
      ValueError: if `text` is neither empty nor of this form.
    """
    pairs = [part.split(":") for part in text.split(",") if text]
    groups = tuple((int(length), float(fraction)) for length, fraction in pairs)
    lengths, fractions = [0, *(n for n, _ in groups)], [0.0, *(f for _, f in groups)]
    rising = all(a < b for xs in (lengths, fractions) for a, b in pairwise(xs))
    if not rising or not fractions[-1] <= 1:
        raise ValueError(text)
    return groups

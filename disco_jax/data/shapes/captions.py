"""Captions of scenes in varied wordings. They are always true but rarely complete."""

from numpy.random import Generator

from disco_jax.data.shapes import vocabulary as words
from disco_jax.data.shapes.scene import Item, Scene


def caption(rng: Generator, scene: Scene) -> str:
    """Returns a random English caption of `scene`, with or without a final period."""
    first = _noun_phrase(rng, scene.items[0])
    if len(scene.items) == 1:
        body = first
        if rng.random() < 0.15:
            body += " " + _place(scene.items[0])
    else:
        second = _noun_phrase(rng, scene.items[1])
        if rng.random() < 0.85:
            body = f"{first} {rng.choice(words.RELATION_WORDS[str(scene.relation)])} {second}"
        else:
            body = f"{first} and {second}"
    if rng.random() < 0.15:
        body += " " + str(rng.choice(words.BACKGROUND_WORDS)).format(scene.background)
    sentence = str(rng.choice(words.OPENINGS)).format(body)
    return sentence + ("." if rng.random() < 0.3 else "")


def _noun_phrase(rng: Generator, item: Item) -> str:
    """Names the size, color and shape, or some of them: people rarely mention everything."""
    says = rng.choice(["both", "shape", "colour"], p=[0.45, 0.45, 0.1])
    size = str(rng.choice(words.SIZE_WORDS[item.size])) if rng.random() < 0.25 else ""
    colour = item.colour if says != "shape" else ""
    nouns = words.SHAPE_WORDS[item.shape] if says != "colour" else words.VAGUE_NOUNS
    phrase = " ".join(word for word in (size, colour, str(rng.choice(nouns))) if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _place(item: Item) -> str:
    row, column = (min(int(3 * at), 2) for at in (item.y, item.x))
    return words.PLACES[row][column]

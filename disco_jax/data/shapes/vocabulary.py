"""What a `shapes` scene can contain, and the words that describe it."""

COLOURS = {
    "red": (214, 39, 40),
    "orange": (240, 125, 20),
    "yellow": (232, 200, 30),
    "green": (44, 150, 60),
    "blue": (38, 90, 220),
    "purple": (135, 60, 180),
    "pink": (240, 110, 180),
    "brown": (118, 74, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

# Classes that are in no training image: one shape of each color, which gives one color of each
# shape, and four more.
HELDOUT = frozenset(
    f"{colour} {SHAPES[(3 * i + 1) % len(SHAPES)]}" for i, colour in enumerate(COLOURS)
) | {"red heart", "blue star", "green cross", "purple circle"}

SIZES = ("small", "medium", "large")
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (205, 205, 205),
    "beige": (236, 222, 196),
    "light blue": (190, 220, 245),
    "pale green": (203, 236, 205),
    "striped": (250, 250, 250),
    "dotted": (250, 250, 250),
}
# Rows and columns of a 3 x 3 grid over the image.
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the centre", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
RELATIONS = ("left", "right", "above", "below")

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
    "heart": ("heart",),
    "crescent": ("crescent", "crescent", "crescent moon"),
}
VAGUE_NOUNS = ("shape", "thing", "object", "figure")
SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("", "medium-sized"),
    "large": ("large", "big", "huge"),
}
RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
BACKGROUND_WORDS = ("on a {} background", "against a {} backdrop", "on {} paper")
OPENINGS = (
    "{}",
    "{}",
    "a photo of {}",
    "a drawing of {}",
    "a picture of {}",
    "an image of {}",
    "an illustration showing {}",
    "there is {}",
    "this is {}",
    "we see {}",
    "here is {}",
)
# Prompts for zero-shot classification. `{}` stands for a class name such as "red circle".
TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a picture of a {}",
    "an image of a {}",
    "an illustration showing a {}",
    "this is a {}",
    "there is a {}",
    "a small {}",
    "a large {}",
    "a {} on the left",
    "a {} on the right",
)

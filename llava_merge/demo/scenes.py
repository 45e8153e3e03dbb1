# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Drawn scenes with captions and questions: the data of the embedded demo model.

A scene holds one to five coloured shapes and often a card with a digit, each in its own cell of a 3x3 grid. A hard one
holds five to ten smaller shapes, a card with a number of up to three digits and a tiny diamond, in a 5x5 grid, whose
cells end where no window of a merger does. Everything follows from one `random.Random`, so a split and an index name a
picture, its caption and its questions for good:

    scene, rng = scene_of("test", 0)  # or scene_of("test", 0, hard=True)
    picture = draw_scene(scene)
    question = ask_question(scene, "color", rng)
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw


GRID, HARD_GRID = 3, 5
REGIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (222, 42, 48),
    "orange": (248, 140, 22),
    "yellow": (250, 214, 44),
    "green": (48, 164, 74),
    "blue": (40, 98, 222),
    "purple": (132, 62, 184),
    "pink": (248, 134, 190),
    "brown": (126, 78, 44),
}
NEEDLE = "diamond"
SIZES = {"small": (0.20, 0.24), "large": (0.35, 0.40)}  # radius as a share of the cell
HARD_SIZES = {"small": (0.22, 0.27), "large": (0.36, 0.42)}
NEEDLE_SIZE = (0.10, 0.13)
INKS = ((30, 30, 36), (28, 44, 92), (70, 30, 40), (24, 70, 58))
BACKGROUNDS = (
    (243, 238, 226),
    (226, 236, 244),
    (230, 242, 230),
    (244, 230, 232),
    (236, 230, 244),
    (246, 242, 214),
    (234, 234, 234),
    (222, 242, 240),
)
SPLITS = ("train", "validation", "test", "final")  # nothing but the tables in README and guides uses the last
QUESTION_TYPES = ("color", "shape", "count", "existence", "position", "digit")
HARD_QUESTION_TYPES = ("color", "shape", "count", "existence", "position", "number", "relation", "needle")

_MAX_ANGLE = {
    "circle": 0.0,
    "square": 14.0,
    "triangle": 180.0,
    "star": 180.0,
    "cross": 18.0,
    "heart": 18.0,
    NEEDLE: 9.0,
}
_CARD_PROBABILITY = 0.7


@dataclass(frozen=True)
class SceneObject:
    """One shape, or the card when `shape` is "digit". Lengths are shares of a cell, `angle` is in degrees.

    It lies in `span` cells side by side, of which `cell` is the first, of a grid of `grid` rows and columns.
    """

    shape: str
    color: str
    cell: int
    size: str
    radius: float
    offset: tuple[float, float]
    angle: float
    rgb: tuple[int, int, int]
    digit: int | None = None
    thickness: float = 0.0
    span: int = 1
    grid: int = GRID

    @property
    def region(self) -> str:
        """The ninth of the picture that the middle of its cells is in."""
        row, column = (twice * 3 // (2 * self.grid) for twice in (2 * self.row + 1, 2 * self.column + self.span))
        return REGIONS[3 * row + column]

    @property
    def row(self) -> int:
        """Of the grid, from the top."""
        return self.cell // self.grid

    @property
    def column(self) -> int:
        """Of the grid, from the left."""
        return self.cell % self.grid


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; `objects` are in raster order and hold at most one card."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]
    texture_seed: int

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """All objects but card and needle."""
        return tuple(item for item in self.objects if item.shape in SHAPES)

    @property
    def needle(self) -> SceneObject | None:
        """The tiny diamond of a hard scene."""
        return next((item for item in self.objects if item.shape == NEEDLE), None)

    @property
    def is_hard(self) -> bool:
        """Whether it has a needle, which all hard scenes have."""
        return self.needle is not None

    @property
    def card(self) -> SceneObject | None:
        """The card with a number, if there is one."""
        return next((item for item in self.objects if item.digit is not None), None)


@dataclass(frozen=True)
class Question:
    """A question of one type, and its answer."""

    type: str
    text: str
    answer: str


def scene_rng(split: str, index: int, hard: bool = False) -> random.Random:
    """The random state of scene `index` of a split; no two splits share one."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but it must be one of {SPLITS}: pass one of these.")
    return random.Random(f"{'hard-' if hard else ''}{split}-{index}")


def scene_of(split: str, index: int, hard: bool = False) -> tuple[Scene, random.Random]:
    """Scene `index` of a split, and the random state behind it, for its questions."""
    rng = scene_rng(split, index, hard)
    return sample_hard_scene(rng) if hard else sample_scene(rng), rng


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample_scene(rng: random.Random) -> Scene:
    """One to five shapes, mostly a card, and often a leading shape or colour, so that there is something to count."""
    num_shapes = rng.randint(1, 5)
    with_card = rng.random() < _CARD_PROBABILITY
    cells = rng.sample(range(GRID * GRID), num_shapes + with_card)
    items = _sample_shapes(cells[:num_shapes], GRID, rng)
    if with_card:
        items.append(_sample_card(cells[-1], rng))
    return _put_together(items, rng)


def sample_hard_scene(rng: random.Random) -> Scene:
    """Five to ten shapes, a card with a number over two cells, and a tiny diamond, the needle."""
    num_shapes = rng.randint(5, 10)
    card_cell = HARD_GRID * rng.randrange(HARD_GRID) + rng.randrange(HARD_GRID - 1)
    free = [cell for cell in range(HARD_GRID * HARD_GRID) if cell not in (card_cell, card_cell + 1)]
    needle_cell, *cells = rng.sample(free, 1 + num_shapes)
    items = _sample_shapes(cells, HARD_GRID, rng)
    number = rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))
    card = replace(_sample_card(card_cell, rng), digit=number, span=2, grid=HARD_GRID)
    needle = _sample_shape(needle_cell, NEEDLE, rng.choice(tuple(COLORS)), "tiny", NEEDLE_SIZE, HARD_GRID, rng)
    return _put_together([*items, card, needle], rng)


def _put_together(items: list[SceneObject], rng: random.Random) -> Scene:
    items = sorted(items, key=lambda item: item.cell)
    return Scene(tuple(items), _jitter(rng.choice(BACKGROUNDS), 6, rng), rng.getrandbits(32))


def _sample_shapes(cells: list[int], grid: int, rng: random.Random) -> list[SceneObject]:
    theme, sizes, items = rng.random(), SIZES if grid == GRID else HARD_SIZES, []
    leading_shape = rng.choice(SHAPES) if theme < 0.4 else None
    leading_color = rng.choice(tuple(COLORS)) if 0.3 < theme < 0.7 else None
    for cell in cells:
        shape = leading_shape if leading_shape and rng.random() < 0.7 else rng.choice(SHAPES)
        color = leading_color if leading_color and rng.random() < 0.7 else rng.choice(tuple(COLORS))
        size = rng.choice(tuple(sizes))
        items.append(_sample_shape(cell, shape, color, size, sizes[size], grid, rng))
    return items


def _sample_shape(
    cell: int, shape: str, color: str, size: str, radii: tuple[float, float], grid: int, rng: random.Random
) -> SceneObject:
    radius = rng.uniform(*radii)
    angle = rng.uniform(-1, 1) * _MAX_ANGLE[shape]
    offset, rgb = _offset(radius, rng), _jitter(COLORS[color], 7, rng)
    return SceneObject(shape, color, cell, size, radius, offset, angle, rgb, grid=grid)


def _sample_card(cell: int, rng: random.Random) -> SceneObject:
    radius, ink = rng.uniform(0.34, 0.40), _jitter(rng.choice(INKS), 8, rng)
    return SceneObject(
        shape="digit",
        color="white",
        cell=cell,
        size="large",
        radius=radius,
        offset=_offset(radius, rng),
        angle=rng.uniform(-9, 9),
        rgb=ink,
        digit=rng.randrange(10),
        thickness=rng.uniform(0.11, 0.18),
    )


def _offset(radius: float, rng: random.Random) -> tuple[float, float]:
    room = min(0.16, 0.46 - radius)  # the object stays inside its cell
    return rng.uniform(-room, room), rng.uniform(-room, room)


def _jitter(rgb: tuple[int, int, int], amount: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in rgb)
    return red, green, blue


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, size: int = 336) -> Image.Image:
    """The scene as an RGB picture of `size` pixels a side, antialiased."""
    picture = _draw_background(scene, size)
    for item in scene.objects:
        left, top = round(item.column * size / item.grid), round(item.row * size / item.grid)
        right, bottom = round((item.column + item.span) * size / item.grid), round((item.row + 1) * size / item.grid)
        tile = right - left, bottom - top
        layers = _card_layers(item, tile) if item.digit is not None else _shape_layers(item, tile)
        shadow = max(1, size // 112)
        picture.paste((60, 60, 70), (left + shadow // 2, top + shadow), layers[0][0].point(_faint))
        for mask, rgb in layers:
            picture.paste(rgb, (left, top), mask)
    return picture


def _faint(value: int) -> int:
    return value // 5


def _draw_background(scene: Scene, size: int) -> Image.Image:
    """A light colour with soft clouds, a slope of brightness and a little grain."""
    rng = random.Random(scene.texture_seed)
    clouds = Image.frombytes("RGB", (5, 5), rng.randbytes(75)).resize((size, size), Image.Resampling.BICUBIC)
    grain = Image.frombytes("L", (size, size), rng.randbytes(size * size)).convert("RGB")
    slope = Image.new("L", (2, 2))
    slope.putdata([rng.randrange(256) for _ in range(4)])
    slope = slope.resize((size, size), Image.Resampling.BILINEAR).convert("RGB")
    picture = Image.blend(Image.new("RGB", (size, size), scene.background), clouds, 0.07)
    return Image.blend(Image.blend(picture, slope, 0.05), grain, 0.03)


Layers = list[tuple[Image.Image, tuple[int, int, int]]]
Polygon = list[tuple[float, float]]


def _shape_layers(item: SceneObject, tile: tuple[int, int]) -> Layers:
    """The shape in a darker colour and, a little smaller, in its own, as masks of one cell."""
    edge = tuple(int(value * 0.72) for value in item.rgb)
    outlines = [_place(_outline(item.shape), item, tile, scale) for scale in (1.0, 0.88)]
    return [(_fill(outlines[0], tile), edge), (_fill(outlines[1], tile), item.rgb)]


def _card_layers(item: SceneObject, tile: tuple[int, int]) -> Layers:
    digits = str(item.digit)
    more = 0.5 * (len(digits) - 1)  # half a card further to each side
    corners, inner = (
        _place([(-x, -y), (x, -y), (x, y), (-x, y)], item, tile) for x, y in ((0.78 + more, 1.0), (0.74 + more, 0.96))
    )
    strokes = [
        _place([(x + (index - more) / 0.68, y) for x, y in stroke], item, tile, 0.68)
        for index, digit in enumerate(digits)
        for stroke in _digit_strokes(int(digit))
    ]
    ink = _draw_strokes(strokes, 2 * item.thickness * item.radius * min(tile), tile)
    return [(_fill(corners, tile), (176, 172, 164)), (_fill(inner, tile), (254, 253, 250)), (ink, item.rgb)]


def _place(points: Polygon, item: SceneObject, tile: tuple[int, int], scale: float = 1.0) -> Polygon:
    """Turns points of the unit disc into pixels of the doubled cell."""
    radius, angle = item.radius * scale * min(tile) * 2, math.radians(item.angle)
    middle_x, middle_y = tile[0] * (1 + 2 * item.offset[0]), tile[1] * (1 + 2 * item.offset[1])
    cosine, sine = math.cos(angle) * radius, math.sin(angle) * radius
    return [(middle_x + x * cosine - y * sine, middle_y + x * sine + y * cosine) for x, y in points]


def _fill(points: Polygon, tile: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", (2 * tile[0], 2 * tile[1]))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.reduce(2)


def _draw_strokes(strokes: list[Polygon], width: float, tile: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", (2 * tile[0], 2 * tile[1]))
    draw = ImageDraw.Draw(mask)
    for stroke in strokes:
        draw.line(stroke, fill=255, width=round(width), joint="curve")
        for x, y in (stroke[0], stroke[-1]):
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return mask.reduce(2)


@cache
def _outline(shape: str) -> Polygon:
    """The outline of a shape in the unit disc, y downwards."""
    if shape == "circle":
        return _arc(0, 0, 0.92, 0.92, 0, 360, 40)
    if shape == "square":
        return [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    if shape == "triangle":
        return _arc(0, 0, 1, 1, -90, 270, 3)[:3]
    if shape == "star":
        return [_on_circle(1.0 if step % 2 == 0 else 0.42, -90 + 36 * step) for step in range(10)]
    if shape == NEEDLE:
        return [(0.0, -1.0), (0.85, 0.0), (0.0, 1.0), (-0.85, 0.0)]
    if shape == "cross":
        corners = [(0.3, 0.98), (0.3, 0.3), (0.98, 0.3)]
        right = corners + [(x, -y) for x, y in reversed(corners)]
        return right + [(-x, y) for x, y in reversed(right)]
    if shape == "heart":
        turns = [math.tau * step / 40 for step in range(40)]
        return [(math.sin(t) ** 3 * 0.95, -_heart_height(t) / 16 * 0.95 - 0.05) for t in turns]
    raise ValueError(f"shape is {shape!r}, but it must be one of {SHAPES}: use one of these.")


def _heart_height(turn: float) -> float:
    return 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)


def _on_circle(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _arc(x: float, y: float, width: float, height: float, start: float, stop: float, steps: int = 16) -> Polygon:
    turns = [math.radians(start + (stop - start) * step / steps) for step in range(steps + 1)]
    return [(x + width * math.cos(turn), y + height * math.sin(turn)) for turn in turns]


@cache
def _digit_strokes(digit: int) -> list[Polygon]:
    """The pen strokes of a digit in a box of about 1.2 by 2, y downwards."""
    return {
        0: [_arc(0, 0, 0.56, 0.96, 0, 360, 32)],
        1: [[(-0.36, -0.56), (0.06, -0.96), (0.06, 0.96)]],
        2: [_arc(0, -0.44, 0.54, 0.52, -170, 35) + [(-0.56, 0.94), (0.6, 0.94)]],
        3: [_arc(-0.06, -0.48, 0.54, 0.48, -150, 90) + _arc(-0.06, 0.48, 0.6, 0.48, -90, 150)],
        4: [[(0.28, 0.96), (0.28, -0.94), (-0.58, 0.4), (0.62, 0.4)]],
        5: [[(0.5, -0.94), (-0.4, -0.94), (-0.46, -0.1)] + _arc(-0.04, 0.34, 0.58, 0.6, -130, 145)],
        6: [_arc(0.44, 0.34, 1.0, 1.3, -102, -180) + _arc(0, 0.4, 0.56, 0.56, 180, -180, 28)],
        7: [[(-0.56, -0.94), (0.56, -0.94), (-0.14, 0.96)]],
        8: [_arc(0, -0.47, 0.46, 0.46, 0, 360, 28), _arc(0, 0.46, 0.56, 0.5, 0, 360, 28)],
        9: [_arc(-0.44, -0.34, 1.0, 1.3, 78, 0) + _arc(0, -0.4, 0.56, 0.56, 0, -360, 28)],
    }[digit]


# --- captions and questions -------------------------------------------------------------------------------------------


def describe_scene(scene: Scene) -> str:
    """Everything in raster order, place first: "at the top left a small red star, at the center the digit 7"."""
    return ", ".join(f"at the {item.region} {describe_object(item)}" for item in scene.objects)


def describe_object(item: SceneObject) -> str:
    """The object as captions name it."""
    if item.digit is not None:
        return f"the {'digit' if item.grid == GRID else 'number'} {item.digit}"
    return f"a {item.size} {item.color} {item.shape}"


def ask_question(scene: Scene, question_type: str, rng: random.Random) -> Question | None:
    """A question of one type with its answer, or None where the scene allows no unambiguous one."""
    if question_type not in _ASK:
        raise ValueError(f"question_type is {question_type!r}, but must be one of {tuple(_ASK)}: pass one of these.")
    asked = _ASK[question_type](scene, rng)
    return None if asked is None else Question(question_type, *asked)


Asked = tuple[str, str] | None  # text and answer


def _ask_color(scene: Scene, rng: random.Random) -> Asked:
    item = _one_of_its_kind(scene, "shape", rng)
    if item is None:
        return None
    return _phrase("color", rng).format(item.shape), item.color


def _ask_shape(scene: Scene, rng: random.Random) -> Asked:
    item = _one_of_its_kind(scene, "color", rng)
    if item is None:
        return None
    return _phrase("shape", rng).format(item.color), item.shape


def _one_of_its_kind(scene: Scene, attribute: str, rng: random.Random) -> SceneObject | None:
    """A shape whose shape or colour no other shape of the scene has."""
    counts = Counter(getattr(item, attribute) for item in scene.shapes)
    unique = [item for item in scene.shapes if counts[getattr(item, attribute)] == 1]
    return rng.choice(unique) if unique else None


def _ask_count(scene: Scene, rng: random.Random) -> Asked:
    """Draws the answer first, so that large counts come up as often as the scenes allow."""
    by_answer: dict[int, list[str]] = {}
    for noun, count in _countable(scene):
        by_answer.setdefault(count, []).append(noun)
    answers = sorted(count for count in by_answer if count < len(_COUNT_WEIGHTS))
    answer = rng.choices(answers, [_COUNT_WEIGHTS[count] for count in answers])[0]
    return _phrase("count", rng).format(rng.choice(by_answer[answer])), str(answer)


_COUNT_WEIGHTS = (1.0, 1.0, 2.4, 4.0, 6.0, 9.0, 11.0, 13.0)


def _countable(scene: Scene) -> Iterator[tuple[str, int]]:
    shapes, colors = Counter(item.shape for item in scene.shapes), Counter(item.color for item in scene.shapes)
    yield from ((plural(shape), shapes[shape]) for shape in SHAPES)
    yield from ((f"{color} shapes", colors[color]) for color in COLORS)
    yield "shapes", len(scene.shapes)


def plural(shape: str) -> str:
    """Of a shape, as questions write it."""
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _ask_existence(scene: Scene, rng: random.Random) -> Asked:
    """Half the answers are no, and most of these ask for something that shares its colour or shape with the scene."""
    present = rng.random() < 0.5
    kind = rng.choices(("pair", "shape", "color", "digit"), (6, 2, 2, 1))[0]
    if scene.is_hard:  # nearly all colours and shapes are there
        kind = "pair"
    if kind == "digit":
        noun, present = "digit", scene.card is not None
    elif kind == "pair":
        noun = "{1} {0}".format(*_pair(scene, present, rng))
    else:
        noun = _single(scene, kind, present, rng)
    article = "an" if noun[0] in "aeiou" else "a"
    return _phrase("existence", rng).format(f"{article} {noun}"), "yes" if present else "no"


def _single(scene: Scene, kind: str, present: bool, rng: random.Random) -> str:
    found = [getattr(item, kind) for item in scene.shapes]
    absent = [name for name in (SHAPES if kind == "shape" else COLORS) if name not in found]
    noun = rng.choice(found if present else absent)
    return noun if kind == "shape" else f"{noun} shape"


def _pair(scene: Scene, present: bool, rng: random.Random) -> tuple[str, str]:
    """The shape and colour of a thing in the scene, or a pair that is close to one but absent."""
    item, pairs = rng.choice(scene.shapes), {(item.shape, item.color) for item in scene.shapes}
    while not present:
        other = rng.choice(scene.shapes)
        options = ((item.shape, other.color), (item.shape, rng.choice(tuple(COLORS))), (rng.choice(SHAPES), item.color))
        pair = rng.choice(options)
        if pair not in pairs:
            return pair
    return item.shape, item.color


def _ask_position(scene: Scene, rng: random.Random) -> Asked:
    named = _named_objects(scene)
    if not named:
        return None
    name, item = rng.choice(named)
    return _phrase("position", rng).format(name), item.region


def _named_objects(scene: Scene) -> list[tuple[str, SceneObject]]:
    """Objects with a name that fits nothing else: by shape, else by colour and shape, and the card."""
    shapes = Counter(item.shape for item in scene.shapes)
    pairs = Counter((item.color, item.shape) for item in scene.shapes)
    named = [(item.shape, item) for item in scene.objects if shapes[item.shape] <= 1]
    if scene.is_hard:  # the card and the needle have questions of their own
        named = [(name, item) for name, item in named if name in SHAPES]
    return named + [
        (f"{item.color} {item.shape}", item)
        for item in scene.shapes
        if shapes[item.shape] > 1 and pairs[item.color, item.shape] == 1
    ]


def _ask_digit(scene: Scene, rng: random.Random) -> Asked:
    return None if scene.card is None else (_phrase("digit", rng), str(scene.card.digit))


def _ask_number(scene: Scene, rng: random.Random) -> Asked:
    return None if scene.card is None else (_phrase("number", rng), str(scene.card.digit))


def _ask_needle(scene: Scene, rng: random.Random) -> Asked:
    return None if scene.needle is None else (_phrase("needle", rng), scene.needle.color)


def _ask_relation(scene: Scene, rng: random.Random) -> Asked:
    """Whether one shape lies beside or above another, in another row or column; half the answers are no."""
    counts = Counter((item.color, item.shape) for item in scene.shapes)
    unique = [item for item in scene.shapes if counts[item.color, item.shape] == 1]
    if len(unique) < 2:
        return None
    one, other = rng.sample(unique, 2)
    true = [side for side, lies in _SIDES.items() if lies(one, other)]
    false = [side for side, lies in _SIDES.items() if lies(other, one)]  # level is neither
    present = rng.random() < 0.5
    names = (f"{item.color} {item.shape}" for item in (one, other))
    return _phrase("relation", rng).format(rng.choice(true if present else false), *names), "yes" if present else "no"


_SIDES: dict[str, Callable[[SceneObject, SceneObject], bool]] = {
    "left of": lambda one, other: one.column < other.column,
    "right of": lambda one, other: one.column > other.column,
    "above": lambda one, other: one.row < other.row,
    "below": lambda one, other: one.row > other.row,
}


def _phrase(question_type: str, rng: random.Random) -> str:
    return rng.choice(_PHRASES[question_type])


_PHRASES = {
    "color": (
        "What color is the {}?",
        "Which color does the {} have?",
        "What is the color of the {}?",
        "The {} is what color?",
    ),
    "shape": (
        "What shape is the {} object?",
        "Which shape is {}?",
        "What is the shape of the {} object?",
        "What is the {} thing?",
    ),
    "count": (
        "How many {} are there?",
        "How many {} can you see?",
        "What is the number of {}?",
        "Count the {}.",
    ),
    "existence": (
        "Is there {}?",
        "Is there {} in the picture?",
        "Can you see {}?",
        "Does the picture show {}?",
    ),
    "position": (
        "Where is the {}?",
        "Where can you see the {}?",
        "In which part of the picture is the {}?",
        "What is the position of the {}?",
    ),
    "digit": (
        "What digit is shown?",
        "Which number is on the card?",
        "What number do you see?",
        "Which digit is in the picture?",
        "What does the card say?",
    ),
    "number": (
        "What number is shown?",
        "Which number does the card show?",
        "What number is written on the card?",
        "Read the number.",
    ),
    "relation": (
        "Is the {1} {0} the {2}?",
        "Does the {1} lie {0} the {2}?",
        "In the picture, is the {1} {0} the {2}?",
    ),
    "needle": (
        "What color is the tiny diamond?",
        "Which color does the tiny diamond have?",
        "What is the color of the diamond?",
    ),
}
_ASK: dict[str, Callable[[Scene, random.Random], Asked]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "existence": _ask_existence,
    "position": _ask_position,
    "digit": _ask_digit,
    "number": _ask_number,
    "relation": _ask_relation,
    "needle": _ask_needle,
}

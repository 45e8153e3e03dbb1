# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The drawn scenes: the same for the same index, and every answer true of the picture."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from llava_merge.demo.scenes import (
    COLORS,
    HARD_QUESTION_TYPES,
    QUESTION_TYPES,
    REGIONS,
    SHAPES,
    Scene,
    SceneObject,
    ask_question,
    describe_scene,
    draw_scene,
    sample_hard_scene,
    sample_scene,
    scene_rng,
)


def questions(question_type: str, count: int = 600, split: str = "validation"):
    """Pairs of scene and question."""
    for index in range(count):
        rng = scene_rng(split, index)
        scene = sample_scene(rng)
        question = ask_question(scene, question_type, rng)
        if question is not None:
            yield scene, question


def objects(scene: Scene) -> list[tuple[str, str, int]]:
    return [(item.color, item.shape, item.cell) for item in scene.objects if item.shape in SHAPES]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def matching(scene: Scene, text: str) -> list[tuple[str, str, int]]:
    """The shapes that fit all colour and shape words of a text; plural words count too."""
    found = [word for word in words(text) if word in COLORS]
    kinds = [shape for shape in SHAPES if re.search(rf"\b{shape}(s|es)?\b", text.lower())]
    return [item for item in objects(scene) if set(found) <= {item[0]} and set(kinds) <= {item[1]}]


def named_cell(scene: Scene, name: str) -> int:
    if "digit" in name:
        return next(item.cell for item in scene.objects if item.digit is not None)
    (only,) = matching(scene, name)
    return only[2]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_same_index_gives_the_same_scene_picture_and_questions(split):
    first, second = (sample_scene(scene_rng(split, 7)) for _ in range(2))
    assert first == second
    assert draw_scene(first).tobytes() == draw_scene(second).tobytes()
    for name in QUESTION_TYPES:
        assert ask_question(first, name, scene_rng(split, 8)) == ask_question(second, name, scene_rng(split, 8))


def test_splits_share_no_scene():
    seen = [
        {sample_scene(scene_rng(split, index)) for index in range(400)} for split in ("train", "validation", "test")
    ]
    assert [len(scenes) for scenes in seen] == [400] * 3
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_scenes_keep_their_promises():
    for index in range(500):
        scene = sample_scene(scene_rng("train", index))
        cells = [item.cell for item in scene.objects]
        assert cells == sorted(set(cells))
        assert 1 <= len(scene.shapes) <= 5 and len(scene.objects) - len(scene.shapes) in (0, 1)
    cards = sum(sample_scene(scene_rng("train", index)).card is not None for index in range(1000))
    assert 640 < cards < 760


@pytest.mark.parametrize("size", [112, 224, 336])
def test_objects_lie_inside_the_cell_that_they_are_said_to_be_in(size):
    """Compares the picture with one that lacks the object: all pixels that differ lie in its cell."""
    for index in range(12):
        scene = sample_scene(scene_rng("test", index))
        whole = np.asarray(draw_scene(scene, size)).astype(int)
        for item in scene.objects:
            rest = replace(scene, objects=tuple(other for other in scene.objects if other is not item))
            rows, columns = np.nonzero(np.abs(whole - np.asarray(draw_scene(rest, size))).sum(-1) > 12)
            top, left = item.cell // 3 * size / 3, item.cell % 3 * size / 3
            assert top - 1 <= rows.min() and rows.max() <= top + size / 3 + 3
            assert left - 1 <= columns.min() and columns.max() <= left + size / 3 + 3
            assert 3 * int(rows.mean() * 3 / size) + int(columns.mean() * 3 / size) == item.cell
            assert 0.1 * size < np.ptp(rows) and 0.1 * size < np.ptp(columns)


def test_pixels_show_the_color_that_is_named():
    """The most frequent pure colour inside the object is closest to the palette's entry of that name."""
    names, palette = list(COLORS), np.array(list(COLORS.values()))
    for index in range(60):
        scene = sample_scene(scene_rng("test", index))
        picture = np.asarray(draw_scene(scene, 336)).astype(int)
        for item in scene.shapes:
            x = int((2 * item.column + 1 + 2 * item.offset[0]) * 56)
            y = int((2 * item.row + 1 + 2 * item.offset[1]) * 56)
            patch = picture[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).mean(0)
            assert names[int(np.abs(palette - patch).sum(-1).argmin())] == item.color


def test_all_shapes_and_digits_are_drawn_differently():
    def picture(shape, digit=None):
        item = SceneObject(shape, "red", 4, "large", 0.4, (0.0, 0.0), 0.0, (222, 42, 48), digit, 0.15)
        return np.asarray(draw_scene(Scene((item,), (240, 240, 240), 0), 112)).astype(int)

    pictures = [picture(shape) for shape in SHAPES] + [picture("digit", digit) for digit in range(10)]
    for number, one in enumerate(pictures):
        for other in pictures[:number]:
            assert (np.abs(one - other).sum(-1) > 60).sum() > 30


def test_caption_mentions_everything_in_raster_order():
    for index in range(300):
        scene = sample_scene(scene_rng("train", index))
        phrases = describe_scene(scene).split(", ")
        assert len(phrases) == len(scene.objects)
        for phrase, item in zip(phrases, sorted(scene.objects, key=lambda item: item.cell), strict=True):
            what = f"the digit {item.digit}" if item.digit is not None else f"a {item.size} {item.color} {item.shape}"
            assert phrase == f"at the {REGIONS[item.cell]} {what}"


def test_color_and_shape_answers_fit_exactly_one_object():
    for scene, question in questions("color"):
        assert [item[0] for item in matching(scene, question.text)] == [question.answer]
    for scene, question in questions("shape"):
        (only,) = [item for item in objects(scene) if item[0] in words(question.text)]
        assert only[1] == question.answer


def test_count_answers_are_right_when_counted_again():
    for scene, question in questions("count"):
        assert question.answer == str(len(matching(scene, question.text)))


def test_existence_answers_are_right_and_near_misses_are_frequent():
    near = total = 0
    for scene, question in questions("existence"):
        if "digit" in question.text:
            present = any(item.digit is not None for item in scene.objects)
        else:
            present = bool(matching(scene, question.text))
            asked = set(words(question.text))
            if not present and asked & set(COLORS) and asked & set(SHAPES):
                total += 1
                near += any({color, shape} & asked for color, shape, _ in objects(scene))
        assert question.answer == ("yes" if present else "no")
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", question.text)
    assert near == total > 100


def test_position_answers_are_right():
    for scene, question in questions("position"):
        assert question.answer == REGIONS[named_cell(scene, question.text)]


def test_digit_answers_are_those_of_the_card():
    for scene, question in questions("digit"):
        assert [str(item.digit) for item in scene.objects if item.shape == "digit"] == [question.answer]


@pytest.mark.parametrize(
    ("question_type", "largest", "kinds"),
    [("color", 0.2, 8), ("shape", 0.25, 6), ("count", 0.3, 6), ("existence", 0.58, 2), ("position", 0.25, 9)]
    + [("digit", 0.16, 10)],
)
def test_no_answer_is_common_enough_to_guess(question_type, largest, kinds):
    answers = Counter(question.answer for _, question in questions(question_type, count=2000))
    assert len(answers) == kinds
    assert answers.most_common(1)[0][1] / answers.total() < largest


def test_unknown_names_are_refused_with_the_names_that_work():
    scene = sample_scene(scene_rng("train", 0))
    with pytest.raises(ValueError, match="'size'.*'color'"):
        ask_question(scene, "size", scene_rng("train", 0))
    with pytest.raises(ValueError, match="'dev'.*'validation'"):
        scene_rng("dev", 0)


def hard_questions(question_type: str, count: int = 400):
    """Pairs of hard scene and question."""
    for index in range(count):
        rng = scene_rng("validation", index, hard=True)
        scene = sample_hard_scene(rng)
        question = ask_question(scene, question_type, rng)
        if question is not None:
            yield scene, question


class TestHardScenes:
    def test_they_hold_shapes_a_card_and_a_needle_in_cells_of_their_own(self):
        for index in range(500):
            scene = sample_hard_scene(scene_rng("train", index, hard=True))
            cells = [item.cell + part for item in scene.objects for part in range(item.span)]
            assert len(set(cells)) == len(cells) and max(cells) < 25
            assert 5 <= len(scene.shapes) <= 10 and len(scene.objects) == len(scene.shapes) + 2
            assert 0 <= scene.card.digit <= 999 and scene.card.column < 4
            assert scene.needle.size == "tiny" and scene.is_hard
        assert not sample_scene(scene_rng("train", 0)).is_hard

    def test_each_object_lies_in_its_cells_and_in_the_region_that_is_said(self):
        for index in range(8):
            scene = sample_hard_scene(scene_rng("test", index, hard=True))
            whole = np.asarray(draw_scene(scene)).astype(int)
            for item in scene.objects:
                rest = replace(scene, objects=tuple(other for other in scene.objects if other is not item))
                rows, columns = np.nonzero(np.abs(whole - np.asarray(draw_scene(rest))).sum(-1) > 12)
                side = 336 / 5
                assert item.row * side - 1 <= rows.min() and rows.max() <= (item.row + 1) * side + 3
                assert item.column * side - 1 <= columns.min()
                assert columns.max() <= (item.column + item.span) * side + 3
                middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
                corner = (112 * ninth for ninth in divmod(REGIONS.index(item.region), 3))
                # a shadow and a triangle are not in the middle of their boxes
                assert all(least - 8 <= value <= least + 120 for value, least in zip(middle, corner, strict=True))

    def test_numbers_are_drawn_differently(self):
        def picture(number):
            item = SceneObject(
                "digit", "white", 6, "large", 0.38, (0.0, 0.0), 0.0, (30, 30, 36), number, 0.15, span=2, grid=5
            )
            return np.asarray(draw_scene(Scene((item,), (240, 240, 240), 0))).astype(int)

        pictures = [picture(number) for number in (1, 11, 111, 121, 211, 12, 21)]
        for number, one in enumerate(pictures):
            for other in pictures[:number]:
                assert (np.abs(one - other).sum(-1) > 60).sum() > 30

    def test_answers_about_shapes(self):
        for name in ("color", "shape"):
            for scene, question in hard_questions(name):
                fitting = [
                    item
                    for item in scene.shapes
                    if {"color": item.shape, "shape": item.color}[name] in words(question.text)
                ]
                assert len(fitting) == 1 and getattr(fitting[0], name) == question.answer
        for scene, question in hard_questions("count"):
            assert question.answer == str(len(matching(scene, question.text)))
        for scene, question in hard_questions("existence"):
            assert question.answer == ("yes" if matching(scene, question.text) else "no")

    def test_answers_about_places(self):
        for scene, question in hard_questions("position"):
            (named,) = [
                item for item in scene.shapes if (item.color, item.shape, item.cell) in matching(scene, question.text)
            ]
            assert question.answer == named.region
        for scene, question in hard_questions("relation"):
            side = next(side for side in ("left of", "right of", "above", "below") if side in question.text)
            one, other = (
                next(item for item in scene.shapes if f"{item.color} {item.shape}" in part)
                for part in question.text.split(side)
            )
            lies = {
                "left of": one.column < other.column,
                "right of": one.column > other.column,
                "above": one.row < other.row,
                "below": one.row > other.row,
            }[side]
            level = {"left of": one.column == other.column, "right of": one.column == other.column}.get(
                side, one.row == other.row
            )
            assert not level and question.answer == ("yes" if lies else "no")

    def test_answers_about_card_and_needle(self):
        for scene, question in hard_questions("number"):
            assert question.answer == str(scene.card.digit)
        for scene, question in hard_questions("needle"):
            assert question.answer == scene.needle.color and "diamond" in question.text

    @pytest.mark.parametrize("name", HARD_QUESTION_TYPES)
    def test_no_answer_is_common_enough_to_guess(self, name):
        answers = Counter(question.answer for _, question in hard_questions(name, 1000))
        largest = {"existence": 0.55, "relation": 0.55}.get(name, 0.25)
        assert answers.most_common(1)[0][1] / answers.total() < largest

    def test_the_caption_names_everything(self):
        scene = sample_hard_scene(scene_rng("train", 5, hard=True))
        phrases = describe_scene(scene).split(", ")
        assert len(phrases) == len(scene.objects)
        assert f"the number {scene.card.digit}" in describe_scene(scene)
        assert f"a tiny {scene.needle.color} diamond" in describe_scene(scene)

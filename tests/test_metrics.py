# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Scores of answers: each metric against its published definition."""

import pytest

from llava_merge.evaluation.metrics import (
    METRICS,
    exact_match,
    multiple_choice,
    pope,
    pope_report,
    relaxed_accuracy,
    says_yes,
    summarize,
    textvqa_accuracy,
    vqa_accuracy,
    wilson_interval,
)
from llava_merge.evaluation.vqa_normalization import normalize_vqa


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("  Yes. ", ["yes"], 1),
        ("a  red\nstar!", ["A red star"], 1),
        ("red", ["blue", "red"], 1),
        ("red star", ["red"], 0),
        ("1.5", ["1.5"], 1),
    ],
)
def test_exact_match(answer, references, score):
    assert exact_match(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("hell", "hell"),  # no contraction in the official table
        ("well-known", "well known"),
        ("yes, it is", "yes it is"),  # beside a space: dropped
        ("red/blue", "red blue"),  # else a space in its place
        ("1,000 cars/hour", "1000 carshour"),  # a number with a comma: all dropped
        ("3.5 m.", "3.5 m"),
        ("An apple\ton a\ntable", "apple on table"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalised_as_by_the_official_script(answer, normal):
    assert normalize_vqa(answer) == normal


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_vqa_accuracy_is_the_mean_over_annotators_left_out(matches, score):
    references = ["Red."] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("the red", references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "references", "vqa", "textvqa"),
    [
        ("yes", ["yes"] * 10, 1, 1),
        ("yes.", ["yes"] * 10, 0, 1),  # the script of VQA normalises nothing where all agree
        ("Yes", ["yes"] * 10, 0, 1),
        (" yes\n", ["yes"] * 10, 1, 1),
        ("Yes.", ["yes"] * 9 + ["no"], 1, 1),
        ("red, blue", ["red blue"] * 5 + ["green"] * 5, 1, 1),
        ("red,blue", ["redblue"] * 5 + ["green"] * 5, 0, 1),  # a comma is a space in VQA, and nothing in TextVQA
        ("mike's", ["mike 's"] * 5 + ["green"] * 5, 0, 1),
        ("1,000", ["1000"] * 5 + ["green"] * 5, 1, 1),
    ],
)
def test_vqa_and_textvqa_normalise_as_their_scripts(answer, references, vqa, textvqa):
    assert vqa_accuracy(answer, references) == pytest.approx(vqa)
    assert textvqa_accuracy(answer, references) == pytest.approx(textvqa)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("B", "B", 1),
        ("(B)", "B", 1),
        ("B)", "b", 1),
        ("B.", "B", 1),
        ("B: a cat", "(B)", 1),
        ("b) a cat", "B", 1),
        ("The answer is (B).", "B", 1),
        ("Answer: B", "B", 1),
        ("Answer:\nB", "B", 1),
        ("ANSWER: B", "B", 1),
        ("**B**", "B", 1),
        ("The answer is **B**", "B", 1),
        ("Option B", "B", 1),
        ("The correct answer is option B.", "B", 1),
        ("The correct option is (C).", "C", 1),
        ("B, because it barks", "B", 1),
        ("Answer: I think so", "I", 0),
        ("A cat", "A", 0),  # an article
        ("Both", "B", 0),
        ("C", "B", 0),
        ("", "B", 0),
    ],
)
def test_multiple_choice(answer, reference, score):
    assert multiple_choice(answer, [reference]) == score


def test_multiple_choice_refuses_other_answers():
    with pytest.raises(ValueError, match="metric 'multiple_choice': the right answer 'a cat' has to be a letter"):
        multiple_choice("A", ["a cat"])


def test_vqa_accuracy_of_few_references_is_a_match():
    assert vqa_accuracy("two", ["2"]) == 1 and vqa_accuracy("two", ["3", "2"]) == 1 and vqa_accuracy("two", ["3"]) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("0.5", "50%", 1),
        ("50 %", "0.5", 1),
        ("1,050", "1000", 0),
        ("1050", "1000", 1),
        ("yes.", "yes", 0),
        (" yes", "yes", 0),
        ("104%", "1", 1),
        ("-10", "-10.2", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Blue", "blue", 1),
        ("Blue bar", "blue", 0),
        ("nan", "nan", 0),
        ("nan", "5", 0),
        ("7", "seven", 0),
    ],
)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_accuracy(answer, [reference]) == score


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No.", False),
        ("there is not", False),
        ("Yes. There is no dog", True),
        ("no, there", False),
        ("nobody", True),
        ("", True),
    ],
)
def test_pope_reads_the_first_sentence(answer, yes):
    assert says_yes(answer) is yes
    assert pope(answer, ["Yes" if yes else "no"]) == 1 and pope(answer, ["no" if yes else "yes"]) == 0


def test_pope_report():
    answers = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    labels = [["yes"], ["yes"], ["no"], ["yes"], ["no"], ["no"], ["no"], ["no"]]
    found = {"precision": 0.6667, "recall": 0.6667, "f1": 0.6667, "yes_ratio": 0.375}
    assert pope_report(answers, labels) == found
    assert pope_report(["no"], [["no"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


def test_pope_refuses_other_questions():
    with pytest.raises(ValueError, match="metric 'pope': the right answer 'red' has to be 'yes' or 'no'"):
        pope("yes", ["red"])


def test_scores_are_shares():
    for name, metric in METRICS.items():
        right = "B" if name == "multiple_choice" else "yes"
        assert metric(right, [right]) == 1, name


def test_the_interval_is_wilson_s():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 20)[0] == 0 and round(wilson_interval(0, 20)[1], 4) == 0.1611
    assert summarize([1.0, 0.3, 0.2, 0.5]) == {"score": 0.5, "n": 4, "ci95": [0.15, 0.85]}

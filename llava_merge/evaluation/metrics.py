# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Scores of written answers, each from 0 to 1, and their means with intervals.

A metric takes the answer of a model and the list of right ones.
"""

import math
import re
from collections.abc import Callable, Sequence
from operator import and_

from llava_merge.evaluation.vqa_normalization import in_one_line, normalize_textvqa, normalize_vqa


ANNOTATORS = 3  # who have to agree with an answer for the full VQA score
TOLERANCE = 0.05
CHOICE = re.compile(r"\(?(?P<letter>[A-Za-z])(?:\)|[.:,](?=\s|$)|$)")
CHOICE_IN_SENTENCE = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?i:is))?\s*:?\s*(?:(?i:option)\s+)?\(?(?P<letter>[A-Z])(?=\s*(?:[).:,]|$))"
)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is one of the right ones, but for case, spaces, and punctuation at the end."""
    return float(plain(answer) in map(plain, references))


def plain(text: str) -> str:
    """Without case, double spaces, and punctuation at the end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".!").lower()


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA's consensus of annotators (1505.00468): min(1, matches / 3) of all but one, mean over who is left out.

    Both sides are normalised as by the official script, which leaves them as they are where all annotators agree. Of
    one or two references, which VQA does not have, a normalised match is right.
    """
    if len(references) < ANNOTATORS:
        return float(normalize_vqa(answer) in map(normalize_vqa, references))
    agreed = len({in_one_line(reference) for reference in references}) == 1
    return consensus(answer, references, in_one_line if agreed else normalize_vqa)


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """TextVQA's (1904.08920): that of VQA, but always normalised, by other rules for commas, "?" and "'s"."""
    return consensus(answer, references, normalize_textvqa)


def consensus(answer: str, references: Sequence[str], normalize: Callable[[str], str]) -> float:
    """min(1, matches / 3) of all references but one, mean over which is left out; of one or two, a match."""
    written, right = normalize(answer), [normalize(reference) for reference in references]
    if len(right) < ANNOTATORS:
        return float(written in right)
    matches = right.count(written)
    shares = [min(1.0, (matches - (reference == written)) / ANNOTATORS) for reference in right]
    return sum(shares) / len(shares)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """ChartQA's (2203.10244), as lmms-eval has it: numbers may be off by 5 %, the rest has to match but for case."""
    return float(any(is_close(answer, reference) for reference in references))


def is_close(answer: str, reference: str) -> bool:
    """Whether a number is within 5 % of the right one; other text has to be equal."""
    written, right = to_number(answer), to_number(reference)
    if written is None or not right:
        return answer.lower() == reference.lower()
    return abs(written - right) / abs(right) <= TOLERANCE


def to_number(text: str) -> float | None:
    """A number, also with a percent sign, which divides it by 100; None where it is none, as with a comma in it."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def multiple_choice(answer: str, references: Sequence[str]) -> float:
    """Whether the letter that the answer chooses is the right one: of "B", "(B)", "B: cat", "The answer is B."

    Raises:
        ValueError: The right answer is no letter.
    """
    right = [chosen_letter(reference) for reference in references]
    if None in right:
        wrong = references[right.index(None)]
        raise ValueError(f"metric 'multiple_choice': the right answer {wrong!r} has to be a letter; use exact_match.")
    return float(chosen_letter(answer) in right)


def chosen_letter(text: str) -> str | None:
    """The letter of a choice, large; None where the text begins with none and says "answer" before none."""
    text = text.replace("*", "").strip()  # bold
    found = CHOICE.match(text) or CHOICE_IN_SENTENCE.search(text)
    return found["letter"].upper() if found else None


def says_yes(answer: str) -> bool:
    """How POPE (2305.10355) reads an answer: yes, unless its first sentence holds "no" or "not"."""
    words = answer.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def pope(answer: str, references: Sequence[str]) -> float:
    """Whether a question of yes and no is answered right, read as POPE does (2305.10355).

    Raises:
        ValueError: The right answer is neither yes nor no.
    """
    return float(says_yes(answer) == is_yes(references))


def is_yes(references: Sequence[str]) -> bool:
    """Whether the right answer is yes.

    Raises:
        ValueError: It is neither yes nor no.
    """
    label = plain(references[0])
    if label not in ("yes", "no"):
        raise ValueError(f"metric 'pope': the right answer {references[0]!r} has to be 'yes' or 'no'; use exact_match.")
    return label == "yes"


def pope_report(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and the share of answers that say it."""
    said, right = [says_yes(answer) for answer in answers], [is_yes(each) for each in references]
    hits = sum(map(and_, said, right))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(right))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    values = {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": sum(said) / len(said)}
    return {name: round(value, 4) for name, value in values.items()}


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "textvqa_accuracy": textvqa_accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "pope": pope,
    "multiple_choice": multiple_choice,
}


def summarize(scores: Sequence[float]) -> dict:
    """Mean, number, and the 95 % interval of the mean."""
    low, high = wilson_interval(sum(scores), len(scores))
    return {"score": round(sum(scores) / len(scores), 4), "n": len(scores), "ci95": [round(low, 4), round(high, 4)]}


def wilson_interval(right: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share; of scores between 0 and 1 it is on the safe side."""
    share, spread = right / total, z * z / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))

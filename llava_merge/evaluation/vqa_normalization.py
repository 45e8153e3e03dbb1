# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The normalisation of answers in the official evaluation of VQA (1505.00468), its oddities included."""

import re


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
MAX_PERIODS = 32  # the official script passes re.UNICODE, which is 32, as the count
ARTICLES = ("a", "an", "the")
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {name: str(value) for value, name in enumerate(NUMBERS)} | {"none": "0"}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def without_one_apostrophe(word: str) -> list[str]:
    """The spellings of a contracted word that lack one of its apostrophes."""
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {short: word for word in CONTRACTED for short in without_one_apostrophe(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the official table


def normalize_vqa(text: str) -> str:
    """An answer without case, punctuation, articles and number words, and with its apostrophes."""
    return strip_words(strip_punctuation(in_one_line(text)))


def normalize_textvqa(text: str) -> str:
    """The same as the evaluation of TextVQA does it (1904.08920), which drops commas and question marks first."""
    return normalize_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def in_one_line(text: str) -> str:
    """Without line breaks, tabs, and spaces at the ends."""
    return re.sub(r"[\n\t]", " ", text).strip()


def strip_punctuation(text: str) -> str:
    """Drops signs that stand beside a space anywhere in the text, or all of them where it holds 1,000."""
    stripped = text
    drop_all = NUMBER_WITH_COMMA.search(text) is not None
    for sign in PUNCTUATION:
        drops = drop_all or f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if drops else " ")
    return PERIOD.sub("", stripped, count=MAX_PERIODS)


def strip_words(text: str) -> str:
    """Words without articles, with digits for numbers and apostrophes where they belong."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Each training-free method against a slow and obvious one: lists and loops, one image at a time."""

import math

import pytest
import torch

from llava_merge.model.merging_cdpruner import cdpruner, conditional_dpp_picks
from llava_merge.model.merging_divprune import divprune, max_min_picks
from llava_merge.model.merging_fastervlm import fastervlm
from llava_merge.model.merging_mmtok import coverage_of_patches, coverage_picks, mmtok
from llava_merge.model.merging_prumerge_plus import evenly_spread, prumerge_plus
from llava_merge.model.merging_random import random_tokens
from llava_merge.model.merging_selection import (
    cosine_similarity,
    in_raster_order,
    largest,
    merge_into_nearest,
    other_patches,
    top_patches,
)
from llava_merge.model.merging_strided import strided_tokens
from llava_merge.model.merging_tome import tome
from llava_merge.model.merging_visionzip import visionzip
from llava_merge.model.merging_vispruner import vispruner


GRID, N, DIM, HEADS = (4, 6), 24, 8, 2
BUDGETS = pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 12, 13, 23, 24])


def images(kind: str) -> dict:
    """Three images: random, or with ties that are exact since all vectors lie on axes."""
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        features = torch.randn(3, N, DIM, generator=generator)
        keys = torch.randn(3, N, DIM, generator=generator)
        attention = torch.rand(3, N, generator=generator) / N
    elif kind == "constant":
        features = keys = torch.eye(DIM)[0].expand(3, N, DIM)
        attention = torch.full((3, N), 1 / 32)
    else:
        features, keys = (torch.eye(DIM)[torch.randint(5, (3, N), generator=generator)] for _ in range(2))
        attention = torch.randint(1, 4, (3, N), generator=generator) / 64
    return {"features": features, "keys": keys, "cls_attention": attention}


KINDS = pytest.mark.parametrize("kind", ["random", "constant", "duplicates"])


def similarities(vectors) -> list[list[float]]:
    normed = [vector / vector.norm().clamp(min=1e-12) for vector in vectors]
    return [[float(a @ b) for b in normed] for a in normed]


def highest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])


def check_kept(output, features, expected: list[list[int]]):
    """The patches of each image, as they were, in raster order."""
    assert output.positions.tolist() == expected
    for image, indices in enumerate(expected):
        assert torch.equal(output.merged_features[image], features[image, indices])
        assert torch.equal(output.source[image], torch.eye(N)[indices])
        similarity, sizes = similarities(features[image]), dict.fromkeys(indices, 0)
        for patch in range(N):  # the lost ones count for the nearest
            nearest = max(indices, key=lambda kept: (similarity[kept][patch], -kept))  # noqa: B023
            sizes[patch if patch in sizes else nearest] += 1
        assert output.sizes[image].tolist() == list(sizes.values())


def check_merged(output, expected: list[list[tuple[int, dict[int, float], int]]], features, scale=None):
    """Tokens given by place, the share of each patch, and size."""
    for image, tokens in enumerate(expected):
        assert output.positions[image].tolist() == [place for place, _, _ in tokens]
        if any(size > 1 for _, _, size in tokens):  # else the lost ones count for the nearest
            assert output.sizes[image].tolist() == [size for _, _, size in tokens]
        shares = torch.zeros(len(tokens), N)
        for row, (_, weights, _) in enumerate(tokens):
            for patch, weight in weights.items():
                shares[row, patch] += weight
        torch.testing.assert_close(output.source[image], shares)
        wanted = shares @ features[image]
        if scale:
            wanted = wanted * torch.tensor([scale(weights) for _, weights, _ in tokens])[:, None]
        torch.testing.assert_close(output.merged_features[image], wanted)


class TestBaselines:
    @BUDGETS
    def test_random_is_the_same_for_every_image_and_in_every_process(self, num_tokens):
        features = images("random")["features"]
        output = random_tokens(features, num_tokens, seed=3, return_source=True)
        kept = output.positions[0].tolist()
        assert len(set(kept)) == num_tokens
        check_kept(output, features, [kept] * 3)
        larger = random_tokens(features, min(N, num_tokens + 1), seed=3).positions[0].tolist()
        assert set(kept) <= set(larger)

    def test_the_seed_decides_and_draws_evenly(self):
        features = torch.zeros(1, 576, 1)
        drawn = torch.stack([random_tokens(features, 144, seed=seed).positions[0] for seed in range(200)])
        assert random_tokens(features, 4, seed=0).positions.tolist() == [[80, 97, 415, 574]]  # on any device
        share = torch.bincount(drawn.flatten(), minlength=576) / 200  # 0.25 each, deviation 0.031
        assert share.min() > 0.1 and share.max() < 0.4
        both = (drawn[:100, :, None] == drawn[100:, None]).any(dim=2).float().mean()
        assert abs(both - 0.25) < 0.02

    def test_strided_keeps_the_patch_nearest_each_centre(self):
        features = images("random")["features"]
        output = strided_tokens(features, GRID, 6, return_source=True)  # windows of 2 × 2
        check_kept(output, features, [[0, 2, 4, 12, 14, 16]] * 3)
        check_kept(strided_tokens(features, GRID, N, return_source=True), features, [list(range(N))] * 3)


class TestShared:
    def test_top_patches_take_the_earlier_of_equal_ones(self):
        scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
        assert top_patches(scores, 2).tolist() == [[1, 2], [0, 1]]
        assert other_patches(torch.tensor([[4, 1], [0, 2]]), 5).tolist() == [[0, 2, 3], [1, 3, 4]]
        assert in_raster_order(torch.tensor([[4, 1], [0, 2]]), 5).tolist() == [[1, 4], [0, 2]]

    @pytest.mark.parametrize("count", [0, 1, 4, 19, 20])
    def test_the_largest_are_those_of_a_stable_sort(self, count):
        scores = torch.randint(-4, 5, (3, 6, 20), generator=torch.Generator().manual_seed(count)).float()
        scores[scores == 4], scores[scores == 0] = torch.inf, -0.0
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, :, :count]
        for given in (scores, (scores.nan_to_num(posinf=9) * 5).long()):
            expected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
            assert torch.equal(largest(given, count), expected)

    def test_scores_that_are_no_numbers_choose_patches_all_the_same(self):
        chosen = top_patches(torch.full((2, 5), torch.nan), 3)
        assert chosen.shape == (2, 3) and chosen.min() >= 0 and chosen.max() < 5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_similarity_is_float32_and_finite(self, dtype):
        vectors = torch.randn(2, 5, DIM).to(dtype) * 100
        vectors[0, 0] = 0
        similarity = cosine_similarity(vectors, vectors)
        assert similarity.dtype == torch.float32 and similarity[0, 0].abs().max() == 0
        assert (similarity[1] - torch.tensor(similarities(vectors[1].float()))).abs().max() < 1e-6

    @KINDS
    def test_each_patch_goes_to_the_nearest_anchor(self, kind):
        given = images(kind)
        anchors = torch.tensor([[0, 5, 9], [3, 4, 23], [1, 2, 3]])
        output = merge_into_nearest(given["features"], anchors, given["features"], return_source=True)
        expected = []
        for features, kept in zip(given["features"], anchors.tolist(), strict=True):
            similarity, groups = similarities(features), {anchor: [] for anchor in kept}
            for patch in range(N):
                best = max(kept, key=lambda anchor: (similarity[anchor][patch], -anchor))  # noqa: B023
                groups[patch if patch in groups else best].append(patch)
            expected.append([(a, dict.fromkeys(group, 1 / len(group)), len(group)) for a, group in groups.items()])
        check_merged(output, expected, given["features"])


def slow_tome(features, num_tokens: int):
    tokens = [[patch] for patch in range(N)]
    while len(tokens) > num_tokens:
        means = [features[patches].sum(0) / len(patches) for patches in tokens]
        similarity = similarities(means)
        first, second = range(0, len(tokens), 2), range(1, len(tokens), 2)
        best = {a: max(second, key=lambda b: (similarity[a][b], -b)) for a in first}  # noqa: B023
        order = sorted(first, key=lambda a: (-similarity[a][best[a]], a))  # noqa: B023
        leaving = order[: min(len(tokens) // 2, len(tokens) - num_tokens)]
        for a in leaving:
            tokens[best[a]] = tokens[best[a]] + tokens[a]
        tokens = [patches for index, patches in enumerate(tokens) if index not in leaving]
    placed = []
    for patches in tokens:
        mean = [sum(value(patch) for patch in patches) / len(patches) for value in (lambda p: p // 6, lambda p: p % 6)]
        row, column = (min(range(6), key=lambda index: (abs(index - middle), index)) for middle in mean)  # noqa: B023
        placed.append((row * 6 + column, dict.fromkeys(patches, 1 / len(patches)), len(patches)))
    return sorted(placed, key=lambda token: token[0])


@KINDS
@BUDGETS
def test_tome(kind, num_tokens):
    features = images(kind)["features"]
    output = tome(features, GRID, num_tokens, return_source=True)
    check_merged(output, [slow_tome(image, num_tokens) for image in features], features)


def slow_visionzip(features, attention, keys, num_tokens: int, ratio: float):
    dominant = highest(attention.tolist(), max(1, round(num_tokens * ratio)))
    rest = [patch for patch in range(N) if patch not in dominant]
    num_merged = num_tokens - len(dominant)
    targets = rest[:: len(rest) // num_merged][:num_merged] if num_merged else []
    similarity = similarities((keys[:, :4] + keys[:, 4:]) / 2)
    groups = {target: [] for target in targets}
    for patch in rest:
        if targets and patch not in targets:
            groups[max(targets, key=lambda target: (similarity[target][patch], -target))].append(patch)  # noqa: B023
    tokens = [(patch, {patch: 1.0}, 1) for patch in dominant]
    for target, group in groups.items():
        shares = {target: 0.5 if group else 1.0, **dict.fromkeys(group, 0.5 / max(1, len(group)))}
        tokens.append((target, shares, 1 + len(group)))
    return sorted(tokens, key=lambda token: token[0])


@KINDS
@BUDGETS
@pytest.mark.parametrize("ratio", [54 / 64, 0.5])
@pytest.mark.parametrize("faithful", [False, True])
def test_visionzip(kind, num_tokens, ratio, faithful):
    given = images(kind)
    output = visionzip(
        **given, num_tokens=num_tokens, num_heads=HEADS, dominant_ratio=ratio, faithful=faithful, return_source=True
    )
    each = zip(given["features"], given["cls_attention"], given["keys"], strict=True)
    expected = [slow_visionzip(*image, num_tokens, ratio) for image in each]
    scale = (lambda weights: 2 if len(weights) > 1 else 1) if faithful else None
    check_merged(output, expected, given["features"], scale)


@KINDS
@BUDGETS
def test_fastervlm(kind, num_tokens):
    given = images(kind)
    output = fastervlm(given["features"], given["cls_attention"], num_tokens, return_source=True)
    check_kept(output, given["features"], [highest(each.tolist(), num_tokens) for each in given["cls_attention"]])


def slow_prumerge_plus(features, attention, keys, num_tokens: int, ratio: float):
    if num_tokens == N:
        return [(patch, {patch: 1.0}, 1) for patch in range(N)]
    important = highest(attention.tolist(), max(1, round(num_tokens * ratio)))
    rest, wanted = [patch for patch in range(N) if patch not in important], num_tokens - len(important)
    kept = sorted(important + [rest[int((index + 0.5) * len(rest) / wanted)] for index in range(wanted)])
    similarity, tokens = similarities(keys), []
    owners = {patch: max(kept, key=lambda each: (similarity[each][patch], -each)) for patch in range(N)}  # noqa: B023
    owners |= {patch: patch for patch in kept}
    for patch in kept:
        others = sorted((each for each in range(N) if each != patch), key=lambda each: (-similarity[patch][each], each))  # noqa: B023
        weights = {patch: 1.0, **{other: float(attention[other]) for other in others[:1]}}  # a 18th of 24
        shares = {each: weight / sum(weights.values()) for each, weight in weights.items()}
        tokens.append((patch, shares, [*owners.values()].count(patch)))
    return tokens


@KINDS
@BUDGETS
@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("faithful", [False, True])
def test_prumerge_plus(kind, num_tokens, ratio, faithful):
    given = images(kind)
    output = prumerge_plus(**given, num_tokens=num_tokens, important_ratio=ratio, faithful=faithful, return_source=True)
    each = zip(given["features"], given["cls_attention"], given["keys"], strict=True)
    expected = [slow_prumerge_plus(*image, num_tokens, ratio) for image in each]
    scale = (lambda weights: 1 / max(weights.values())) if faithful else None  # its own patch weighs 1
    check_merged(output, expected, given["features"], scale)


def test_the_spread_patches_are_even():
    assert evenly_spread(torch.arange(12)[None], 3).tolist() == [[2, 6, 10]]
    assert evenly_spread(torch.arange(12)[None], 12).tolist() == [[*range(12)]]
    assert evenly_spread(torch.arange(12)[None], 0).tolist() == [[]]


def slow_vispruner(features, attention, num_tokens: int, ratio: float):
    important = highest(attention.tolist(), int(num_tokens * ratio + 0.5))
    alive = [patch for patch in range(N) if patch not in important]
    wanted, similarity = num_tokens - len(important), similarities(features)
    while wanted and len(alive) > wanted:
        first, second = alive[::2], alive[1::2]
        nearest = {patch: max(similarity[patch][other] for other in second) for patch in first}
        removed = sorted(first, key=lambda patch: (-nearest[patch], -patch))[: min(8, len(alive) - wanted)]  # noqa: B023
        alive = [patch for patch in alive if patch not in removed]
    return sorted(important + alive) if wanted else important


@KINDS
@BUDGETS
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.0, 1.0])
def test_vispruner(kind, num_tokens, ratio):
    given = images(kind)
    features, attention = given["features"], given["cls_attention"]
    output = vispruner(features, attention, num_tokens, ratio, return_source=True)
    each = zip(features, attention, strict=True)
    check_kept(output, features, [slow_vispruner(*image, num_tokens, ratio) for image in each])


def slow_divprune(features, num_tokens: int) -> list[int]:
    distance = [[1 - value for value in row] for row in similarities(features)]
    chosen = [max(range(N), key=lambda i: (min(distance[j][i] for j in range(N) if j != i), -i))]
    while len(chosen) < num_tokens:
        rest = [i for i in range(N) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[j][i] for j in chosen), -i)))  # noqa: B023
    return chosen


@KINDS
@BUDGETS
def test_divprune_picks_one_by_one(kind, num_tokens):
    features = images(kind)["features"]
    picks = [slow_divprune(image, num_tokens) for image in features]
    assert max_min_picks(features, num_tokens).tolist() == picks
    check_kept(divprune(features, num_tokens, return_source=True), features, [sorted(image) for image in picks])


def slow_cdpruner(features, relevance, num_tokens: int) -> list[int]:
    """Each pick makes the determinant of the kernel of the picks largest."""
    similarity = torch.tensor(similarities(features), dtype=torch.float64)
    weight = (relevance.double() - relevance.min() + 1e-6) / max(float(relevance.max() - relevance.min()), 1e-6)
    kernel = weight[:, None] * similarity * weight
    chosen = []
    while len(chosen) < num_tokens:
        rest = [i for i in range(N) if i not in chosen]
        gain = {i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest}
        chosen.append(max(rest, key=lambda i: (gain[i], -i)))  # noqa: B023
    return chosen


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8])
def test_cdpruner_picks_one_by_one(num_tokens):
    """As many as the rank, behind which all determinants are 0."""
    features = images("random")["features"]
    relevance = torch.rand(3, N, generator=torch.Generator().manual_seed(1))
    picks = [slow_cdpruner(*image, num_tokens) for image in zip(features, relevance, strict=True)]
    assert conditional_dpp_picks(features, relevance, num_tokens).tolist() == picks
    kept = cdpruner(features, relevance, num_tokens, return_source=True)
    check_kept(kept, features, [sorted(image) for image in picks])


def test_cdpruner_takes_mixtures_last_and_by_relevance():
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(3, 4, 8, generator=generator)
    mixing = torch.randn(3, N, 4, generator=generator)
    relevance = torch.rand(3, N, generator=generator)
    for features in (directions.repeat(1, N // 4, 1), mixing @ directions):  # copies of four, and mixtures of them
        for picks, weights in zip(conditional_dpp_picks(features, relevance, N).tolist(), relevance, strict=True):
            rest = [float(weights[pick]) for pick in picks[4:]]
            assert rest == sorted(rest, reverse=True) and len(set(picks)) == N


def test_cdpruner_without_a_question_starts_with_the_first_patch():
    """All patches matter alike then; rounding would choose, and choose anew in a batch of another size."""
    features = torch.randn(16, N, 48, generator=torch.Generator().manual_seed(5))
    relevance = torch.zeros(16, N)
    assert not conditional_dpp_picks(features, relevance, 2)[:, 0].any()


def slow_coverage(features, word_relevance) -> list[list[float]]:
    """By METHODS, entry by entry; words that are none cover nothing."""
    words = word_relevance.T.tolist()
    is_word, rows = [word[0] != -math.inf for word in words], []
    for scores, temperature, share in [
        *((word, 0.02, 1 / sum(is_word) if there else 0) for word, there in zip(words, is_word, strict=True)),
        *((row, 0.2, 0.5 / N) for row in similarities(features)),
    ]:
        powers = [math.exp(score / temperature) if share else 1.0 for score in scores]
        rows.append([share * power / sum(powers) for power in powers])
    return rows


def slow_mmtok(features, word_relevance, num_tokens: int) -> list[int]:
    """Each pick adds most to what is covered."""
    rows = slow_coverage(features, word_relevance)
    chosen, covered = [], [0.0] * len(rows)
    while len(chosen) < num_tokens:
        rest = [i for i in range(N) if i not in chosen]
        gain = {i: sum(max(0.0, row[i] - most) for row, most in zip(rows, covered, strict=True)) for i in rest}
        chosen.append(max(rest, key=lambda i: (gain[i], -i)))  # noqa: B023
        covered = [max(row[chosen[-1]], most) for row, most in zip(rows, covered, strict=True)]
    return chosen


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, N])
def test_mmtok_picks_one_by_one(num_tokens):
    features = images("random")["features"]
    words = 0.1 * torch.randn(3, N, 6, generator=torch.Generator().manual_seed(1))
    words[0, :, 4:] = words[1, :, 0] = -torch.inf
    words[2] = -torch.inf  # no question
    coverage = coverage_of_patches(features, words)
    expected = torch.tensor([slow_coverage(*image) for image in zip(features, words, strict=True)])
    torch.testing.assert_close(coverage, expected, atol=1e-6, rtol=1e-4)
    picks = [slow_mmtok(*image, num_tokens) for image in zip(features, words, strict=True)]
    assert coverage_picks(coverage, num_tokens).tolist() == picks
    check_kept(mmtok(features, words, num_tokens, return_source=True), features, [sorted(image) for image in picks])


@KINDS
@BUDGETS
def test_mmtok_keeps_as_many_patches_as_asked(kind, num_tokens):
    features = images(kind)["features"]
    picks = coverage_picks(coverage_of_patches(features, torch.zeros(3, N, 2)), num_tokens)
    assert all(len(set(image)) == num_tokens for image in picks.tolist())


@KINDS
@BUDGETS
def test_cdpruner_keeps_different_patches_also_behind_the_rank(kind, num_tokens):
    features = images(kind)["features"]
    for relevance in (torch.zeros(3, N), torch.rand(3, N)):
        picks = conditional_dpp_picks(features, relevance, num_tokens)
        assert all(len(set(image)) == num_tokens for image in picks.tolist())
        alone = [conditional_dpp_picks(features[i : i + 1], relevance[i : i + 1], num_tokens) for i in range(3)]
        assert torch.equal(torch.cat(alone), picks)

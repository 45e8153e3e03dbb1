# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every method through the same promises, and each method's own. A new method is one row in METHODS."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import Operators
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import adaptive_avg_pool2d

from llava_merge import (
    MERGING_METHODS,
    LearnableTokenMergerV3,
    MergeContext,
    MergeExtras,
    MergerConfig,
    Question,
    TokenMerger,
    list_mergers,
)
from llava_merge.model.merging_fixed_pooling import soft_maximum_of_turns
from llava_merge.model.merging_grid import (
    NUM_KEPT,
    cell_weights,
    patch_distances,
    sample_query_map,
    slot_centres,
    slot_geometry,
    slots_per_row,
    squared_distances,
    window_weights,
)


METHODS = {
    "none": {"num_merged_tokens": None},
    "average_pooling": {},
    "fixed_pooling": {},
    "fixed_pooling-question": {"question_aware": True},
    "fixed_pooling-random": {"init": "random"},
    "fixed_pooling-random-question": {"init": "random", "question_aware": True},
    "fixed_pooling-layers-question": {"feature_layers": [1, 2], "question_aware": True},
    "salient_pooling": {},
    "salient_pooling-question": {"question_aware": True},
    "salient_pooling-layers": {"feature_layers": [1, 2]},
    "resampler": {},
    "mqt": {},
    "c_abstractor": {},
    "tokenpacker": {"feature_layers": [1, 2]},
    "quecc": {"feature_layers": [1, 2], "question_aware": False},
    "quecc-question": {"feature_layers": [1, 2]},
    "random": {"seed": 3},
    "strided": {},
    "tome": {},
    "visionzip": {},
    "visionzip-faithful": {"faithful": True},
    "vispruner": {},
    "fastervlm": {},
    "mmtok": {},
    "prumerge_plus": {},
    "prumerge_plus-faithful": {"faithful": True},
    "divprune": {},
    "cdpruner": {},
    "gumbel_topk": {},
    "gumbel_topk-soft": {"estimator": "soft_topk"},
    "gumbel_topk_question": {},
    "gumbel_topk_question-soft": {"estimator": "soft_topk"},
}
MIXING = (
    "fixed_pooling",
    "salient_pooling",
    "resampler",
    "mqt",
    "c_abstractor",
    "tokenpacker",
    "quecc",
)  # whose tokens are no means of patches
LINEAR = [name for name in METHODS if not name.startswith(MIXING) and not name.endswith("-faithful")]
DRAWING = [name for name in METHODS if name.startswith("gumbel")]
QUESTION = [name for name in METHODS if "question" in name]
IN_STEPS = [name for name, method in MERGING_METHODS.items() if method.chooses_in_steps]
ALL = pytest.mark.parametrize("name", METHODS)
POOLING = pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
BUDGETS = [576, 288, 144, 64, 37, 16, 4, 1]


def make(name: str, trained: bool = True, **fields) -> TokenMerger:
    """A small merger of that row; `trained` moves it away from its initialisation."""
    fields = {"num_merged_tokens": 9, "vision_dim": 32, "text_dim": 24, "num_heads": 4, **METHODS[name], **fields}
    merger = TokenMerger(MergerConfig(merger_type=name.split("-")[0], **fields)).eval()
    if trained:
        generator = torch.Generator().manual_seed(1)
        for parameter in merger.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return merger


def inputs(num_images: int = 3, num_patches: int = 36, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(num_images, 5, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "features": torch.randn(num_images, num_patches, 32, generator=generator).to(dtype),
        "question": Question.of_each_image(torch.randn(num_images, 5, 24, generator=generator).to(dtype), mask),
        "extras": MergeExtras(
            cls_attention=torch.rand(num_images, num_patches, generator=generator) / num_patches,
            keys=torch.randn(num_images, num_patches, 32, generator=generator).to(dtype),
            num_heads=4,
            relevance=torch.rand(num_images, num_patches, generator=generator),
            word_relevance=0.1 * torch.randn(num_images, num_patches, 5, generator=generator),
            layers=tuple(torch.randn(2, num_images, num_patches, 32, generator=generator).to(dtype)),
        ),
    }


def images_of(batch: dict, order) -> dict:
    """The batch with these images of it."""
    question = batch["question"]
    mask = question.mask.reshape(3, 3, 5)[range(3), range(3)]
    return {
        "features": batch["features"][order],
        "question": Question.of_each_image(question.embeds[order], mask[order]),
        "extras": batch["extras"].of_images(torch.as_tensor(order)),
    }


def test_every_method_is_in_the_matrix():
    merging = {merger.name for merger in list_mergers() if not MERGING_METHODS[merger.name].resizes_pictures}
    assert {name.split("-")[0] for name in METHODS} == merging  # the others are in test_image_resize


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_dtype_and_no_nan(name, dtype):
    output = make(name).to(dtype)(**inputs(dtype=dtype))
    assert output.merged_features.shape == (3, 36 if name == "none" else 9, 32)
    assert output.merged_features.dtype == dtype and output.merged_features.isfinite().all()
    assert output.source is None and output["merged_features"] is output.merged_features


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DRAWING])
def test_half_precision_is_near_full_precision(name):
    """Of the same numbers: similarities are float32 either way, so that the same patches are chosen."""
    merger, batch = make(name), inputs(dtype=torch.bfloat16)
    half = merger.to(torch.bfloat16)(**batch)
    extras, question = batch["extras"], batch["question"].to("cpu", torch.float32)
    extras = replace(extras, keys=extras.keys.float(), layers=tuple(layer.float() for layer in extras.layers))
    expected = merger.float()(batch["features"].float(), question, extras=extras)
    difference = (half.merged_features.float() - expected.merged_features).norm()
    assert difference / expected.merged_features.norm() < 0.02
    assert torch.equal(half.positions, expected.positions)


@pytest.mark.parametrize("name", DRAWING)
def test_learned_scores_in_half_precision_are_near_those_in_full_precision(name):
    """What they choose may differ then, where two of them are near."""
    merger, batch = make(name), inputs(dtype=torch.bfloat16)
    context = MergeContext((6, 6), 9, batch["question"])
    half = merger.to(torch.bfloat16).method.score(batch["features"], context).float()
    context.question = batch["question"].to("cpu", torch.float32)
    expected = merger.float().method.score(batch["features"].float(), context)
    assert (half - expected).norm() / expected.norm() < 0.02


@ALL
def test_autocast_changes_nothing(name):
    """Similarities, sizes and weights that are float32 stay so in mixed precision."""
    merger = make(name)
    expected = merger(**inputs(), return_source=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = merger(**inputs(), return_source=True)
    for key in ("merged_features", "source", "positions", "sizes"):
        found, wanted = getattr(output, key), getattr(expected, key)
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype, key


@ALL
def test_source_is_row_stochastic(name):
    source = make(name)(**inputs(), return_source=True).source
    assert source.shape == (3, 36 if name == "none" else 9, 36)
    assert (source >= 0).all()
    torch.testing.assert_close(source.sum(-1), torch.ones(source.shape[:2]))


@ALL
@pytest.mark.parametrize("num_tokens", [9, 1, 35, 36])
def test_tokens_leave_in_raster_order_and_stand_for_all_patches(name, num_tokens):
    output = make(name)(**inputs(), num_tokens=num_tokens)
    assert output.positions.dtype == torch.int64 and output.positions.shape == output.merged_features.shape[:2]
    assert (output.positions.diff(dim=1) >= 0).all() and 0 <= output.positions.min() and output.positions.max() < 36
    torch.testing.assert_close(output.sizes.sum(dim=1), torch.full((3,), 36.0))


@pytest.mark.parametrize("name", LINEAR)
def test_all_patches_are_kept_as_they_are_at_m_equal_n(name):
    output = make(name)(**inputs(), num_tokens=36)
    torch.testing.assert_close(output.merged_features, inputs()["features"])
    assert output.positions.tolist() == 3 * [list(range(36))] and output.sizes.unique().tolist() == [1.0]


@pytest.mark.parametrize("name", LINEAR)
def test_source_times_features_is_the_result_of_a_linear_method(name):
    output = make(name)(**inputs(), return_source=True)
    torch.testing.assert_close(output.source @ inputs()["features"], output.merged_features)


@ALL
def test_a_batch_equals_its_images_alone(name):
    merger, batch = make(name), inputs()
    together = merger(**batch).merged_features
    for index in range(3):
        alone = merger(**images_of(batch, [index])).merged_features
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-5)


@ALL
def test_permuting_the_batch_permutes_the_result(name):
    merger, batch, order = make(name), inputs(), torch.tensor([2, 0, 1])
    permuted = merger(**images_of(batch, order)).merged_features
    torch.testing.assert_close(permuted, merger(**batch).merged_features[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DRAWING])
def test_training_and_inference_are_the_same(name):
    merger = make(name)
    assert torch.equal(merger.train()(**inputs()).merged_features, merger.eval()(**inputs()).merged_features)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in IN_STEPS])
def test_nothing_is_sorted(name):
    """Inductor makes a network of comparisons of a sort, and compiles minutes for one of 576 on a GPU."""
    merger, given = make(name), inputs()
    with Operators() as called:
        merger(**given, return_source=True)
    assert called.counts and not called.counts.keys() & {"sort", "argsort", "msort"}


@ALL
def test_features_of_a_token_lie_side_by_side(name):
    """Linear layers of vLLM refuse anything else, at the first request."""
    batch = inputs()
    batch["features"] = torch.cat((batch["features"], batch["features"]), dim=1)[:, 36:]  # as [:, 1:] drops CLS
    merged = make(name)(**batch).merged_features
    assert merged.stride(-1) == 1 and (merged.is_contiguous() or name == "none")


@POOLING
@pytest.mark.parametrize("num_tokens", [36, 18, 9, 7, 1])
def test_every_budget_up_to_n(name, num_tokens):
    assert make(name)(**inputs(), num_tokens=num_tokens).merged_features.shape == (3, num_tokens, 32)


@POOLING
def test_grids_that_are_not_square(name):
    batch = inputs(num_patches=24)
    assert make(name)(**batch, grid=(4, 6)).merged_features.shape == (3, 9, 32)
    if MERGING_METHODS[name.split("-")[0]].needs_grid:
        with pytest.raises(ValueError, match="24 visual tokens do not fill"):
            make(name)(**batch)


@ALL
def test_compiles_without_graph_break(name):
    torch._dynamo.reset()  # all methods share one code object, and it is compiled eight times at most
    merger = make(name)
    compiled = torch.compile(merger, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs()).merged_features, merger(**inputs()).merged_features)


@ALL
def test_round_trip_on_disk(name, tmp_path):
    merger = make(name)
    merger.save_pretrained(tmp_path)
    again = TokenMerger.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs()).merged_features, merger(**inputs()).merged_features)


@pytest.mark.parametrize("name", [name for name in METHODS if not MERGING_METHODS[name.split("-")[0]].training_free])
def test_gradients_reach_every_parameter(name):
    merger = make(name).train()
    merger(**inputs()).merged_features.square().sum().backward()
    without = [n for n, p in merger.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("name", QUESTION)
def test_the_question_changes_the_result_and_its_absence_is_the_agnostic_path(name):
    merger, batch = make(name), inputs()
    embeds = batch["question"].embeds
    mask = batch["question"].mask.reshape(3, 3, 5)[range(3), range(3)]

    def merged_for(question: Question | None):
        return merger(**{**batch, "question": question}).merged_features

    result = merged_for(batch["question"])
    difference = (merged_for(Question.of_each_image(embeds.flip(0), mask)) - result).abs().amax(dim=(1, 2))[[0, 2]]
    assert (difference.max() if name in DRAWING else difference.min()) > 1e-4  # a choice may stay
    padded = embeds.clone()
    padded[0, 3:] = 100.0
    assert torch.equal(merged_for(Question.of_each_image(padded, mask)), result)
    assert torch.equal(merged_for(Question.of_each_image(embeds, torch.zeros_like(mask))), merged_for(None))


@pytest.mark.parametrize("name", QUESTION)
def test_images_of_a_turn_share_its_question(name):
    merger, batch = make(name), inputs()
    embeds = batch["question"].embeds[:2]
    token_turns = torch.tensor([[0, 0, 3, 3, 3], [3, 2, 2, 3, 3]])  # of rows with images 0 and 1, and 2
    question = Question(embeds, token_turns, torch.tensor([0, 0, 2]))
    shared = merger(**{**batch, "question": question}).merged_features
    for image, words in enumerate((embeds[0, :2], embeds[0, :2], embeds[1, 1:3])):
        alone = merger(**{**images_of(batch, [image]), "question": words[None]}).merged_features[0]
        torch.testing.assert_close(shared[image], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", QUESTION)
def test_a_question_is_embedded_once_for_all_images_of_its_turn(name):
    merger, rows = make(name), []
    merger.method.query_modulator.token_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    embeds = inputs()["question"].embeds[:1]
    question = Question(embeds, torch.zeros(1, 5, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    merger(**{**inputs(), "question": question})
    assert rows == [(1, 5, 24)]


def test_scores_of_one_turn_do_not_drown_those_of_another():
    tokens = torch.tensor([[100.0], [101.0], [-100.0], [-101.0]])
    question = Question(tokens[None], torch.tensor([[0, 0, 1, 1]]), torch.tensor([0, 1]))
    pooled = soft_maximum_of_turns(tokens, question, sharpness=4.0)
    torch.testing.assert_close(pooled, torch.tensor([[100.982], [-100.018]]), atol=1e-3, rtol=0)


class TestAveragePoolingInit:
    @pytest.mark.parametrize("question_aware", [False, True])
    @pytest.mark.parametrize("num_tokens", BUDGETS)
    def test_fixed_pooling_starts_as_average_pooling(self, num_tokens, question_aware):
        features = torch.randn(2, 576, 64)
        fields = {"num_merged_tokens": num_tokens, "vision_dim": 64, "text_dim": 32}
        pooled = TokenMerger(MergerConfig(merger_type="average_pooling", **fields))(features).merged_features
        fixed = TokenMerger(MergerConfig(question_aware=question_aware, **fields))
        for question in (None, torch.randn(2, 7, 32)):
            merged = fixed(features, question).merged_features
            torch.testing.assert_close(merged, pooled, atol=1e-5, rtol=0)

    def test_one_set_of_weights_is_average_pooling_at_every_budget(self):
        features = torch.randn(2, 576, 64)
        fixed = TokenMerger(MergerConfig(num_merged_tokens=64, vision_dim=64))
        pooling = TokenMerger(MergerConfig(merger_type="average_pooling", num_merged_tokens=64, vision_dim=64))
        for num_tokens in BUDGETS:
            expected = pooling(features, num_tokens=num_tokens).merged_features
            merged = fixed(features, num_tokens=num_tokens).merged_features
            torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)

    def test_trained_windows_still_mix_only_their_own_patches(self):
        """The first branch stays inside the slot's window, so that a token keeps its place in the picture."""
        merger = make("fixed_pooling")
        torch.nn.init.zeros_(merger.method.output_proj.weight)  # the second branch
        source = merger(**inputs(), return_source=True).source
        outside = window_weights((6, 6), 9) == 0
        assert source[:, outside].abs().max() == 0

    def test_the_second_branch_sees_the_whole_picture(self):
        merger, batch = make("fixed_pooling"), inputs()
        changed = {**batch, "features": batch["features"].clone()}
        changed["features"][:, -1] = torch.randn(32)  # the last patch is far from the first slot
        difference = merger(**changed).merged_features[:, 0] - merger(**batch).merged_features[:, 0]
        assert difference.abs().max() > 1e-5


class TestGeometry:
    @pytest.mark.parametrize("rows, columns", [(24, 24), (12, 12), (8, 8), (4, 4), (1, 1)])
    def test_windows_that_divide_the_grid_are_adaptive_average_pooling(self, rows, columns):
        features = torch.randn(1, 5, 24, 24)
        expected = adaptive_avg_pool2d(features, (rows, columns)).flatten(2).transpose(1, 2)
        weights = window_weights((24, 24), rows * columns)
        torch.testing.assert_close(weights @ features.flatten(2).transpose(1, 2), expected)

    @pytest.mark.parametrize("grid", [(24, 24), (27, 27), (5, 7)])
    @pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 12, 16, 23])
    def test_windows_pool_by_area(self, grid, num_slots):
        """Against a fine raster on which every patch and every slot is a block of whole pixels."""
        lengths = slots_per_row(num_slots)
        height, width = grid[0] * len(lengths), grid[1] * math.lcm(*lengths)
        y, x = torch.arange(height), torch.arange(width)
        patch = (y * grid[0] // height)[:, None] * grid[1] + x * grid[1] // width
        expected = torch.zeros(num_slots, grid[0] * grid[1])
        first = 0
        for row, length in enumerate(lengths):
            inside_row = y * len(lengths) // height == row
            for column in range(length):
                covered = patch[inside_row][:, x * length // width == column].flatten()
                expected[first + column] = torch.bincount(covered, minlength=expected.shape[1]) / covered.numel()
            first += length
        torch.testing.assert_close(window_weights(grid, num_slots), expected)

    def test_every_patch_is_seen_equally_where_rows_are_equal(self):
        for num_slots in (576, 288, 144, 64, 16, 1):
            torch.testing.assert_close(
                window_weights((24, 24), num_slots).sum(0), torch.full((576,), num_slots / 576), atol=1e-6, rtol=0
            )

    def test_all_patches_are_kept_as_they_are_at_m_equal_n(self):
        assert torch.equal(window_weights((24, 24), 576), torch.eye(576))

    def test_layouts(self):
        assert slots_per_row(288) == [18] * 16
        assert slots_per_row(37) == [7, 6, 6, 6, 6, 6]
        assert slots_per_row(64) == [8] * 8 and slots_per_row(1) == [1] and slots_per_row(3) == [2, 1]
        for num_slots in range(1, 600):
            lengths = slots_per_row(num_slots)
            assert sum(lengths) == num_slots and max(lengths) - min(lengths) <= 1
            assert max(lengths) <= 2 * len(lengths)

    def test_slots_are_nearest_to_their_own_windows(self):
        for num_slots in (36, 9, 7, 4):
            nearest = squared_distances((6, 6), num_slots).argmin(dim=0)
            strongest = window_weights((6, 6), num_slots).argmax(dim=0)
            assert (nearest == strongest).float().mean() > 0.8

    def test_query_map_is_exact_on_its_own_cells_and_linear_between(self):
        y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(8) + 0.5) / 8, indexing="ij")
        plane = torch.stack((2 * x + 3 * y, y - x), dim=-1)
        assert torch.equal(sample_query_map(plane, slot_centres(64)), plane.flatten(0, 1))
        sampled = sample_query_map(plane, slot_centres(16)).reshape(4, 4, 2)
        centre = (torch.arange(4) + 0.5) / 4
        torch.testing.assert_close(sampled[..., 0], 3 * centre[:, None] + 2 * centre)


@pytest.mark.parametrize("budget", [4, 16, 300])
@pytest.mark.parametrize("made_for", [9, 300])
@pytest.mark.parametrize("name", [name for name in METHODS if not MERGING_METHODS[name.split("-")[0]].training_free])
def test_a_merger_whose_budget_was_changed_is_saved_and_loaded(name, made_for, budget, tmp_path):
    """`set_num_merged_tokens` changes the budget alone: shapes of weights that followed from it have to be known."""
    merger, batch = make(name, num_merged_tokens=made_for), inputs(num_patches=400)
    merger.config.num_merged_tokens = budget
    merger.save_pretrained(tmp_path)
    again = TokenMerger.from_pretrained(tmp_path).eval()
    assert again.config.num_merged_tokens == budget
    if name == "mqt" and (made_for, budget) == (9, 300):
        for each in (merger, again):
            with pytest.raises(ValueError, match="num_merged_tokens=300: this mqt has 256 queries"):
                each(**batch)
        return
    assert torch.equal(again(**batch).merged_features, merger(**batch).merged_features)


class TestDocumentName:
    def test_it_is_v3(self):
        merger = LearnableTokenMergerV3(d_vision=32, d_text=24, num_merged_tokens=9, num_heads=4, question_aware=True)
        result = merger(inputs()["features"], inputs()["question"].embeds)
        assert result["merged_features"].shape == (3, 9, 32)
        assert merger.config.merger_type == "fixed_pooling"
        names = {name.removeprefix("method.").split(".")[0] for name, _ in merger.named_parameters()}
        assert {"pool_queries", "query_modulator", "pool_attention", "output_proj"} <= names


class TestKeptGeometry:
    def test_it_is_made_once_for_a_grid_a_budget_and_a_device(self):
        first = slot_geometry((6, 6), 9, torch.device("cpu"))
        assert slot_geometry((6, 6), 9, torch.device("cpu")) is first
        assert slot_geometry((6, 6), 4, torch.device("cpu")).windows.shape == (4, 36)

    @pytest.mark.parametrize("name", ["fixed_pooling", "quecc", "salient_pooling", "average_pooling"])
    def test_fake_tensors_are_neither_kept_nor_given_kept_ones(self, name):
        """As shapes are found without computing: before and after a real call of the same sizes."""
        merger, batch = make(name), inputs(num_patches=34)
        batch["grid"] = (2, 17)  # whose geometry nobody else has asked for

        def fake():
            with FakeTensorMode(allow_non_fake_inputs=True):
                features = torch.empty(3, 34, 32)
                layers = tuple(torch.empty(3, 34, 32) for _ in range(2))
                extras = MergeExtras(layers=layers) if name == "quecc" else None
                assert isinstance(merger(features, grid=(2, 17), extras=extras).merged_features, FakeTensor)

        fake()
        expected = merger(**batch).merged_features
        assert type(expected) is torch.Tensor
        fake()
        assert torch.equal(merger(**batch).merged_features, expected)

    @pytest.mark.parametrize("name", [method.name for method in list_mergers()])
    def test_every_merger_can_be_made_of_fake_tensors(self, name):
        num_merged_tokens = None if name == "none" else 9
        with FakeTensorMode():
            merger = TokenMerger(MergerConfig(merger_type=name, num_merged_tokens=num_merged_tokens))
        assert all(isinstance(parameter.data, FakeTensor) for parameter in merger.parameters())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_it_is_of_float32_whatever_the_default_is(self, dtype):
        """Which from_pretrained changes while it builds a model."""
        cpu = torch.device("cpu")
        torch.set_default_dtype(dtype)
        try:
            made = vars(slot_geometry((4, 9), 5, cpu))
            others = [cell_weights((4, 9), 5, 2, cpu), patch_distances((4, 9), cpu)]
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(tensor.dtype == torch.float32 for name, tensor in made.items() if name != "places")
        assert all(tensor.dtype == torch.float32 for tensor in others)

    def test_what_a_recorded_graph_has_made_is_its_own(self, monkeypatch):
        cpu = torch.device("cpu")
        with monkeypatch.context() as recording:
            recording.setattr("llava_merge.model.merging_grid.is_recording", lambda: True)
            one = slot_geometry((5, 9), 4, cpu)
        assert slot_geometry((5, 9), 4, cpu) is not one

    def test_no_more_than_the_newest_are_kept(self):
        cpu, first = torch.device("cpu"), slot_geometry((3, 23), 1, torch.device("cpu"))
        for num_slots in range(2, NUM_KEPT + 2):
            last = slot_geometry((3, 23), num_slots, cpu)
        assert slot_geometry((3, 23), NUM_KEPT + 1, cpu) is last
        assert slot_geometry((3, 23), 1, cpu) is not first

    def test_a_merger_that_answered_in_inference_mode_trains_afterwards(self):
        merger, batch = make("fixed_pooling"), inputs(num_patches=33)
        batch["grid"] = (3, 11)  # whose geometry nobody else has asked for
        with torch.inference_mode():
            merger(**batch)
        merger(**batch).merged_features.sum().backward()
        assert merger.method.locality.grad.abs().sum() > 0

    def test_a_forward_does_not_make_it_anew(self):
        merger, batch = make("fixed_pooling"), inputs()
        merger(**batch)
        with torch.profiler.profile() as profile:
            merger(**batch)
        assert not {"aten::arange", "aten::log", "aten::floor_divide"} & {event.key for event in profile.key_averages()}

# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""V1 and V2, which train otherwise than they answer: what they draw, what their gradients say, and that they learn."""

import pytest
import torch
from conftest import aware, pixels, prompts, tiny_model

from llava_merge import LlavaMergeForConditionalGeneration, MergerConfig, Question, TokenMerger
from llava_merge.model.merging_gumbel_topk import best_tokens, drowned, sampled_tokens, soft_topk


N, DIM = 24, 16
ESTIMATORS = pytest.mark.parametrize("estimator", ["gumbel", "soft_topk"])


def make(merger_type: str = "gumbel_topk", num_merged_tokens: int = 5, **fields) -> TokenMerger:
    sizes = {"vision_dim": DIM, "text_dim": 12, "num_merged_tokens": num_merged_tokens}
    return TokenMerger(MergerConfig(merger_type=merger_type, **sizes, **fields))


def slow_soft_topk(logits, num_tokens: int) -> torch.Tensor:
    """By walking: the threshold moves until the sum is right."""
    threshold = torch.zeros((), dtype=torch.float64)
    for step in (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        while (logits.double() + threshold).sigmoid().sum() < num_tokens:
            threshold += step
        while (logits.double() + threshold).sigmoid().sum() > num_tokens:
            threshold -= step
    return (logits.double() + threshold).sigmoid().float()


class TestSoftTopK:
    @pytest.mark.parametrize("num_tokens", [1, 5, 23])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
    def test_it_is_the_shifted_sigmoid_that_sums_to_m(self, num_tokens, scale):
        logits = torch.randn(3, N) * scale
        expected = torch.stack([slow_soft_topk(row, num_tokens) for row in logits])
        torch.testing.assert_close(soft_topk(logits, num_tokens), expected, atol=1e-4, rtol=1e-4)

    def test_it_sums_to_m_on_any_scale(self):
        for scale in (1e-4, 1.0, 1e4):
            logits = torch.randn(2, 576) * scale
            for num_tokens in (1, 64, 575, 576):
                total = soft_topk(logits, num_tokens).sum(dim=1)
                assert (total - num_tokens).abs().max() < 0.02, (scale, total)

    def test_its_gradient_is_that_of_shares_whose_sum_stays(self):
        logits = torch.randn(2, N, requires_grad=True)
        weights = torch.randn(2, N)
        (soft_topk(logits, 5) * weights).sum().backward()
        for row in range(2):
            for index in (0, 7, 23):
                low, high = logits[row].detach().clone(), logits[row].detach().clone()
                low[index] -= 0.01
                high[index] += 0.01
                change = (slow_soft_topk(high, 5) - slow_soft_topk(low, 5)) / 0.02
                torch.testing.assert_close(logits.grad[row, index], change @ weights[row], atol=1e-3, rtol=1e-2)
        assert logits.grad.sum(dim=1).abs().max() < 1e-5  # to raise all scores changes nothing

    def test_noise_keeps_the_variance(self):
        tokens = 3 * torch.randn(1, 200, 100)
        for share in (0.0, 0.3, 1.0):
            mixed = drowned(tokens, torch.full((1, 200, 1), share))
            assert abs(mixed.std() - 3) < 0.1
            kept = (mixed * tokens).mean() / 9
            assert abs(kept - share**0.5) < 0.02
        torch.testing.assert_close(drowned(tokens, torch.ones(1, 200, 1)), tokens, atol=1e-3, rtol=0)


class TestDrawing:
    def test_draws_follow_the_softmax_of_the_scores(self):
        scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
        scores = (scores - scores.mean()) / scores.std()
        features = torch.eye(4)[None].expand(20000, -1, -1)
        drawn = sampled_tokens(features, 7 * scores.expand(20000, -1) + 3, 1, temperature=2.0).positions[:, 0]
        share = torch.bincount(drawn, minlength=4) / 20000
        assert (share - (scores / 2).softmax(0)).abs().max() < 0.015

    def test_tokens_drawn_are_different_and_in_raster_order(self):
        output = sampled_tokens(torch.randn(50, N, DIM), torch.zeros(50, N), 9, 1.0, return_source=True)
        assert (output.positions.diff(dim=1) > 0).all()
        assert (output.source.sum(dim=-1) - 1).abs().max() < 1e-6 and output.sizes.sum(dim=1).unique().tolist() == [N]

    @ESTIMATORS
    @pytest.mark.parametrize("num_tokens", [1, 5, 23, 24])
    def test_at_temperature_zero_training_is_evaluation(self, estimator, num_tokens):
        features, scores = torch.randn(3, N, DIM), torch.randn(3, N)
        expected = best_tokens(features, scores, num_tokens)
        cold = sampled_tokens(features, scores, num_tokens, 1e-6, estimator)
        assert torch.equal(cold.positions, expected.positions)
        torch.testing.assert_close(cold.merged_features, expected.merged_features, atol=1e-4, rtol=1e-4)

    @ESTIMATORS
    def test_a_seed_makes_training_reproducible(self, estimator):
        merger, features = make(estimator=estimator).train(), torch.randn(2, N, DIM)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(merger(features).merged_features)
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
        assert torch.equal(merger.eval()(features).merged_features, merger(features).merged_features)

    @ESTIMATORS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_trains(self, estimator, dtype):
        merger = make(estimator=estimator).to(dtype).train()
        output = merger(torch.randn(2, N, DIM, dtype=dtype))
        assert output.merged_features.dtype == dtype and output.merged_features.isfinite().all()
        output.merged_features.sum().backward()
        assert all(p.grad.isfinite().all() for p in merger.parameters())

    @ESTIMATORS
    def test_training_compiles_as_one_graph(self, estimator):
        torch._dynamo.reset()
        merger = make(estimator=estimator).train()
        torch.compile(merger, fullgraph=True, backend="aot_eager")(
            torch.randn(2, N, DIM)
        ).merged_features.sum().backward()
        assert merger.method.score_proj.weight.grad.abs().sum() > 0


class TestLearning:
    @ESTIMATORS
    @pytest.mark.parametrize("merger_type", ["gumbel_topk", "gumbel_topk_question"])
    def test_it_learns_which_tokens_matter(self, merger_type, estimator):
        """Five of the tokens are marked, for V2 by what the question names; only they help to tell the answer."""
        merger = make(merger_type, estimator=estimator, internal_dim=32).train()
        reader = torch.nn.Linear(DIM, 1)
        optimizer = torch.optim.Adam([*merger.parameters(), *reader.parameters()], lr=0.02)
        generator = torch.Generator().manual_seed(0)

        def batch(size: int):
            marked = torch.rand(size, N, generator=generator).argsort(dim=1) < 5
            asked = torch.randint(2, (size, 1), generator=generator)
            features = torch.randn(size, N, DIM, generator=generator)
            features[:, :, 0] = 3.0 * marked
            if merger_type == "gumbel_topk_question":
                features[:, :, 1] = 3.0 * (torch.rand(size, N, generator=generator).argsort(dim=1) < 5)
                marked = features.gather(2, asked[:, None].expand(-1, N, 1))[:, :, 0] > 0
            words = torch.eye(12)[asked]
            answer = (features[:, :, 2] * marked).sum(dim=1) / 5
            return features, Question.of_each_image(words), marked, answer

        for step in range(300):
            merger.set_progress(step / 300)
            features, question, _, answer = batch(64)
            tokens = merger(features, question).merged_features
            loss = (reader(tokens).mean(dim=(1, 2)) - answer).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        features, question, marked, _ = batch(200)
        positions = merger.eval()(features, question).positions
        assert marked.gather(1, positions).float().mean() > 0.8  # 0.21 by chance


class TestProgress:
    def test_it_anneals_the_temperature_and_is_saved(self, tmp_path):
        merger = make(initial_temperature=2.0, final_temperature=0.5)
        assert merger.method.temperature == 2.0
        merger.set_progress(0.5)
        torch.testing.assert_close(merger.method.temperature, torch.tensor(1.0))
        merger.save_pretrained(tmp_path)
        assert TokenMerger.from_pretrained(tmp_path).method.progress == 0.5
        for progress in (-0.1, 1.5):
            with pytest.raises(ValueError, match=f"progress={progress}: it is the share"):
                merger.set_progress(progress)
        make("fixed_pooling").set_progress(0.5)  # nothing to anneal

    def test_a_fresh_merger_on_a_loaded_model_starts_at_zero(self, tmp_path):
        tiny_model({"merger_type": "average_pooling", "num_merged_tokens": 9}).save_pretrained(tmp_path)
        fields = {"merger_type": "gumbel_topk", "num_merged_tokens": 9}
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config=fields)
        assert model.model.merger.method.progress == 0
        assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.model.merger.parameters())

    @ESTIMATORS
    def test_a_whole_model_trains_it(self, estimator):
        fields = {**aware(9), "merger_type": "gumbel_topk_question", "estimator": estimator}
        model = tiny_model(fields, train_merger=True).train()
        batch = prompts([1, 1], 9)
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100
        model(**batch, pixel_values=pixels(2), labels=labels).loss.backward()
        grads = {name: p.grad for name, p in model.model.merger.named_parameters()}
        assert not [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0]

# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""V3: learned queries, shifted by the question, that attend over all visual tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .configuration_llava_merge import MergerConfig
from .merging_attention import attention_weights, check_heads, join_heads, split_heads
from .merging_base import MergeContext, MergeOutput, MergingMethod, OwnInitialization, register_merging_method
from .merging_grid import default_query_grid, sample_query_map
from .questions import Question


class ZeroLinear(OwnInitialization, nn.Linear):
    """Linear layer that starts at zero, so that the branch it ends adds nothing before training."""

    def reset_parameters(self):
        """All zero, so that it adds nothing at the start."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class QuestionModulator(nn.Module):
    """Vector (I, dim) that shifts an image's queries, from the embeddings of its question; zero before training.

    The tokens are pooled by a soft maximum per channel: the mean of a question drowns the word that it is about.
    """

    sharpness = 4.0

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.token_proj = nn.Linear(text_dim, dim)
        self.output_proj = ZeroLinear(dim, dim)

    def forward(self, question: Question) -> Tensor:
        """What the question adds to the queries: (I, internal_dim)."""
        tokens = self.token_proj(self.norm(question.embeds)).flatten(0, 1)  # (B·T, dim)
        shift = self.output_proj(nn.functional.gelu(soft_maximum_of_turns(tokens, question, self.sharpness)))
        return shift * question.has_text[:, None]  # no question: the queries as they are


def soft_maximum_of_turns(tokens: Tensor, question: Question, sharpness: float) -> Tensor:
    """Soft maximum (I, dim) per channel of the question's `tokens` (B·T, dim); once per turn, its images share it."""
    num_images = len(question.image_turns)
    turns = question.token_turns.flatten()
    scores = (sharpness * tokens).float()
    peaks = scores.new_full((num_images + 1, tokens.shape[1]), torch.finfo(torch.float32).min)
    peaks = peaks.scatter_reduce(0, turns[:, None].expand_as(scores), scores.detach(), "amax")
    weights = (scores - peaks[turns]).exp()
    in_turn = (turns == torch.arange(num_images, device=turns.device)[:, None]).float()  # (I, B·T)
    # not a scatter: that adds in another order each time
    pooled = in_turn @ (weights * tokens.float()) / (in_turn @ weights).clamp(min=torch.finfo(torch.float32).tiny)
    return pooled.to(tokens.dtype)[question.image_turns]


class LayerProjection(nn.Module):
    """What several layers of the tower add to keys and values; nothing before training."""

    def __init__(self, num_layers: int, tower_dim: int, dim: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(tower_dim) for _ in range(num_layers))
        self.k_proj = ZeroLinear(num_layers * tower_dim, dim, bias=False)
        self.v_proj = ZeroLinear(num_layers * tower_dim, dim, bias=False)

    def forward(self, layers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Of layers (I, N, tower_dim), each (I, N, dim)."""
        normed = torch.cat([norm(layer) for norm, layer in zip(self.norms, layers, strict=True)], dim=-1)
        return self.k_proj(normed), self.v_proj(normed)


class PoolAttention(nn.Module):
    """Keys, values and queries of the pooling attention, split into heads."""

    def __init__(self, config: MergerConfig):
        super().__init__()
        vision_dim, dim, layers = config.vision_dim, config.internal_dim, config.feature_layers
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(vision_dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)  # zero queries have no preference
        self.k_proj = nn.Linear(vision_dim, dim, bias=False)
        self.v_proj = nn.Linear(vision_dim, dim)
        self.layers = LayerProjection(len(layers), config.tower_dim, dim) if layers else None

    def forward(self, queries: Tensor, features: Tensor, layers: tuple[Tensor, ...]) -> list[Tensor]:
        """Of queries (I, M, dim) and features (I, N, vision_dim), each (I, num_heads, length, dim / num_heads)."""
        normed = self.norm(features)
        keys, values = self.k_proj(normed), self.v_proj(normed)
        if self.layers is not None:
            more_keys, more_values = self.layers(layers)
            keys, values = keys + more_keys, values + more_values
        return [split_heads(tensor, self.num_heads) for tensor in (self.q_proj(queries), keys, values)]


@dataclass
class PoolingSlots:
    """Where the slots of V3 lie, for each image or for all, and what they ask for.

    Attributes:
        queries: (I, M, internal_dim).
        log_windows: (M, N) or (I, 1, M, N), logarithms of how much each slot's window holds of each patch.
        squared_distances: (M, N) or (I, 1, M, N), of each slot to each patch, in units of the slots' sides.
        positions: (I, M) int64 as in [`MergeOutput`], None where the slots are those of the grid.
        sizes: (I, M) float32, the same.
    """

    queries: Tensor
    log_windows: Tensor
    squared_distances: Tensor
    positions: Tensor | None = None
    sizes: Tensor | None = None


@register_merging_method("fixed_pooling")
class FixedPooling(MergingMethod):
    """V3: M learned queries, shifted by the question, cross-attend over all visual tokens; starts as average pooling.

    Every token is the sum of two attentions with the same queries and keys. The first pools the raw features inside the
    slot's window of the grid; its logits start at the log of the window's area, so that it starts as average pooling
    and learns which patches of the window matter. The second looks at the whole image, in each head through a window of
    learned width, and enters through `output_proj`, which starts at zero. With `init="random"` only the second is left,
    without windows and with random weights: the plain resampler (Perceiver, arXiv 2103.03206; Flamingo, 2204.14198).
    Keys and values of both also come from `feature_layers` of the tower, where they are named; what is pooled stays the
    features. `source` counts both attentions. Pooling as the start: D-Abstractor (2312.06742). One map of queries for
    every M: after MQT (2405.19315).
    """

    uses_question = True
    starts_as = "equals average pooling"
    sits_on_slots = True
    options = ("init", "query_grid", "feature_layers")
    paper = "resampler 2103.03206, pooled start 2312.06742, one map for every M 2405.19315"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        check_heads(config, "vision_dim", "internal_dim")
        config.query_grid = default_query_grid(config)
        self.pools_windows = config.init == "average_pooling"
        self.pool_queries = nn.Parameter(torch.empty(*config.query_grid, config.internal_dim))
        self.pool_attention = PoolAttention(config)
        self.query_modulator = (
            QuestionModulator(config.text_dim, config.internal_dim) if config.question_aware else None
        )
        output_class = ZeroLinear if self.pools_windows else nn.Linear
        self.output_proj = output_class(config.internal_dim, config.vision_dim)
        self.locality = nn.Parameter(torch.empty(config.num_heads)) if self.pools_windows else None

    def reset_parameters(self):
        if not self.pools_windows:
            nn.init.normal_(self.pool_queries, std=0.02)
            return
        nn.init.zeros_(self.pool_queries)  # no preference inside a window
        # from a window of about one slot to the whole image
        slopes = 4.0 ** -torch.arange(self.config.num_heads)
        with torch.no_grad():
            self.locality.copy_(slopes)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        slots = self.place_slots(features, context)
        queries, keys, values = self.pool_attention(slots.queries, features, context.layers)
        if not self.pools_windows:
            pooled = join_heads(scaled_dot_product_attention(queries, keys, values))
            source = attention_weights(queries, keys, None).mean(dim=1) if context.return_source else None
            return MergeOutput(merged_features=self.output_proj(pooled), source=source)

        windows = slots.log_windows
        locality = -self.locality.abs()[:, None, None] * slots.squared_distances  # ([I,] heads, M, N)
        raw = split_heads(features, self.config.num_heads)
        local = scaled_dot_product_attention(queries, keys, raw, attn_mask=windows.to(queries.dtype))
        pooled = scaled_dot_product_attention(queries, keys, values, attn_mask=locality.to(queries.dtype))
        merged = join_heads(local) + self.output_proj(join_heads(pooled))  # (I, M, vision_dim)
        source = None
        if context.return_source:
            source = attention_weights(queries, keys, windows).mean(dim=1)
            source = self.with_second_attention(source, features, values, attention_weights(queries, keys, locality))
        return MergeOutput(merged, source, slots.positions, slots.sizes)

    @torch.no_grad()
    def _lengths_of_values(self, values: Tensor) -> Tensor:
        """Length of what each value adds to a token through `output_proj`: (I, heads, N)."""
        weight = self.output_proj.weight.float().unflatten(1, (self.config.num_heads, -1))  # (dim, heads, head_dim)
        gram = torch.einsum("dhi,dhj->hij", weight, weight)
        return torch.einsum("bhni,hij,bhnj->bhn", values.float(), gram, values.float()).clamp(min=0).sqrt()

    def with_second_attention(self, source: Tensor, features: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """`source` (I, M, N) of the first attention with the `weights` (I, heads, M, N) of the second.

        A weight counts by the length of what it adds, in mean lengths of a feature (arXiv 2004.10102).
        """
        unit = features.float().norm(dim=-1).mean(dim=1)[:, None, None]  # (I, 1, 1)
        added = (weights * self._lengths_of_values(values)[:, :, None]).sum(dim=1)
        source = source + added / unit.clamp(min=1e-9)
        return source / source.sum(dim=-1, keepdim=True)

    def place_slots(self, features: Tensor, context: MergeContext) -> PoolingSlots:
        """The slots of the grid, which are those of every image, with queries of each image."""
        geometry = context.geometry
        queries = sample_query_map(self.pool_queries, geometry.centres).expand(features.shape[0], -1, -1)
        return PoolingSlots(self.ask(queries, context), geometry.log_windows, geometry.squared_distances)

    def ask(self, queries: Tensor, context: MergeContext) -> Tensor:
        """The `queries` (I, M, internal_dim) with what each image's question adds."""
        if self.query_modulator is None or context.question is None:
            return queries
        return queries + self.query_modulator(context.question)[:, None]

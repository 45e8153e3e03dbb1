# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""V2: as V1, with a score that reads the question."""

from torch import Tensor, nn

from .configuration_llava_merge import MergerConfig
from .merging_base import MergeContext, register_merging_method
from .merging_fixed_pooling import QuestionModulator
from .merging_gumbel_topk import GumbelTopK


@register_merging_method("gumbel_topk_question")
class GumbelTopKQuestion(GumbelTopK):
    """V2: as V1, with a score that reads the question.

    The question shifts the hidden units of the score. An image without a question is scored as by V1.
    """

    uses_question = True

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        self.query_modulator = QuestionModulator(config.text_dim, config.internal_dim)

    def score(self, features: Tensor, context: MergeContext) -> Tensor:
        """Of each token, from itself and the question: (I, N)."""
        hidden = self.token_proj(self.norm(features))
        if context.question is not None:
            hidden = hidden + self.query_modulator(context.question)[:, None]
        return self.score_proj(nn.functional.gelu(hidden))[:, :, 0]

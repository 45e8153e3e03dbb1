# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""How much each patch matters for a question, as the projector or CLIP's text tower says it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from .checkpoint_files import naming_broken_files, refuse_missing_weights
from .configuration_llava_merge import as_data
from .merging_base import READ_FOR_QUESTION, full_precision
from .merging_selection import cosine_similarity
from .questions import Question


NO_TOKENIZER = (
    "text_tower={name!r} reads questions as text, and the tokenizer that made their ids is not known. Call "
    "model.set_question_marks(processor) before, or load the model from a folder or repo with its processor."
)
NO_IDS = (
    "text_tower={name!r} reads questions as text, and this one is given as embeddings alone. Pass input_ids instead of "
    "inputs_embeds, or question=Question.of_each_image(embeds, ids=input_ids), or leave text_tower out."
)
NOT_FETCHED = (
    " What a checkpoint names is not fetched unless you ask for it: `hf download {name}` before, or "
    "merger_config={{'text_tower': {name!r}}}."
)


class CLIPWithoutVision(CLIPModel):
    """CLIP without the layers of its vision tower, of which only the last norm and the projection are needed."""

    _keys_to_ignore_on_load_unexpected = [r"vision_model\.encoder\."]


class TextTower:
    """CLIP's text tower; no module, so that it is neither trained nor saved with a model that has one.

    Args:
        name: Directory or Hub repo of a CLIP, such as "openai/clip-vit-large-patch14-336".
        vision_dim: Width of the features that it is to judge.
        hub_kwargs: Arguments of `from_pretrained` that say how the Hub is reached; with `local_files_only` nothing is
            fetched.

    Raises:
        ValueError: It cannot be loaded, or is of another vision tower.
    """

    def __init__(self, name: str, vision_dim: int, hub_kwargs: dict | None = None):
        hub_kwargs = hub_kwargs or {}
        try:
            fields, _ = CLIPConfig.get_config_dict(name, **hub_kwargs)
            config = CLIPConfig.from_dict(as_data(fields))
            config.vision_config.num_hidden_layers = 0
            with naming_broken_files(name, hub_kwargs):
                clip, info = CLIPWithoutVision.from_pretrained(
                    name,
                    config=config,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    **hub_kwargs,
                )
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub_kwargs)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            if hub_kwargs.get("local_files_only"):
                reason += NOT_FETCHED.format(name=name)
            raise ValueError(
                f"text_tower={name!r} cannot be loaded: {reason} Give a directory or Hub repo of a CLIP with "
                f"model.safetensors and its tokenizer, or leave text_tower out: then the projector says how "
                f"much a patch matters."
            ) from error
        refuse_missing_weights(name, info["missing_keys"])
        if config.vision_config.hidden_size != vision_dim:
            raise ValueError(
                f"text_tower={name!r} judges features {config.vision_config.hidden_size} wide, and this model's are "
                f"{vision_dim} wide. Give the CLIP whose vision tower the model has, with one vision_feature_layer."
            )
        self.name, self.clip = name, clip.eval().requires_grad_(False)

    @torch.compiler.disable
    @torch.no_grad()
    def relevance(self, features: Tensor, question: Question, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """Relevance of each patch of `features` (I, N, vision_dim) for its question: (I, N) float32.

        The negative of the mean cosine with the question's segments, as CDPruner has it (arXiv 2506.10967): patches of
        CLIP that belong to a text are *unlike* it. 0 where there is no question. Reads the ids, so it waits for them.

        Args:
            tokenizer: That of the language model, which made the ids.

        Raises:
            ValueError: The question is known as embeddings only, or there is no tokenizer.
        """
        texts, patches = self._texts_of(question, tokenizer), self._see(features)
        return -(patches @ self.mean_directions(texts)[:, :, None])[:, :, 0]

    @torch.compiler.disable
    @torch.no_grad()
    def word_relevance(self, features: Tensor, question: Question, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """Relevance of each patch for each token that CLIP's tokenizer makes of its question: (I, N, T) float32.

        As `relevance`, but with the last hidden state at the token; -inf where a question has fewer than T.
        """
        texts, patches = self._texts_of(question, tokenizer), self._see(features)
        directions, is_word = self.word_directions(texts)
        return -(patches @ directions.transpose(1, 2)).masked_fill(~is_word[:, None], torch.inf)

    def _see(self, features: Tensor) -> Tensor:
        """Patches in the space that CLIP compares in, with length 1: (I, N, projection_dim); moves CLIP to them."""
        clip = self.clip.to(features.device)
        return normalize(clip.visual_projection(clip.vision_model.post_layernorm(features.float())), dim=-1)

    def _texts_of(self, question: Question, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        """The question of each image."""
        if question.ids is None:
            raise ValueError(NO_IDS.format(name=self.name))
        if tokenizer is None:
            raise ValueError(NO_TOKENIZER.format(name=self.name))
        ids = question.ids.flatten()
        return [tokenizer.decode(ids[mask], skip_special_tokens=True) for mask in question.mask.to(ids.device)]

    def mean_directions(self, texts: list[str]) -> Tensor:
        """Mean of the normed embeddings of the segments of each text: (texts, projection_dim), 0 where it is empty."""
        segments, text_of_segment = self._segments_of(texts)
        if not segments:
            return torch.zeros(len(texts), self.clip.config.projection_dim, device=self.clip.device)
        embeds = normalize(self.clip.text_projection(self._read(segments).pooler_output), dim=-1)
        owners = torch.tensor(text_of_segment, device=embeds.device)
        share = (owners == torch.arange(len(texts), device=embeds.device)[:, None]).float()  # (texts, segments)
        return share / share.sum(dim=1, keepdim=True).clamp(min=1) @ embeds

    def word_directions(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Normed embeddings of the tokens of each text, (texts, T, projection_dim), and where they are, (texts, T)."""
        segments, text_of_segment = self._segments_of(texts)
        words = [[] for _ in texts]
        if segments:
            embeds = normalize(self.clip.text_projection(self._read(segments).last_hidden_state), dim=-1)
            for text, segment, states in zip(text_of_segment, segments, embeds, strict=True):
                words[text].append(states[1 : len(segment) - 1])
        nothing = torch.zeros(0, self.clip.config.projection_dim, device=self.clip.device)
        of_texts = [torch.cat([nothing, *states]) for states in words]
        lengths = torch.tensor([*map(len, of_texts)], device=nothing.device)
        padded = nn.utils.rnn.pad_sequence(of_texts, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]

    def _segments_of(self, texts: list[str]) -> tuple[list[list[int]], list[int]]:
        """Ids of the texts in pieces that CLIP can read, and which text each is of."""
        length = self.clip.config.text_config.max_position_embeddings - 2
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        segments, text_of_segment = [], []
        for index, text in enumerate(texts):
            pieces = self.tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            segments += [[start, *pieces[at : at + length], end] for at in range(0, len(pieces), length)]
            text_of_segment += [index] * (len(segments) - len(text_of_segment))
        return segments, text_of_segment

    def _read(self, segments: list[list[int]]):
        """What the text tower makes of segments."""
        longest, end = max(map(len, segments)), self.tokenizer.eos_token_id
        ids = [segment + [end] * (longest - len(segment)) for segment in segments]  # what is behind the end is not seen
        return self.clip.text_model(torch.tensor(ids, device=self.clip.device))


def projected_relevance(features: Tensor, question: Question, projector: nn.Module) -> Tensor:
    """Relevance of each patch of `features` (I, N, vision_dim) for its question: (I, N) float32, a cosine.

    [`projected_similarity`] with the mean embedding of the question; 0 where there is none.
    """
    mask = question.mask.float()  # (I, B·T)
    words = normalize(question.embeds.flatten(0, 1).float(), dim=-1)
    wanted = mask @ words / mask.sum(dim=1, keepdim=True).clamp(min=1)  # (I, text_dim)
    return projected_similarity(features, wanted[:, None], projector)[:, :, 0]


def projected_word_relevance(features: Tensor, question: Question, projector: nn.Module) -> Tensor:
    """Relevance of each patch of `features` (I, N, vision_dim) for each token of its row: (I, N, T) float32, a cosine.

    [`projected_similarity`] with the token's embedding; -inf where it is no question's.
    """
    rows, is_question = question.rows_of_images()
    similarity = projected_similarity(features, question.embeds[rows], projector)
    return similarity.masked_fill(~is_question[:, None], -torch.inf)


def projected_similarity(features: Tensor, wanted: Tensor, projector: nn.Module) -> Tensor:
    """Cosine of each patch of `features` (I, N, vision_dim) with what is `wanted` (I, n, text_dim): (I, N, n) float32.

    Between the patch, seen from the mean of its image, and the direction in which `projector` leads from that mean to
    `wanted`: its gradient there. It costs the projection of n tokens and its way back; to project all patches would say
    nearly the same.
    """
    mean = features.mean(dim=1, keepdim=True)  # (I, 1, vision_dim)
    directions = lead_back(projector, mean.expand(-1, wanted.shape[1], -1), wanted)
    with full_precision(features.device):
        return cosine_similarity(features - mean, directions)


def lead_back(projector: nn.Module, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Gradient of the product of `projector(tokens)` with `wanted`: (I, n, vision_dim), of tokens (I, n, vision_dim).

    Without a graph behind it, and also inside `torch.inference_mode()`.
    """
    if torch.compiler.is_compiling():  # which cannot trace autograd.grad; vjp crashes on quantised layers
        projected, pull = torch.func.vjp(projector, tokens.detach())
        return pull(wanted.to(projected.dtype))[0].detach()
    with torch.inference_mode(False), torch.enable_grad():
        tokens, wanted = tokens.detach().clone().requires_grad_(), wanted.detach().clone()
        product = (projector(tokens) * wanted).sum()
        return torch.autograd.grad(product, tokens)[0]


def read_for_question(
    requires: frozenset[str],
    features: Tensor,
    question: Question,
    projector: nn.Module,
    tower: TextTower | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Tensor]:
    """What a method `requires` of the question, by name: as the text `tower` has it, or without one the `projector`."""
    kinds = requires & READ_FOR_QUESTION
    if tower is not None:
        ways = {"relevance": tower.relevance, "word_relevance": tower.word_relevance}
        with full_precision(features.device):
            return {kind: ways[kind](features, question, tokenizer) for kind in kinds}
    ways = {"relevance": projected_relevance, "word_relevance": projected_word_relevance}
    return {kind: ways[kind](features, question, projector) for kind in kinds}

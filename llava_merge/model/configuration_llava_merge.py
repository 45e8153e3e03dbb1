# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a merger, and of a LLaVA with one."""

import copy
import inspect
import re
from operator import index

from transformers import CONFIG_MAPPING, GenerationConfig, LlavaConfig, PretrainedConfig

from .compat import ModelType, add_sub_config, register_names
from .placeholders import is_whole_number


AUTO_MAP = {
    "AutoConfig": "configuration_llava_merge.LlavaMergeConfig",
    "AutoModel": "modeling_llava_merge.LlavaMergeModel",
    "AutoModelForImageTextToText": "modeling_llava_merge.LlavaMergeForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_merge.LlavaMergeForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_llava_merge.LlavaMergeForConditionalGeneration",
}
POSITIONAL = (  # arguments of LlavaConfig behind the two configurations, as 4.57 takes them by position
    *("image_token_index", "projector_hidden_act", "vision_feature_select_strategy", "vision_feature_layer"),
    *("image_seq_length", "multimodal_projector_bias"),
)
WHOLE_NUMBERS = ("num_merged_tokens", "vision_dim", "text_dim", "tower_dim", "internal_dim", "num_heads")
OPTIONAL = ("num_merged_tokens", "tower_dim", "internal_dim")
BUDGET = ("num_merged_tokens", "merge_ratio")
# Fields that a merger's weights were trained with, though their shapes may fit other values too.
TRAINED_WITH = ("init", "num_heads", "internal_dim", "question_aware", "query_grid", "feature_layers")
# Read from a file, these make some releases of transformers fetch and run a kernel of the Hub (CVE-2026-4372).
ATTENTION_CODE = re.compile(r"_*(attn|experts)_implementation(_internal)?")
NOT_OF_A_FILE = re.compile(rf"{ATTENTION_CODE.pattern}|transformers_weights|num_labels|id2label|label2id")
LAYERS = re.compile(r"(\w+_)?layers?|depth")
MOST_LAYERS = 1024  # as a number, or in a list
LARGEST = 1 << 17  # of any size of a merger, so that a hostile configuration cannot ask for all memory
LARGEST_MATRIX = 1 << 28  # elements
QUESTION_MARKS = ("question_start_token_ids", "question_end_token_ids")
DEFAULT_MERGER_TYPE = "fixed_pooling"
QUESTION_METHODS = ("cdpruner", "gumbel_topk_question", "mmtok", "quecc")  # which are so unless told otherwise
LAYER_METHODS = ("quecc", "tokenpacker")  # that read several layers of the tower, whichever they are
DEFAULT_MERGE_RATIO = 0.25  # 2 × 2 patches to a token: 144 of LLaVA-1.5's 576


def default_feature_layers(num_layers: int) -> list[int]:
    """Hidden states that the methods in `LAYER_METHODS` read of a tower: 12, 16, 22 and 23 where it has 24 layers."""
    return sorted({num_layers // 2, 2 * num_layers // 3, max(0, num_layers - 2), num_layers - 1})


def as_data(fields):
    """The `fields` of a config.json, at any depth, without those that choose code, or files, for the caller.

    Which attention runs, and which weights are read, is for the caller to say. Labels are for classifiers, and may be
    any number.

    Raises:
        ValueError: One names a repository that would be fetched, or asks for layers without end.
    """
    if isinstance(fields, list):
        return [as_data(field) for field in fields]
    if not isinstance(fields, dict):
        return fields
    for name in filter(ATTENTION_CODE.fullmatch, map(str, fields)):
        values = fields[name].values() if isinstance(fields[name], dict) else [fields[name]]
        if any("/" in str(value) or "|" in str(value) for value in values):
            raise ValueError(
                f"config.json has {name}={fields[name]!r}, a repository whose code would run. Remove it; if you trust "
                f"that code, pass attn_implementation to from_pretrained."
            )
    if fetches_backbone(fields.get("model_type")):
        raise ValueError(
            f"config.json has a part of model_type={fields['model_type']!r}, which may fetch a backbone from the Hub. "
            f"Use a LLaVA whose tower is whole, such as CLIP or SigLIP."
        )
    for name in filter(LAYERS.fullmatch, map(str, fields)):
        number = len(fields[name]) if isinstance(fields[name], list) else fields[name]
        if isinstance(number, int) and number > MOST_LAYERS:
            raise ValueError(f"config.json asks for {number} layers as {name}; no model has more than {MOST_LAYERS}.")
    return {name: as_data(field) for name, field in fields.items() if not NOT_OF_A_FILE.fullmatch(str(name))}


def fetches_backbone(model_type: str | None) -> bool:
    """Whether models of a type are built around another model, which transformers or timm would fetch."""
    config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None
    if config_class is None:
        return False
    takes = {*inspect.signature(config_class.__init__).parameters, *dir(config_class)}
    return model_type.startswith("timm") or not takes.isdisjoint(("backbone", "backbone_config", "use_timm_backbone"))


def is_number(value) -> bool:
    """Whether it is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def keeps_places(merger_config) -> bool:
    """Whether merged tokens keep the positions of their patches."""
    return merger_config.position_ids == "source" and merger_config.merger_type != "none"


def check_marks(name: str, marks):
    """Refuses what is no list of lists of ids.

    Raises:
        ValueError: It is none.
    """
    sequences = marks if isinstance(marks, list) else [marks]
    is_right = all(
        isinstance(ids, list) and ids and all(isinstance(id, int) and id >= 0 for id in ids) for ids in sequences
    )
    if marks is not None and not is_right:
        raise ValueError(f"{name}={marks!r}: has to be a list of lists of token ids.")


class MergerConfig(PretrainedConfig):
    """Configuration of a [`TokenMerger`], and the `merger_config` of [`LlavaMergeConfig`].

    Args:
        merger_type: Name of the method, one of `llava_merge.list_mergers()`.
        num_merged_tokens: Tokens M that an image becomes.
        merge_ratio: M as a share of the N visual tokens, instead of `num_merged_tokens`: 0.5 makes 288 of 576.
        vision_dim: Width of the visual features: the tower's hidden size times the number of feature layers.
        text_dim: Width of the language model's input embeddings, in which the question comes.
        tower_dim: Width of one hidden state of the tower, which only `feature_layers` need; default `vision_dim`.
        internal_dim: Width of the pooling attention; default half of `vision_dim`.
        num_heads: Heads of the pooling attention; has to divide `internal_dim` and `vision_dim`.
        question_aware: Whether the question steers the merging. Then an image has to be merged anew per question. By
            default only where the method is made for that: `cdpruner`, `mmtok`, `quecc` and `gumbel_topk_question`.
        init: `"average_pooling"` starts `fixed_pooling` as exact average pooling of the patch grid, `"random"` as the
            plain resampler with random queries.
        query_grid: Rows and columns of the map of learned queries; default the grid of `num_merged_tokens` slots.
            Other budgets sample the same map, so that one checkpoint serves every M. Of `mqt`: 1 and all its queries.
        feature_layers: Hidden states of the tower that keys and values come from, counted as in `vision_feature_layer`.
            In `fixed_pooling` and `salient_pooling` besides the features, and they add nothing before training; default
            none. In `tokenpacker` and `quecc` all of them; default [12, 16, 22, 23] of 24 layers, of others in
            proportion.
        seed: Of `random`: which tokens are kept.
        important_ratio: Of `vispruner`, `visionzip` and `prumerge_plus`: share of the M tokens that CLS attention
            chooses; default 0.5, 54/64 and 0.25.
        faithful: Of `visionzip` and `prumerge_plus`: add to a token what merges into it, as the released code does,
            instead of taking a mean; in `visionzip` that about doubles its norm.
        estimator: Of `gumbel_topk` and `gumbel_topk_question`, which draw tokens in training: `"gumbel"` passes the
            gradients straight through, `"soft_topk"` mixes noise into tokens whose choice was close.
        initial_temperature: Of the same: at the start of training; their `set_progress` anneals it.
        final_temperature: Of the same: at the end of training.
        text_tower: Of `cdpruner`, `mmtok`: directory or Hub repo of the CLIP whose vision tower the model has, such as
            "openai/clip-vit-large-patch14-336". Its text tower then says how much a patch matters for the question,
            instead of the model's own projector. 0.5 GB more to load; the question is read as text, on the CPU.
        position_ids: Where merged tokens sit. `"source"`: each at the position of its patches in the unmerged prompt,
            and the text behind an image as if all N tokens were there. `"packed"`: one behind the other, as in 0.1.0.
        attention_mass: From 0 to 1: what is added to the attention logits of a merged token that stands for n patches,
            in units of log(n). With 1 it weighs as much as n tokens, with 0 as much as one. None, the default, is 1 in
            a model whose attention takes a bias (SDPA, eager), else 0 with a warning. In a model, a method that can be
            trained gets the number.
        trained_num_tokens: Budgets M that the merger was trained with; smaller ones give a warning.
        has_projector: Whether the checkpoint of the merger also holds the projector trained with it; saving sets it.
        question_start_token_ids: Id sequences that open what a user writes, such as those of "USER:" behind a space
            and behind a line break. None until known; loading finds them in the chat template.
        question_end_token_ids: Id sequences that end it, such as those of "ASSISTANT:" or "<|im_end|>". A
            question-aware merger reads what stands between, in the turn that holds the image.

    Raises:
        ValueError: A value out of range, or two that disagree.
    """

    model_type = "llava_merger"

    def __init__(
        self,
        merger_type: str = DEFAULT_MERGER_TYPE,
        num_merged_tokens: int | None = None,
        merge_ratio: float | None = None,
        vision_dim: int = 1024,
        text_dim: int = 4096,
        tower_dim: int | None = None,
        internal_dim: int | None = None,
        num_heads: int = 8,
        question_aware: bool | None = None,
        init: str = "average_pooling",
        query_grid: tuple[int, int] | None = None,
        feature_layers: list[int] | None = None,
        seed: int = 0,
        important_ratio: float | None = None,
        faithful: bool = False,
        estimator: str = "gumbel",
        initial_temperature: float = 1.0,
        final_temperature: float = 0.1,
        text_tower: str | None = None,
        position_ids: str = "source",
        attention_mass: float | None = None,
        trained_num_tokens: list[int] | None = None,
        has_projector: bool = False,
        question_start_token_ids: list[list[int]] | None = None,
        question_end_token_ids: list[list[int]] | None = None,
        **kwargs,
    ):
        self.merger_type = merger_type
        self.num_merged_tokens = num_merged_tokens
        self.merge_ratio = merge_ratio
        self.vision_dim = vision_dim
        self.text_dim = text_dim
        self.tower_dim = vision_dim if tower_dim is None else tower_dim
        self.internal_dim = internal_dim
        self.num_heads = num_heads
        self.question_aware = merger_type in QUESTION_METHODS if question_aware is None else question_aware
        self.init = init
        self.query_grid = list(query_grid) if isinstance(query_grid, tuple) else query_grid
        if feature_layers is None and merger_type in LAYER_METHODS:
            feature_layers = default_feature_layers(24)
        self.feature_layers = list(feature_layers) if isinstance(feature_layers, tuple) else feature_layers
        self.seed = seed
        self.important_ratio = important_ratio
        self.faithful = faithful
        self.estimator = estimator
        self.initial_temperature = initial_temperature
        self.final_temperature = final_temperature
        self.text_tower = text_tower
        self.position_ids = position_ids
        self.attention_mass = attention_mass
        self.trained_num_tokens = trained_num_tokens
        self.has_projector = has_projector
        self.question_start_token_ids = question_start_token_ids
        self.question_end_token_ids = question_end_token_ids
        self._check_values()
        if internal_dim is None:
            self.internal_dim = max(1, vision_dim // 2)
        super().__init__(**kwargs)

    def _check_values(self):
        sizes = {name: getattr(self, name) for name in WHOLE_NUMBERS}
        if self.query_grid is not None:
            if not isinstance(self.query_grid, list) or len(self.query_grid) != 2:
                raise ValueError(f"query_grid={self.query_grid!r}: has to be two numbers, rows and columns.")
            sizes |= {f"query_grid[{index}]": size for index, size in enumerate(self.query_grid)}
            if all(map(is_whole_number, self.query_grid)):
                sizes["query_grid, rows × columns"] = self.query_grid[0] * self.query_grid[1]
        for name, size in sizes.items():
            if not (is_whole_number(size) and size <= LARGEST) and not (size is None and name in OPTIONAL):
                raise ValueError(f"{name}={size!r}: has to be a whole number from 1 to {LARGEST}.")
        of_matrices = {
            name: size for name, size in sizes.items() if size and name not in ("num_merged_tokens", "num_heads")
        }
        (rows, height), (columns, width) = sorted(of_matrices.items(), key=lambda item: item[1])[-2:]
        if height * width > LARGEST_MATRIX:
            raise ValueError(
                f"{rows}={height} and {columns}={width}: a matrix of both has more than {LARGEST_MATRIX} elements. "
                f"Make one of them smaller."
            )
        for name, kind in (
            ("merger_type", str),
            ("question_aware", bool),
            ("has_projector", bool),
            ("faithful", bool),
            ("seed", int),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: has to be a {kind.__name__}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: has to be a number of 64 bits, as torch's generators take it.")
        if self.merger_type == "none" and (self.num_merged_tokens or self.merge_ratio):
            raise ValueError(
                f"merger_type='none' keeps all tokens, but num_merged_tokens={self.num_merged_tokens} and "
                f"merge_ratio={self.merge_ratio} ask for fewer: leave both out, or choose a merger."
            )
        ratio = self.merge_ratio
        if ratio is not None and not (is_number(ratio) and 0 < ratio <= 1):
            raise ValueError(f"merge_ratio={ratio!r}: it is the share of tokens kept, above 0 and at most 1.")
        self._check_options()
        mass = self.attention_mass
        if mass is not None and not (is_number(mass) and 0 <= mass <= 1):
            raise ValueError(
                f"attention_mass={mass!r}: has to be a number from 0 (a merged token weighs as one token) to 1 (as all "
                f"the patches that it stands for), or None."
            )
        if self.position_ids not in ("source", "packed"):
            raise ValueError(f"position_ids={self.position_ids!r}: has to be 'source' or 'packed'.")
        trained = self.trained_num_tokens
        if trained is not None and not (isinstance(trained, list) and trained and all(map(is_whole_number, trained))):
            raise ValueError(
                f"trained_num_tokens={trained!r}: has to be a list of whole numbers of at least 1, or None."
            )
        for name in QUESTION_MARKS:
            check_marks(name, getattr(self, name))
        if self.init not in ("average_pooling", "random"):
            raise ValueError(f"init={self.init!r}: has to be 'average_pooling' or 'random'.")

    def _check_options(self):
        """The fields that only some methods read."""
        layers = self.feature_layers
        is_list = isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)
        if layers is not None and not is_list:
            raise ValueError(
                f"feature_layers={layers!r}: has to be a list of hidden states of the tower, such as [12, 16, 22], or "
                f"None."
            )
        ratio = self.important_ratio
        if ratio is not None and not (is_number(ratio) and 0 <= ratio <= 1):
            raise ValueError(
                f"important_ratio={ratio!r}: it is the share of tokens that CLS attention chooses, from 0 to 1."
            )
        if not isinstance(self.text_tower, str | None):
            raise ValueError(f"text_tower={self.text_tower!r}: has to be a directory or Hub repo, or None.")
        if self.estimator not in ("gumbel", "soft_topk"):
            raise ValueError(f"estimator={self.estimator!r}: has to be 'gumbel' or 'soft_topk'.")
        low, high = self.final_temperature, self.initial_temperature
        if not (is_number(low) and is_number(high) and 0 < low <= high):
            raise ValueError(
                f"initial_temperature={high!r}, final_temperature={low!r}: have to be numbers above 0, and the "
                f"second no larger than the first, since training goes from one to the other."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, of a merger checkpoint, or of the merger of a model.

        Raises:
            ValueError: It is a checkpoint of something else.
        """
        path = pretrained_model_name_or_path
        fields, kwargs = cls.get_config_dict(path, **kwargs)
        if fields.get("model_type") == LlavaMergeConfig.model_type and isinstance(fields.get("merger_config"), dict):
            fields = {**fields["merger_config"], "model_type": cls.model_type}
        return cls.of_merger(path, fields, **kwargs)

    @classmethod
    def of_merger(cls, path: str, fields: dict, **kwargs):
        """From the `fields` of the config.json at `path`, which has to be a merger's own.

        Raises:
            ValueError: It is one of something else.
        """
        found = fields.get("model_type")
        if found != cls.model_type:
            of_another = f"is a checkpoint of {found!r}, not of a merger"
            what = of_another if found else "has no config.json of a model"
            raise ValueError(
                f"{path} {what}. A PEFT adapter that holds a merger is loaded as the model. Save the merger of a model "
                f"with model.save_merger(directory) and load that."
            )
        return cls.from_dict(as_saved_by_this_release(fields), **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers.

        Raises:
            ValueError: It names code that would be fetched and run, or a value is out of range.
        """
        return super().from_dict(as_data(config_dict), **kwargs)

    def to_dict(self) -> dict:
        """All fields, as JSON has them."""
        fields = super().to_dict()
        fields.pop("_name_or_path", None)  # where it was loaded from, which is nobody's business
        fields.pop("_pre_quantization_dtype", None)  # transformers 4.57 leaves it here, a torch.dtype that is no JSON
        return fields

    def set_vision_dim(self, vision_dim: int):
        """Changes the width of the features, and `internal_dim` where that was half of it."""
        if self.internal_dim == self.vision_dim // 2:
            self.internal_dim = vision_dim // 2
        self.vision_dim = vision_dim

    def num_tokens(self, num_patches: int) -> int:
        """Tokens M that N = `num_patches` visual tokens become.

        Raises:
            ValueError: `num_merged_tokens` and `merge_ratio` disagree for this N, or M is more than N.
        """
        if self.merger_type == "none":
            return num_patches
        ratio = self.merge_ratio
        if ratio is None and self.num_merged_tokens is None:
            ratio = DEFAULT_MERGE_RATIO
        from_ratio = None if ratio is None else max(1, round(ratio * num_patches))
        if self.num_merged_tokens is None:
            return from_ratio
        if from_ratio not in (None, self.num_merged_tokens):
            raise ValueError(
                f"num_merged_tokens={self.num_merged_tokens} and merge_ratio={ratio} disagree: the ratio gives "
                f"{from_ratio} of {num_patches} tokens. Give only one of them."
            )
        if self.num_merged_tokens > num_patches:
            raise ValueError(
                f"num_merged_tokens={self.num_merged_tokens} is more than the {num_patches} visual tokens of an image; "
                f"choose at most {num_patches}."
            )
        return self.num_merged_tokens


def by_name(args: tuple) -> dict:
    """Arguments of a LlavaConfig that were given by position, behind the two configurations.

    Raises:
        TypeError: There are more than it has.
    """
    if len(args) > len(POSITIONAL):
        raise TypeError(f"LlavaMergeConfig takes at most {len(POSITIONAL)} more by position: {', '.join(POSITIONAL)}.")
    return dict(zip(POSITIONAL, args, strict=False))


@add_sub_config("merger_config", MergerConfig)
class LlavaMergeConfig(LlavaConfig):
    """Configuration of a LLaVA with a token merger: [`~transformers.LlavaConfig`] plus `merger_config`.

    Args:
        merger_config: A [`MergerConfig`] or its fields as a dict; `vision_dim` and `text_dim` left out of the dict are
            taken from the tower and the language model, and without a budget a quarter of the tokens is kept.

    The other arguments are those of [`~transformers.LlavaConfig`]. `image_seq_length` becomes M.

    Raises:
        ValueError: The merger's widths are not those of the model, or its budget does not fit the image.
    """

    model_type = ModelType("llava_merge")

    def __init__(
        self, vision_config=None, text_config=None, *args, merger_config: MergerConfig | dict | None = None, **kwargs
    ):
        self.merger_config = None
        kwargs |= by_name(args)
        super().__init__(vision_config=vision_config, text_config=text_config, **kwargs)
        self.set_merger_config(merger_config if merger_config is not None else {})
        self.auto_map = dict(AUTO_MAP)  # never what a checkpoint says, which a push would hand on

    def __init_subclass__(cls, *args, **kwargs):
        """Keeps the initialisation above in subclasses, where transformers 5 would put that of a dataclass."""
        if "__init__" not in vars(cls):

            def __init__(self, *given, **named):
                super(cls, self).__init__(*given, **named)

            cls.__init__ = __init__
        super().__init_subclass__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Reads the configuration of a llava_merge or a stock LLaVA checkpoint; arguments as in transformers.

        Args:
            merger_config: Laid over that of the checkpoint: an object, or a dict field by field.

        Raises:
            ValueError: The checkpoint is of another architecture, or `merger_config` does not fit its merger.
        """
        fields, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(fields, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; `merger_config` and the fields of stock LLaVA are read as by `from_pretrained`.

        Raises:
            ValueError: As `from_pretrained`, or it names code that would be fetched and run.
        """
        fields = stock_or_own_fields(as_data(config_dict), cls.model_type)
        saved = fields.get("merger_config")
        if isinstance(saved, dict):
            saved = as_saved_by_this_release(saved)
        fields["merger_config"] = lay_over(saved, kwargs.pop("merger_config", None))
        return super().from_dict(fields, **kwargs)

    def _get_generation_parameters(self) -> dict:
        """Settings of `generate` that have no place here, which each call of it on transformers 5 asks for.

        Before 5.23 the answer takes a whole default configuration to compare with, which can last as long as a short
        prefill, also where there is no setting at all. Remove when 5.23 is the oldest 5.x.
        """
        present = vars(self).keys() & GenerationConfig._get_default_generation_params().keys()
        return super()._get_generation_parameters() if present else {}

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        if name == "vision_feature_layer" and self.__dict__.get("merger_config") is not None:
            self.merger_config.set_vision_dim(self.merged_vision_dim)

    @property
    def num_patches(self) -> int:
        """Visual tokens N of one image before merging, without CLS: 576 in LLaVA-1.5."""
        rows, columns = self.patch_grid(self.image_shape)
        return rows * columns

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels of the tower's images."""
        return height_and_width("image_size", self.vision_config.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width in pixels of a patch."""
        return height_and_width("patch_size", self.vision_config.patch_size)

    def patch_grid(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of images of `image_shape`, height and width in pixels."""
        height, width = self.patch_shape
        return index(image_shape[0]) // height, index(image_shape[1]) // width  # of a picture that is traced, tensors

    def feature_layers(self, layer: int | list[int] | None = None) -> list[int]:
        """Hidden states of the tower that `layer` means, default `vision_feature_layer`, counted from the front."""
        layer = self.vision_feature_layer if layer is None else layer
        num_states = self.vision_config.num_hidden_layers + 1
        return [state + num_states if state < 0 else state for state in ([layer] if isinstance(layer, int) else layer)]

    def merger_layers(self) -> list[int]:
        """Hidden states of the tower that the merger reads besides the features, counted from the front."""
        return self.feature_layers(self.merger_config.feature_layers or [])

    @property
    def num_used_tower_layers(self) -> int:
        """Layers of the tower up to the last that features or merger come from; LLaVA-1.5's last is never used.

        Other towers than CLIP and SigLIP keep all: some end with a norm that is no part of the layer before.
        """
        num_layers = self.vision_config.num_hidden_layers
        if self.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            return num_layers
        return min(num_layers, max(1, *self.feature_layers(), *self.merger_layers()))

    @property
    def used_vision_config(self) -> PretrainedConfig:
        """The tower's configuration without the layers that no feature is taken from."""
        if self.num_used_tower_layers == self.vision_config.num_hidden_layers:
            return self.vision_config
        vision_config = copy.deepcopy(self.vision_config)
        vision_config.num_hidden_layers = self.num_used_tower_layers
        return vision_config

    @property
    def mrope_section(self) -> list[int] | None:
        """Makes vLLM ask the model where tokens sit instead of counting them; None where they are packed.

        vLLM looks for it here; the rotary embedding, which looks elsewhere, stays as it is.
        """
        return [1, 1, 1] if keeps_places(self.merger_config) else None

    @property
    def merged_vision_dim(self) -> int:
        """Width of the merged features: the tower's hidden size times the number of feature layers."""
        return self.vision_config.hidden_size * len(self.feature_layers())

    def set_merger_config(self, merger_config: MergerConfig | dict):
        """Fits `merger_config` to this model and makes it the merger's; the config is unchanged where it raises."""
        self.merger_config = self.fit_merger_config(merger_config)
        if self.merger_config.merger_type != "none":
            self.image_seq_length = self.merger_config.num_merged_tokens

    def fit_merger_config(self, merger_config: MergerConfig | dict) -> MergerConfig:
        """`merger_config` with the widths, the budget and the question marks of this model.

        Raises:
            ValueError: It is for other widths, or its budget does not fit the image.
        """
        widths = {
            "vision_dim": self.merged_vision_dim,
            "text_dim": self.text_config.hidden_size,
            "tower_dim": self.vision_config.hidden_size,
        }
        if isinstance(merger_config, dict):
            check_merger_fields(merger_config)
            own_default = {}
            if merger_config.get("merger_type") in LAYER_METHODS:
                own_default = {"feature_layers": default_feature_layers(self.vision_config.num_hidden_layers)}
            merger_config = MergerConfig(**{**widths, **own_default, **merger_config})
        else:
            merger_config = copy.deepcopy(merger_config)  # it may be another model's too
        if not merger_config.question_aware:
            merger_config.text_dim = widths["text_dim"]  # nothing depends on it
        if not merger_config.feature_layers:
            merger_config.tower_dim = widths["tower_dim"]  # nor on this
        for name, width in widths.items():
            if getattr(merger_config, name) != width:
                raise ValueError(
                    f"The merger has {name}={getattr(merger_config, name)}, this model needs {name}={width}. Use a "
                    f"merger made for this model, or MergerConfig(..., {name}={width}) for a new one."
                )
        self.check_layers("feature_layers", merger_config.feature_layers or [])
        self.check_layers("vision_feature_layer", self.vision_feature_layer)
        num_tokens = merger_config.num_tokens(self.num_patches)
        if merger_config.question_end_token_ids is None and self.merger_config is not None:
            for name in QUESTION_MARKS:  # of the tokenizer, which stays the same
                setattr(merger_config, name, getattr(self.merger_config, name))
        merger_config._attn_implementation = self._attn_implementation
        if merger_config.merger_type != "none":
            merger_config.num_merged_tokens = num_tokens
        return merger_config

    def check_layers(self, setting: str, layers: int | list[int]):
        """Refuses hidden states that the tower does not have.

        Raises:
            ValueError: There are some.
        """
        num_layers = self.vision_config.num_hidden_layers
        if not all(0 <= layer <= num_layers for layer in self.feature_layers(layers)):
            raise ValueError(
                f"{setting}={layers}: this tower has hidden states 0 to {num_layers}, which may also be counted from "
                f"the end, -1 to {-num_layers - 1}. Choose one of them, or several, such as "
                f"{default_feature_layers(num_layers)}."
            )


def height_and_width(name: str, size) -> tuple[int, int]:
    """A size of a tower's configuration, one number or a pair, as a pair.

    Raises:
        ValueError: It is neither.
    """
    if type(size) is int and size > 0:
        return size, size
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(map(is_whole_number, size)):
        raise ValueError(
            f"{name}={size!r} of the vision tower: rows and columns of its patches can only be told where it is a "
            f"whole number or a pair of them. Set it in vision_config."
        )
    return tuple(size)


def stock_or_own_fields(fields: dict, own_type: str = LlavaMergeConfig.model_type) -> dict:
    """A copy of a checkpoint's configuration `fields` as those of a [`LlavaMergeConfig`], or a subclass `own_type`.

    Raises:
        ValueError: It is the configuration of another architecture.
    """
    model_type = fields.get("model_type", LlavaMergeConfig.model_type)
    if model_type in (LlavaMergeConfig.model_type, own_type):
        return dict(fields)
    if model_type != LlavaConfig.model_type:
        raise ValueError(
            f"This is a checkpoint of model_type={model_type!r}; only LLaVA (model_type='llava', such as "
            f"llava-hf/llava-1.5-7b-hf) and llava_merge checkpoints can be loaded. Mergers are loaded with merger=..."
        )
    return {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}


def as_saved_by_this_release(merger_fields: dict) -> dict:
    """The saved fields of a merger; those of 0.1.0, which did not say so, were for packed positions without mass."""
    return {"position_ids": "packed", "attention_mass": 0.0, **merger_fields}


def as_fields(merger_config: MergerConfig | dict | str | None) -> MergerConfig | dict | None:
    """A merger's configuration, of which a method's name stands for `{"merger_type": name}`."""
    return {"merger_type": merger_config} if isinstance(merger_config, str) else merger_config


def refuse_merger_fields(arguments: dict):
    """Refuses fields of a merger among the arguments of a model, which would not be read there.

    Raises:
        ValueError: There is one.
    """
    for name in sorted(own_merger_fields() & arguments.keys()):
        value = arguments[name]
        raise ValueError(f"{name}={value!r} is a field of the merger: pass merger_config={{{name!r}: {value!r}}}.")


def lay_over(saved: dict | None, given: MergerConfig | dict | None) -> MergerConfig | dict | None:
    """The merger configuration `given` over that of a checkpoint; a dict field by field where the method is the same.

    Raises:
        ValueError: A field does not exist, or is one that the checkpoint's weights were trained with.
    """
    given = as_fields(given)
    if given is None:
        return saved
    if isinstance(given, dict):
        check_merger_fields(given)
        merger_type = given.get("merger_type")
    else:
        given = copy.deepcopy(given)
        merger_type = given.merger_type
    if saved is None or merger_type not in (None, saved.get("merger_type", DEFAULT_MERGER_TYPE)):
        return given
    if not isinstance(given, dict):
        fill_in(given, saved)
        check_trained_with(saved, given.to_dict())
        return given
    check_trained_with(saved, given)
    given = {name: value for name, value in given.items() if name != "attention_mass" or value is not None}
    replaced = {*BUDGET, *given} if {*BUDGET} & {*given} else {*given}
    return {**{name: value for name, value in saved.items() if name not in replaced}, **given}


def fill_in(given: MergerConfig, saved: dict):
    """Gives a configuration what it leaves open and the `saved` merger of the same method has."""
    for name in ("query_grid", "feature_layers", "attention_mass"):
        if getattr(given, name) is None:
            setattr(given, name, saved.get(name))


def check_trained_with(saved: dict, given: dict):
    """Refuses another value of a field that the weights of the `saved` merger were trained with.

    Raises:
        ValueError: There is one; it is named.
    """
    for name in filter(saved.__contains__, TRAINED_WITH):
        asked = list(given[name]) if isinstance(given.get(name), tuple) else given.get(name, saved[name])
        if asked != saved[name]:
            raise ValueError(
                f"The merger of this checkpoint was trained with {name}={saved[name]!r}, which cannot be changed to "
                f"{asked!r}. Leave {name} out of merger_config, or start from the stock LLaVA."
            )


def own_merger_fields() -> set[str]:
    """Fields of a merger's configuration that not every configuration has."""
    return {*MergerConfig().to_dict()} - {*PretrainedConfig().to_dict(), "has_projector"}


def check_merger_fields(fields: dict):
    """Refuses misspelt fields, which would otherwise be kept and ignored.

    Raises:
        ValueError: A field that a merger's configuration does not have.
    """
    known = {*MergerConfig().to_dict(), *PretrainedConfig().to_dict(), "auto_map", "dtype", "torch_dtype"}
    unknown = sorted(set(fields) - known)
    if unknown:
        _, *own, _ = inspect.signature(MergerConfig.__init__).parameters
        raise ValueError(f"merger_config has no field {', '.join(unknown)}; its fields are {', '.join(own)}.")


register_names(LlavaMergeConfig.model_type, "LlavaMergeForConditionalGeneration", "LlavaMergeModel")

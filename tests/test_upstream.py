# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What we rely on inside transformers. When a new release changes it, the message says what, and where we use it."""

import ast
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from packaging.specifiers import SpecifierSet

import llava_merge
from llava_merge import (
    LlavaMergeConfig,
    LlavaMergeForConditionalGeneration,
    LlavaMergeModel,
    LlavaMergeProcessor,
    MergerConfig,
    TokenMerger,
)
from llava_merge.compiled import CompiledModel
from llava_merge.model.compat import OUTPUT_OF_IMAGES, TRANSFORMERS_VERSION


pytestmark = pytest.mark.core

ROOT = Path(llava_merge.__file__).parent
MODULES = [*(ROOT / "model").glob("*.py"), *(ROOT / "compiled").glob("*.py")]
EVERYWHERE = ""
V4, V5, SINCE_5_18 = "<5", ">=5", ">=5.18"


@dataclass(frozen=True)
class Reliance:
    """One method of transformers that we override or call by a name that is not public.

    Attributes:
        of: Our class that has it.
        method: Its name.
        relied_on: Why we may.
        parameters: Names that it has to take.
        mentions: What its source, or that of `where`, has to contain.
        where: Method that calls it, where that matters.
        releases: On which transformers this holds.
    """

    of: type
    method: str
    relied_on: str
    parameters: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    where: str | None = None
    releases: str = EVERYWHERE


HEAD, HEADLESS = LlavaMergeForConditionalGeneration, LlavaMergeModel
RELIED_ON = [
    Reliance(
        HEADLESS,
        "forward",
        "it takes inputs_embeds that hold images, and its output has a place for them",
        parameters=("input_ids", "inputs_embeds", "attention_mask", "kwargs"),
        mentions=(f"{OUTPUT_OF_IMAGES}=",),
    ),
    Reliance(
        HEAD,
        "forward",
        "it hands what it does not know to the headless model",
        parameters=("labels", "kwargs"),
        mentions=("self.model(", "**kwargs"),
    ),
    Reliance(
        HEAD,
        "load_state_dict",
        "Trainer resumes with it, and gives it the keys of a checkpoint",
        parameters=("state_dict",),
    ),
    Reliance(MergerConfig, "to_dict", "what is saved comes from it", mentions=("self.to_dict(",), where="to_diff_dict"),
    Reliance(
        HEADLESS,
        "_replicate_for_data_parallel",
        "replicas are shallow copies, whose dictionaries of hooks are the model's",
        mentions=("self.__dict__.copy()",),
    ),
    Reliance(HEADLESS, "__init__", "the parts it builds, in this order", mentions=("vision_tower", "post_init")),
    Reliance(HEAD, "__init__", "the parts it builds, in this order", mentions=("self.model", "self.lm_head")),
    Reliance(
        HEADLESS,
        "get_image_features",
        "its arguments and result, which ours takes and gives",
        parameters=("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "kwargs"),
        mentions=("self.vision_tower(", "hidden_states", "self.multi_modal_projector("),
    ),
    Reliance(
        HEAD,
        "get_image_features",
        "its arguments",
        parameters=("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "kwargs"),
    ),
    Reliance(
        HEAD,
        "_expand_inputs_for_generation",
        "generate calls it once, before it repeats the rows, with the model's arguments as keywords",
        parameters=("expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"),
        mentions=("self._expand_inputs_for_generation(",),
        where="generate",
    ),
    Reliance(
        HEAD,
        "_prepare_position_ids_for_generation",
        "generate asks it for positions where it is given none, behind a cache too",
        parameters=("inputs_tensor", "model_kwargs"),
        mentions=("if not kwargs_has_position_ids", "self._prepare_position_ids_for_generation("),
        where="generate",
        releases=V5,
    ),
    Reliance(
        HEAD,
        "_prepare_cache_for_generation",
        "generate calls it when rows are repeated and max_length is known",
        parameters=("generation_config", "model_kwargs"),
        mentions=("generation_config.max_length - 1", "self._prepare_cache_for_generation("),
        where="generate",
    ),
    Reliance(
        HEAD,
        "_maybe_prepare_encoder_kwargs_for_generation",
        "generate encodes images in it, without their question, unless it is overridden",
        parameters=("inputs_tensor", "model_kwargs"),
        releases=SINCE_5_18,
    ),
    Reliance(
        HEAD,
        "prepare_inputs_for_generation",
        "encoded images are dropped outside the prefill",
        parameters=("kwargs",),
        mentions=("MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", "is_first_iteration"),
        releases=SINCE_5_18,
    ),
    Reliance(
        HEAD,
        "prepare_inputs_for_generation",
        "arguments that it does not know reach the forward, and generate finds them by the name kwargs",
        parameters=("kwargs",),
    ),
    Reliance(
        HEAD,
        "generate",
        "its arguments",
        parameters=("generation_config", "kwargs"),
    ),
    Reliance(
        CompiledModel,
        "generate",
        "it compiles nothing where it shall not",
        parameters=("generation_config", "kwargs"),
        mentions=("disable_compile",),
        where="_valid_auto_compile_criteria",
    ),
    Reliance(
        CompiledModel,
        "generate",
        "it calls the object itself, and not its forward, behind a cache that it is given",
        mentions=("self.__call__", "self.prepare_inputs_for_generation("),
        where="_sample",
    ),
    Reliance(
        CompiledModel,
        "prepare_inputs_for_generation",
        "generate gives it the ids, and the cache by name",
        parameters=("input_ids", "kwargs"),
    ),
    Reliance(
        HEAD,
        "_update_model_kwargs_for_generation",
        "arguments that it does not know stay for the next step",
        parameters=("model_kwargs",),
        mentions=("return model_kwargs",),
    ),
    Reliance(
        HEAD,
        "_get_candidate_generator",
        "a draft is given the model_kwargs that are passed here by name",
        parameters=("model_kwargs",),
        mentions=("model_kwargs=model_kwargs",),
        where="_assisted_decoding",
    ),
    Reliance(
        HEAD, "_validate_model_kwargs", "it asks inspect.signature of forward", mentions=("signature(self.forward)",)
    ),
    Reliance(
        HEAD,
        "_adjust_missing_and_unexpected_keys",
        "loading takes the names in _keys_to_ignore_on_load_missing out of its report after it initialised them",
        mentions=("_keys_to_ignore_on_load_missing",),
    ),
    Reliance(
        HEAD,
        "from_pretrained",
        "without a config it asks config_class.from_pretrained, and gives what that leaves over to the constructor",
        mentions=("config_class.from_pretrained(", "return_unused_kwargs=True"),
    ),
    Reliance(
        HEAD,
        "set_attn_implementation",
        "it tells parts by whether their configuration is that of the whole model",
        parameters=("attn_implementation",),
        mentions=("submodule.config",),
    ),
    Reliance(HEAD, "load_adapter", "its first argument", parameters=("peft_model_id",)),
    Reliance(HEAD, "push_to_hub", "its first argument", parameters=("repo_id",)),
    Reliance(TokenMerger, "push_to_hub", "its first argument", parameters=("repo_id",)),
    Reliance(TokenMerger, "__init__", "its argument", parameters=("config",)),
    Reliance(TokenMerger, "from_pretrained", "as that of the whole model"),
    *(
        Reliance(of, "save_pretrained", "its first arguments", parameters=("save_directory", "is_main_process"))
        for of in (HEAD, TokenMerger)
    ),
    *(
        Reliance(
            of,
            method,
            "weights that a checkpoint lacks are made there, and nowhere before",
            parameters=("missing_keys",),
            mentions=(f".{method}(",),
            where=where,
            releases=releases,
        )
        for of in (HEAD, TokenMerger)
        for method, where, releases in (
            ("_move_missing_keys_from_meta_to_device", "_finalize_model_loading", V5),
            ("_move_missing_keys_from_meta_to_cpu", "_load_pretrained_model", V4),
        )
    ),
    Reliance(TokenMerger, "_init_weights", "it is asked of each module that owns parameters", parameters=("module",)),
    Reliance(TokenMerger, "forward", "nothing but its name"),
    Reliance(LlavaMergeConfig, "__init__", "keywords only"),
    Reliance(LlavaMergeConfig, "__setattr__", "attributes are set one by one"),
    Reliance(
        LlavaMergeConfig,
        "_get_generation_parameters",
        "generate asks it for settings that the configuration should not have, of those that have a default",
        mentions=("GenerationConfig._get_default_generation_params()",),
        releases=V5,
    ),
    Reliance(
        LlavaMergeConfig,
        "from_pretrained",
        "it reads a dict and hands it to from_dict",
        mentions=("cls.get_config_dict(", "cls.from_dict("),
    ),
    Reliance(
        LlavaMergeConfig,
        "from_dict",
        "Auto classes call it with the caller's keywords",
        parameters=("config_dict", "kwargs"),
        mentions=("return_unused_kwargs", "cls(**config_dict)"),
    ),
    Reliance(
        LlavaMergeConfig,
        "__init_subclass__",
        "it makes dataclasses of subclasses, with another __init__ where they have none",
        mentions=('"__init__" in cls.__dict__',),
        releases=V5,
    ),
    Reliance(MergerConfig, "__init__", "keywords only"),
    Reliance(MergerConfig, "from_pretrained", "as that of LlavaMergeConfig"),
    Reliance(MergerConfig, "from_dict", "as that of LlavaMergeConfig"),
    Reliance(
        LlavaMergeProcessor, "__init__", "its arguments", parameters=("image_processor", "tokenizer", "patch_size")
    ),
    Reliance(LlavaMergeProcessor, "from_pretrained", "its first argument", ("pretrained_model_name_or_path",)),
    Reliance(
        LlavaMergeProcessor,
        "save_pretrained",
        "it writes into the folder, and with push_to_hub uploads that folder as repo_id",
        parameters=("save_directory", "push_to_hub"),
        mentions=("os.makedirs(save_directory", '"repo_id"', "self._upload_modified_files("),
    ),
    Reliance(
        LlavaMergeProcessor,
        "to_json_file",
        "save_pretrained writes the tokenizer before it calls it, and uploads afterwards",
        parameters=("json_file_path",),
        mentions=("self.to_json_file(",),
        where="save_pretrained",
    ),
    Reliance(
        LlavaMergeProcessor,
        "_load_tokenizer_from_pretrained",
        "from_pretrained calls it, and it hands its keywords to AutoTokenizer",
        parameters=("sub_processor_type", "pretrained_model_name_or_path", "kwargs"),
        mentions=("_load_tokenizer_from_pretrained(",),
        where="_get_arguments_from_pretrained",
        releases=V5,
    ),
    Reliance(
        LlavaMergeProcessor,
        "_get_num_multimodal_tokens",
        "the result's fields",
        parameters=("image_sizes",),
        mentions=("num_image_tokens", "num_image_patches"),
    ),
    Reliance(
        LlavaMergeProcessor,
        "_check_special_mm_tokens",
        "each call asks it with the ids of all rows",
        parameters=("text", "text_inputs", "modalities"),
        mentions=("self._check_special_mm_tokens(",),
        where="__call__",
    ),
    Reliance(
        LlavaMergeProcessor,
        "apply_chat_template",
        "arguments that it does not know reach the call",
        parameters=("conversation", "chat_template", "kwargs"),
        releases=V4,
    ),
    Reliance(
        LlavaMergeProcessor,
        "_merge_kwargs",
        "it takes what it reads out of the dictionaries of the call",
        parameters=("ModelProcessorKwargs", "tokenizer_init_kwargs", "kwargs"),
        mentions=("kwargs[modality].pop(",),
        releases=V4,
    ),
    Reliance(
        LlavaMergeProcessor,
        "validate_inputs",
        "it is asked before placeholders are written",
        parameters=("images", "text", "kwargs"),
        releases=V5,
    ),
    Reliance(
        LlavaMergeProcessor,
        "replace_image_token",
        "it is asked for each image's placeholders",
        parameters=("image_inputs", "image_idx"),
        releases=V5,
    ),
    Reliance(
        LlavaMergeProcessor,
        "__call__",
        "it asks replace_image_token of the object that it is called on",
        parameters=("images", "text", "kwargs"),
        releases=V5,
    ),
    Reliance(
        LlavaMergeProcessor,
        "__call__",
        "it writes the placeholders, only where there are images",
        parameters=("images", "text", "kwargs"),
        mentions=("_merge_kwargs(", "return_mm_token_type_ids"),
        releases=V4,
    ),
]
HERE = [each for each in RELIED_ON if TRANSFORMERS_VERSION in SpecifierSet(each.releases)]

# Names from the inside of transformers, and what they are imported for.
IMPORTED = {
    "transformers.configuration_utils.SubConfigSpec": "sub-configs since 5.22",
    "transformers.conversion_mapping.get_checkpoint_conversion_mapping": "stock keys for our classes on 5.x",
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": "stock keys for our classes on 5.x",
    "transformers.dynamic_module_utils.custom_object_save": "the code of a training-free merger",
    "transformers.generation.GenerationMixin": "has to be a direct base",
    "transformers.image_utils.ImageInput": "what the processor takes",
    "transformers.image_utils.is_pil_image": "whose sizes are width and height",
    "transformers.tokenization_utils_base.PreTokenizedInput": "what the processor takes",
    "transformers.tokenization_utils_base.TextInput": "what the processor takes",
    "transformers.modeling_outputs.BaseModelOutputWithPooling": "encoded images",
    "transformers.models.auto.modeling_auto": "names of models, by which pipelines, trainers and servers go",
    "transformers.models.llava.modeling_llava.LlavaCausalLMOutputWithPast": "logits from graphs",
    "transformers.models.llava.modeling_llava.LlavaMultiModalProjector": "the projector",
    "transformers.models.llava.modeling_llava.LlavaPreTrainedModel": "the base of both models",
    "transformers.models.llava.processing_llava.LlavaProcessorKwargs": "types of the processor's keywords on 4.57",
    "transformers.processing_utils.MultiModalData": "result of _get_num_multimodal_tokens",
    "transformers.processing_utils.ProcessingKwargs": "types of the processor's keywords on 5.x",
    "transformers.processing_utils.Unpack": "types of the processor's keywords",
    "transformers.utils.ModelOutput": "base of MergeOutput",
    "transformers.utils.SAFE_WEIGHTS_NAME": "the name of whole weights",
    "transformers.utils.cached_file": "the weights of an adapter",
    "transformers.utils.find_adapter_config_file": "the base model of an adapter",
    "transformers.utils.generic.can_return_tuple": "return_dict=False",
    "transformers.utils.logging": "logging",
    "transformers.utils.output_capturing.maybe_install_capturing_hooks": "hidden states of replicas on 5.x",
}
NOT_IN = {
    "transformers.configuration_utils.SubConfigSpec": "<5.22",
    "transformers.conversion_mapping.get_checkpoint_conversion_mapping": V4,
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": V4,
    "transformers.models.llava.processing_llava.LlavaProcessorKwargs": V5,
    "transformers.utils.output_capturing.maybe_install_capturing_hooks": V4,
}


def message(reliance: Reliance, found: str) -> str:
    return (
        f"transformers {transformers.__version__}: {found}. {reliance.of.__module__}.{reliance.of.__name__} relies on "
        f"{reliance.method}: {reliance.relied_on}."
    )


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "llava_merge"


def stock_method(of: type, name: str):
    """The method as transformers has it, unwrapped; None where it has none."""
    for cls in of.__mro__:
        if not is_ours(cls) and cls is not object and name in vars(cls):
            return inspect.unwrap(getattr(vars(cls)[name], "__func__", vars(cls)[name]))
    return None


@pytest.mark.parametrize("reliance", HERE, ids=lambda each: f"{each.of.__name__}.{each.method}")
def test_stock_methods_are_what_we_rely_on(reliance):
    method = stock_method(reliance.of, reliance.method)
    assert method is not None, message(reliance, f"{reliance.method} is gone")
    missing = set(reliance.parameters) - set(inspect.signature(method).parameters)
    assert not missing, message(reliance, f"{reliance.method} no longer takes {', '.join(sorted(missing))}")
    where = reliance.where or reliance.method
    source = inspect.getsource(stock_method(reliance.of, where)) if reliance.mentions else ""
    for text in reliance.mentions:
        assert text in source, message(reliance, f"{where} no longer has {text!r}")


OVERRIDING = [HEAD, HEADLESS, CompiledModel, TokenMerger, LlavaMergeConfig, MergerConfig, LlavaMergeProcessor]


@pytest.mark.parametrize("of", OVERRIDING)
def test_every_override_is_listed(of):
    ours = {
        name
        for cls in of.__mro__
        if is_ours(cls)
        for name, value in vars(cls).items()
        if inspect.isfunction(getattr(value, "__func__", value))
        and name not in ("__eq__", "__repr__", "__post_init__", "__init_subclass__")
    }
    overridden = {name for name in ours if stock_method(of, name) is not None}
    bases = {HEADLESS: (HEADLESS, HEAD)}.get(of, (of,))  # the two models share what loads and handles mergers
    assert overridden <= {each.method for each in HERE if each.of in bases}


def inside_imports() -> set[str]:
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_import_from_the_inside_is_listed():
    assert inside_imports() == set(IMPORTED)


@pytest.mark.parametrize("name", IMPORTED)
def test_what_is_imported_from_the_inside_is_there(name):
    if name in NOT_IN and TRANSFORMERS_VERSION in SpecifierSet(NOT_IN[name]):
        return
    module, attribute = name.rsplit(".", 1)
    users = [path.name for path in MODULES if attribute in path.read_text()]
    assert attribute in dir(importlib.import_module(module)), (
        f"transformers {transformers.__version__} has no {name}, which is used for {IMPORTED[name]} in {users}."
    )

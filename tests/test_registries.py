# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The lists by which other libraries tell what a model is, and what they do for one that they find there."""

import copy
import pickle
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import transformers
from conftest import agnostic, aware, make_processor, tiny_model, tiny_stock
from transformers import AutoModelForPreTraining, AutoTokenizer, pipeline
from transformers.models.auto import modeling_auto

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.model import compat
from llava_merge.model.compat import TRANSFORMERS_V5


M = 9
MAPPINGS = [
    name
    for name, mapping in vars(modeling_auto).items()
    if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES") and "llava" in mapping
]


class TestNames:
    @pytest.mark.parametrize("mapping", MAPPINGS)
    def test_ours_stand_beside_those_of_llava(self, mapping):
        names = getattr(modeling_auto, mapping)
        assert names["llava_merge"] == names["llava"].replace("Llava", "LlavaMerge")

    def test_the_mappings_that_others_read_are_among_them(self):
        other = "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES" if TRANSFORMERS_V5 else "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES"
        assert {"MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", other} <= {*MAPPINGS}

    def test_nobody_is_replaced(self, monkeypatch):
        names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        monkeypatch.setitem(names, "llava_merge", "Theirs")
        compat.register_names("llava_merge", "LlavaMergeForConditionalGeneration", "LlavaMergeModel")
        assert names["llava_merge"] == "Theirs"

    def test_mappings_of_classes_still_list_and_load(self):
        """They look for a module of transformers for each name that has a configuration there."""
        classes = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        assert LlavaMergeForConditionalGeneration in [*classes.values()]
        assert LlavaMergeConfig in [*classes.keys()] and classes[LlavaMergeConfig] is LlavaMergeForConditionalGeneration

    def test_auto_model_for_pre_training(self):
        config = tiny_model(agnostic(M)).config
        assert type(AutoModelForPreTraining.from_config(config)) is LlavaMergeForConditionalGeneration

    def test_a_pipeline_does_not_complain(self, monkeypatch):
        said = []
        monkeypatch.setattr(transformers.pipelines.base.logger, "error", lambda message, *args: said.append(message))
        processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=M)
        pipeline("image-text-to-text", model=tiny_model(agnostic(M)), processor=processor)
        assert said == []

    def test_transformers_serve_knows_what_it_is(self):
        if TRANSFORMERS_V5:
            serving = pytest.importorskip("transformers.cli.serving.model_manager").ModelManager
        else:
            serving = pytest.importorskip("transformers.commands.serving").ServeCommand
        modalities = [serving.get_model_modality(model) for model in (tiny_model(agnostic(M)), tiny_stock())]
        assert modalities[0] == modalities[1]

    @pytest.mark.skipif(not TRANSFORMERS_V5, reason="4.57 looks for the class in transformers alone")
    def test_transformers_serve_loads_a_folder_with_its_code(self, tmp_path):
        pytest.importorskip("transformers.cli.serving.model_manager")
        model, folder = tiny_model(agnostic(M)), tmp_path / "model"
        model.save_pretrained(folder)
        script = (
            "from transformers.cli.serving.model_manager import ModelManager as Manager\n"
            f"model = Manager(device='cpu', dtype='float32', trust_remote_code=True)._load_model({str(folder)!r})\n"
            "print(type(model).__name__, Manager.get_model_modality(model).name)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.split() == ["LlavaMergeForConditionalGeneration", "MULTIMODAL"]

    def test_online_dpo_gives_the_pictures_to_generate(self):
        online_dpo = pytest.importorskip("trl.experimental.online_dpo.online_dpo_trainer")
        assert "llava_merge" in online_dpo.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    def test_a_tokenizer_loads_by_the_configuration(self, tmp_path):
        make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=M).save_pretrained(tmp_path)
        tiny_model(agnostic(M)).config.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)("red")["input_ids"]


class TestModelType:
    def test_it_is_what_it_was(self):
        config = tiny_model(agnostic(M)).config
        copies = [config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))]
        assert {each.model_type for each in copies} == {LlavaMergeConfig.model_type} == {"llava_merge"}
        assert config.to_dict()["model_type"] == config.to_diff_dict()["model_type"] == "llava_merge"

    def test_an_object_may_have_another(self):
        config, other = (tiny_model(agnostic(M)).config for _ in range(2))
        config.model_type = "llava"
        assert (config.model_type, other.model_type, LlavaMergeConfig.model_type) == ("llava", *["llava_merge"] * 2)


class TestLiger:
    """A stand-in, for the real one needs a GPU's compiler; the installed one is asked where there is one."""

    @pytest.fixture
    def liger(self, monkeypatch):
        kernels, calls = ModuleType(compat.LIGER), []

        def apply_liger_kernel_to_llava(model=None, **options):
            calls.append((model, options))

        kernels.apply_liger_kernel_to_llava = apply_liger_kernel_to_llava
        kernels.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llava": apply_liger_kernel_to_llava}
        kernels.calls = calls
        monkeypatch.setitem(sys.modules, compat.LIGER, kernels)
        return kernels

    def test_it_finds_the_model_type_though_it_is_imported_later(self, liger):
        model = tiny_model(agnostic(M))
        assert "llava_merge" in (model.config.model_type, *liger.MODEL_TYPE_TO_APPLY_LIGER_FN)
        liger.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, cross_entropy=True)
        assert liger.calls == [(model, {"cross_entropy": True, "fused_linear_cross_entropy": False})]

    def test_what_is_not_used_is_said(self, liger, monkeypatch):
        said = []
        monkeypatch.setattr(compat, "logger", SimpleNamespace(warning_once=said.append))
        apply = liger.MODEL_TYPE_TO_APPLY_LIGER_FN.get(LlavaMergeConfig.model_type)
        apply(fused_linear_cross_entropy=False)
        assert not said
        apply()
        assert len(said) == 1 and "fused loss is not used" in said[0]

    def test_nobody_is_replaced(self, liger):
        liger.MODEL_TYPE_TO_APPLY_LIGER_FN["llava_merge"] = "theirs"
        assert liger.MODEL_TYPE_TO_APPLY_LIGER_FN[LlavaMergeConfig.model_type] == "theirs"

    @pytest.mark.parametrize("lists", [{}, {"MODEL_TYPE_TO_APPLY_LIGER_FN": {}}])
    def test_a_release_without_llava_is_left_alone(self, lists, monkeypatch):
        module = ModuleType(compat.LIGER)
        vars(module).update(lists)
        monkeypatch.setitem(sys.modules, compat.LIGER, module)
        assert LlavaMergeConfig.model_type == "llava_merge" and not any(lists.values())

    def test_the_installed_one(self):
        kernels = pytest.importorskip("liger_kernel.transformers.monkey_patch")
        model = tiny_model(aware(M))
        kernels._apply_liger_kernel_to_instance(model)
        mlp = model.model.language_model.layers[0].mlp
        assert mlp.forward.__func__.__module__.startswith("liger_kernel")
        assert "forward" not in vars(model)  # ours, which tells the merger what is answer

    def test_the_package_imports_neither(self):
        script = (
            "import sys, llava_merge; print([name for name in ('liger_kernel', 'peft', 'trl') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_peft_knows_the_layers_that_it_knows_of_llava():
    peft = pytest.importorskip("peft")
    model, stock = tiny_model(agnostic(M)), tiny_stock()
    trained = [
        {name for name, parameter in peft.get_peft_model(each, peft.LNTuningConfig()).named_parameters()
         if parameter.requires_grad and not {"vision_tower", "merger"} & {*name.split(".")}}
        for each in (model, stock)
    ]  # fmt: skip
    assert trained[0] == trained[1] != set()

# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""vLLM, with the real package on tiny random models, against transformers; in an environment that has it."""

import gc
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_ID, agnostic, aware, load_example, make_processor, scale_up, tiny_config, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.evaluation.data import demo_questions
from llava_merge.serving.convert import convert


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}  # float32 on a GPU, which has TF32 else
vllm = pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
serving_model = pytest.importorskip("llava_merge.serving.vllm")
benchmark_serving = load_example("benchmark_serving")


from vllm.config import ModelConfig  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.processing.context import TimingContext  # noqa: E402
from vllm.multimodal.processing.inputs import ProcessorInputs  # noqa: E402
from vllm.multimodal.utils import group_and_batch_mm_kwargs  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402


pytestmark = pytest.mark.vllm
GUIDE = (Path(__file__).parents[1] / "examples" / "guides" / "serving.md").read_text(encoding="utf-8")
NUM_GPUS = torch.cuda.device_count()  # of CUDA, where the tests run on them if there are any
# without a look at free memory, which several tests share
ON_GPU = {"kv_cache_memory_bytes": 2**28, "gpu_memory_utilization": 0.1} if NUM_GPUS else {}
NUM_TOKENS = 12  # of an answer
OPTIONS = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
SAMPLING = {"temperature": 0, "max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS}
WIDTH = 128  # of the language model: vLLM's attention takes heads of 32 and more
# A block of vLLM's cache holds the image and the beginning of the question, in which all of them are the same.
BEGINNING = "the star is blue the circles are red there is the red star " * 2
QUESTIONS = tuple(BEGINNING + end for end in ("what color is the star ?", "how many circles are there ?", "red blue ?"))
MERGERS = {
    "agnostic": agnostic(9),
    "aware": aware(9),
    "visionzip": {"merger_type": "visionzip", "num_merged_tokens": 9},
    "salient": {**aware(9), "merger_type": "salient_pooling"},
    "cdpruner": {**aware(9), "merger_type": "cdpruner"},
    "mmtok": {**aware(9), "merger_type": "mmtok"},
}


def pictures(number: int = 3) -> list[Image.Image]:
    """Noise, of several shapes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(84, 84 + 8 * index, 3) for index in range(number)]
    return [Image.fromarray(torch.randint(0, 256, size, generator=generator).byte().numpy()) for size in sizes]


def make_base(folder, *tower, **fields):
    """A stock LLaVA in `folder`."""
    stock = LlavaForConditionalGeneration(tiny_config(*tower, text_hidden_size=WIDTH, **fields))
    scale_up(stock).save_pretrained(folder)
    make_processor(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock LLaVA with CLIP's tower."""
    return make_base(tmp_path_factory.mktemp("stock"))


def make_checkpoint(base, folder, fields: dict, *tower, **options):
    """A converted checkpoint in `folder` / "served" with the merger that `fields` describe, trained if it can be."""
    model = tiny_model({"attention_mass": 0.0, **fields}, *tower, train_merger=True, text_hidden_size=WIDTH, **options)
    model.save_merger(folder / "merger")
    convert(str(base), folder / "served", str(folder / "merger"), fields["num_merged_tokens"])
    return folder / "served"


@pytest.mark.parametrize("fields", [{"merger_type": "tome", "num_merged_tokens": 9}, aware(9)], ids=["tome", "aware"])
def test_a_request_asks_the_host_for_nothing_that_the_start_has_worked_out(fields, base, tmp_path, monkeypatch):
    """What grows with patches, methods or budgets was done per request, and took longer than the prefill it saved."""
    load_general_plugins()
    config = ModelConfig(model=str(make_checkpoint(base, tmp_path, fields)), dtype="float32", max_model_len=256)
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    ids = processor.info.get_tokenizer()(chat(QUESTIONS[0]))["input_ids"]

    def apply(image):
        items = processor.info.parse_mm_data({"image": [image]})
        asked = ProcessorInputs(ids, items, hf_processor_mm_kwargs={"num_merged_tokens": 4})
        return processor.apply(asked, TimingContext(enabled=False))

    first, second = pictures(2)
    apply(first)
    for name in ("served_budgets", "find_merging_method", "keeps_places", "num_rope_rows", "turn_marks_of"):
        monkeypatch.setattr(f"llava_merge.serving.requests.{name}", None)
    made = apply(second)
    assert made["prompt_token_ids"].count(IMAGE_ID) == 4 and len(made["mm_hashes"]["image"]) == 1


@contextmanager
def serving(folder, **options):
    """vLLM with a checkpoint, in this process."""
    defaults = {"max_model_len": 256, "block_size": 32, "enforce_eager": True, "distributed_executor_backend": "uni"}
    defaults |= {"dtype": "float32", **ON_GPU}
    llm = vllm.LLM(str(folder), disable_log_stats=False, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()


def chat(*turns: str, images: int = 1) -> str:
    """A prompt of questions and answers in turn, with the images in the first."""
    roles = ("USER: ", "ASSISTANT: ")
    text = "".join(f"{roles[index % 2]}{turn} " for index, turn in enumerate(turns))
    return "<s>" + text.replace("USER: ", "USER: " + "<image> " * images, 1) + "ASSISTANT:"


class Reference:
    """The same checkpoint in transformers."""

    def __init__(self, folder):
        self.model = LlavaMergeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = LlavaMergeProcessor.from_pretrained(folder)

    def answer(self, prompt: str, images: list[Image.Image], budget: int | None = None) -> list[int]:
        """Ids of the answer; the prompt's are those that `request` gives."""
        inputs = self.processor(
            images=images or None, text=prompt, num_merged_tokens=budget, add_special_tokens=False, return_tensors="pt"
        )
        return self.model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :].tolist()

    def request(self, prompt: str, images: list[Image.Image], budget: int | None = None) -> dict:
        """What vLLM takes."""
        request = {"prompt_token_ids": self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]}
        if images:
            request["multi_modal_data"] = {"image": images}
        return request | ({"mm_processor_kwargs": {"num_merged_tokens": budget}} if budget else {})


def ask(llm, requests: list[dict]) -> list[list[int]]:
    """Ids of the answers to a batch."""
    sampling = vllm.SamplingParams(**SAMPLING)
    return [list(done.outputs[0].token_ids) for done in llm.generate(requests, sampling, use_tqdm=False)]


def cases() -> list[tuple]:
    """Every picture with every question and three budgets; several pictures, later turns, and no question at all."""
    images = pictures()
    found = [
        (chat(question), [image], budget) for image in images for question in QUESTIONS for budget in (None, 4, 16)
    ]
    found += [(chat(question, images=2), images[:2], None) for question in QUESTIONS]
    found += [(chat("red blue", "star", question), images[:1], None) for question in QUESTIONS]
    found += [(chat(QUESTIONS[0], "red blue", "<image> " + QUESTIONS[1]), [images[0], pictures(4)[3]], None)]
    found += [(chat(""), images[:1], None), (chat("what is red ?", images=0), [], None)]
    return found


@pytest.mark.parametrize("position_ids", ["source", "packed"])
@pytest.mark.parametrize("merger", MERGERS)
def test_answers_are_those_of_transformers(merger, position_ids, base, tmp_path):
    folder = make_checkpoint(base, tmp_path, MERGERS[merger] | {"position_ids": position_ids})
    reference, asked = Reference(folder), cases()
    expected = [reference.answer(*case) for case in asked]
    assert len(set(map(tuple, expected))) > 0.8 * len(expected)
    requests = [reference.request(*case) for case in asked]
    with serving(folder) as llm:
        assert ask(llm, requests) == expected  # cold, together
        assert [ask(llm, [request])[0] for request in requests] == expected  # warm, one by one
        hits = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        assert hits["vllm:prefix_cache_hits"] and hits["vllm:mm_cache_hits"]


@pytest.mark.parametrize(
    ("tower", "fields", "merger"),
    [
        ("siglip", {}, agnostic(9)),
        ("clip", {"vision_feature_layer": [-2, -1]}, agnostic(9)),
        ("clip", {}, aware(9, feature_layers=[0, 1])),
        ("siglip", {}, {"merger_type": "image_resize", "num_merged_tokens": 9}),
    ],
    ids=["SigLIP", "several layers", "layers of the merger", "smaller pictures"],
)
def test_other_towers(tower, fields, merger, tmp_path):
    folder = make_checkpoint(make_base(tmp_path / "base", tower, **fields), tmp_path, merger, tower, **fields)
    reference, asked = Reference(folder), [case for case in cases() if case[2] is None]
    with serving(folder) as llm:
        assert ask(llm, [reference.request(*case) for case in asked]) == [reference.answer(*case) for case in asked]


def test_text_alone_where_no_images_are_allowed(question_aware):
    folder, reference = question_aware
    case = chat("what is red ?", images=0), []
    with serving(folder, limit_mm_per_prompt={"image": 0}) as llm:
        assert ask(llm, [reference.request(*case)]) == [reference.answer(*case)]


@pytest.fixture(scope="module")
def question_aware(base, tmp_path_factory):
    """A checkpoint with a question-aware V3, and the same in transformers."""
    folder = make_checkpoint(base, tmp_path_factory.mktemp("aware"), aware(9))
    return folder, Reference(folder)


@pytest.mark.parametrize(
    ("merger", "options"),
    [
        ("aware", {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}),  # borders of chunks inside images
        ("visionzip", {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}),
        ("aware", {"enforce_eager": False}),
        ("visionzip", {"enforce_eager": False}),
        ("aware", {"mm_processor_cache_gb": 0}),
        ("aware", {"enable_prefix_caching": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_answers_do_not_depend_on_how_it_runs(merger, options, base, tmp_path):
    folder = make_checkpoint(base, tmp_path, MERGERS[merger])
    reference, asked = Reference(folder), cases()
    requests = [reference.request(*case) for case in asked]
    with serving(folder, **options) as llm:
        assert ask(llm, requests) == [reference.answer(*case) for case in asked]


@pytest.mark.parametrize("merger", ["aware", "visionzip"])
def test_requests_that_are_preempted_and_computed_again(merger, base, tmp_path):
    folder = make_checkpoint(base, tmp_path, MERGERS[merger])
    reference = Reference(folder)
    two, words = pictures()[:2], "there is the red star "  # so that the answer begins a third block of each request
    asked = [(chat(words + question, images=2), two, None) for question in QUESTIONS] * 4
    with serving(folder, num_gpu_blocks_override=9) as llm:
        assert ask(llm, [reference.request(*case) for case in asked]) == [reference.answer(*case) for case in asked]
        assert next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_positions_beyond_those_of_the_text_model(base, tmp_path):
    """Rotary embeddings are looked up in a table that nobody checks the bounds of."""
    folder = make_checkpoint(base, tmp_path, agnostic(4))
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(fields))
    reference = Reference(folder)
    case = chat("what color is the star ?", images=5), pictures(5), None
    with serving(folder, max_model_len=64) as llm:
        assert ask(llm, [reference.request(*case)]) == [reference.answer(*case)]
        with pytest.raises(ValueError, match="7 images could reach position 288, .* and 256 are prepared"):
            ask(llm, [reference.request(chat("what", images=7), pictures(7))])


def test_the_tower_runs_once_a_picture(question_aware, monkeypatch):
    """Other questions and budgets find its features kept; those longest not used go first."""
    folder, reference = question_aware
    seen = []
    monkeypatch.setattr(serving_model, "KEPT_PICTURES", 2)
    run = serving_model.LlavaMergeForConditionalGeneration._run_tower
    monkeypatch.setattr(
        serving_model.LlavaMergeForConditionalGeneration,
        "_run_tower",
        lambda self, pixel_values: (seen.append(len(pixel_values)), run(self, pixel_values))[1],
    )
    with serving(folder) as llm:
        seen.clear()  # of the profile

        def runs(*asked: tuple) -> list[int]:
            for case in asked:
                assert ask(llm, [reference.request(*case)]) == [reference.answer(*case)]
            done = seen.copy()
            seen.clear()
            return done

        first, second, third = pictures()
        assert runs(*((chat(question), [first], budget) for question in QUESTIONS for budget in (None, 4))) == [1]
        assert runs((chat(QUESTIONS[0], images=2), [first, second], None)) == [1]
        assert runs((chat(QUESTIONS[1]), [first], 16), (chat(QUESTIONS[1]), [third], None)) == [1]
        assert runs((chat(QUESTIONS[2]), [first], 16), (chat(QUESTIONS[2]), [second], None)) == [1]


@pytest.mark.parametrize("merger", ["aware", "visionzip"])
def test_weights_that_are_loaded_anew(merger, base, tmp_path):
    """Features of the old tower are no longer answered with."""
    folder = make_checkpoint(base, tmp_path, MERGERS[merger])
    (tmp_path / "other").mkdir()
    other = make_checkpoint(make_base(tmp_path / "other_base"), tmp_path / "other", MERGERS[merger])
    for file in other.glob("*.safetensors"):
        weights = {name: weight * (1 + 0.3 * torch.randn_like(weight)) for name, weight in load_file(file).items()}
        file.unlink()  # it may be the base's
        save_file(weights, file, {"format": "pt"})
    asked = [(chat(question), [image]) for image in pictures() for question in QUESTIONS]
    before, after = ([reference.answer(*case) for case in asked] for reference in map(Reference, (folder, other)))
    assert before != after
    requests = [Reference(folder).request(*case) for case in asked]
    with serving(folder) as llm:
        assert ask(llm, requests) == before
        weights = [each for file in other.glob("*.safetensors") for each in load_file(file).items()]
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        assert ask(llm, requests) == after


def test_the_tower_is_given_a_few_images_at_once(base, tmp_path, monkeypatch):
    """A step may hold hundreds where M is small, and memory was kept for a few."""
    seen, compute = [], serving_model.LlavaMergeForConditionalGeneration._compute_tower
    monkeypatch.setattr(serving_model, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(
        serving_model.LlavaMergeForConditionalGeneration,
        "_compute_tower",
        lambda self, pixel_values: (seen.append(len(pixel_values)), compute(self, pixel_values))[1],
    )
    folder = make_checkpoint(base, tmp_path, MERGERS["visionzip"])
    reference, images = Reference(folder), pictures(5)
    with serving(folder) as llm:
        seen.clear()  # of the profile
        case = chat(QUESTIONS[0], images=5), images
        assert ask(llm, [reference.request(*case)]) == [reference.answer(*case)]
    assert seen == [2, 2, 1]


@pytest.fixture(scope="class")
def served(question_aware):
    """vLLM with the question-aware checkpoint, and the reference."""
    folder, reference = question_aware
    with serving(folder) as llm:
        yield llm, reference


class TestRefusals:
    @pytest.mark.parametrize("budget", [0, 37, "16", True, 4.0])
    def test_a_budget_that_is_not_served(self, budget, served):
        llm, reference = served
        request = reference.request(*cases()[0]) | {"mm_processor_kwargs": {"num_merged_tokens": budget}}
        with pytest.raises(ValueError, match="num_merged_tokens=.* is served with whole numbers from 1 to 36"):
            ask(llm, [request])

    def test_more_placeholders_than_images(self, served):
        llm, reference = served
        request = reference.request(chat("what", images=2), pictures(1))
        with pytest.raises(ValueError, match="2 image placeholders for 1 images"):
            ask(llm, [request])

    def test_images_that_come_as_embeddings(self, served):
        llm, reference = served
        request = reference.request(*cases()[0]) | {"multi_modal_data": {"image": torch.randn(1, 9, WIDTH)}}
        with pytest.raises(ValueError, match="You must set `--enable-mm-embeds`"):
            ask(llm, [request])

    def test_then_it_answers_as_before(self, served):
        llm, reference = served
        assert ask(llm, [reference.request(*cases()[0])]) == [reference.answer(*cases()[0])]

    def test_a_checkpoint_without_weights_of_the_merger(self, base, tmp_path):
        folder = make_checkpoint(base, tmp_path, agnostic(9))
        for file in folder.glob("*.safetensors"):
            weights = {name: tensor for name, tensor in load_file(file).items() if "output_proj" not in name}
            file.unlink()
            save_file(weights, file)
        with pytest.raises(ValueError, match="lacks weights of this model.*output_proj"):
            with serving(folder):
                pass


def batch_of(llm, asked: list[tuple[Image.Image, str, int]]) -> dict[str, torch.Tensor]:
    """What the engine gives the model of pictures with their questions and budgets."""
    processor, items = llm.llm_engine.renderer.mm_processor, []
    for image, question, budget in asked:
        ids = processor.info.get_tokenizer()(chat(question))["input_ids"]
        inputs = ProcessorInputs(ids, processor.info.parse_mm_data({"image": [image]}))
        inputs.hf_processor_mm_kwargs = {"num_merged_tokens": budget}
        items += [
            ("image", item) for item in processor.apply(inputs, TimingContext(enabled=False))["mm_kwargs"]["image"]
        ]
    ((_, _, batch),) = group_and_batch_mm_kwargs(items, device=torch.device("cuda"), pin_memory=True)
    return batch


@pytest.mark.skipif(not NUM_GPUS, reason="of a GPU")
@pytest.mark.parametrize("merger", MERGERS)
def test_the_host_does_not_wait_for_the_gpu_and_recorded_towers_compute_the_same(merger, base, tmp_path):
    folder = make_checkpoint(base, tmp_path, MERGERS[merger])
    with serving(folder, enforce_eager=False) as llm:
        batches = [
            batch_of(llm, [(image, QUESTIONS[index % 3], (9, 4)[index % 3 % 2]) for index, image in enumerate(images)])
            for images in map(pictures, (1, 3, 8, 9))
        ]

        @torch.inference_mode()
        def check(model):
            assert model.tower_graphs is not None
            for batch in batches:
                with_graphs = model._run_tower(batch["pixel_values"])[0].clone()
                torch.testing.assert_close(model._compute_tower(batch["pixel_values"])[0], with_graphs)
                expected = [image.clone() for image in model.embed_multimodal(**batch)]
                model.kept_features.forget()
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    found = model.embed_multimodal(**batch)
                    mask = torch.arange(2 * sum(map(len, found))) % 2 == 0
                    ids = torch.full(mask.shape, 9, device="cuda")
                    model.embed_input_ids(ids, found, is_multimodal=mask)
                    with pytest.raises(RuntimeError, match="synchronizing"):
                        ids.sum().item()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other)

        llm.apply_model(check)


def test_features_of_the_last_pictures_are_kept(monkeypatch):
    monkeypatch.setattr(serving_model, "KEPT_PICTURES", 3)
    kept, made = serving_model.KeptFeatures(), []

    def features(*pictures: int) -> list[int]:
        """Those made, of pictures whose features are their number."""
        made.clear()

        def make(images):
            made.extend(pictures[image] for image in images)
            return torch.tensor([pictures[image] for image in images]).float()[:, None, None]

        assert kept([*pictures], make)[:, 0, 0].tolist() == [*pictures]
        return made.copy()

    assert features(1, 2, 1) == [1, 2]
    assert features(2, 1) == [] and features(3) == [3] and features(1, 3) == []
    assert features(4, 4) == [4] and features(3, 1, 4) == []  # 2 went, the longest not used
    assert features(5, 2) == [5, 2] and features(4) == [] and features(1) == [1]
    assert features(1, 2, 6, 7) == [1, 2, 6, 7] and features(1, 4) == [], "more than are kept leave what is there"


class TestBfloat16:
    def flips(self, folder, model_class, questions) -> int:
        """Answers of the bundled model that vLLM and transformers give differently."""
        device = "cuda" if NUM_GPUS else "cpu"
        model = model_class.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        processor = AutoProcessor.from_pretrained(folder)
        requests, expected = [], []
        for question in questions:
            prompt = processor.apply_chat_template(question.messages, add_generation_prompt=True)
            images = question.open_images()
            inputs = processor(images=images, text=prompt, return_tensors="pt").to(device, torch.bfloat16)
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
            ids = processor.tokenizer(prompt)["input_ids"]
            requests.append({"prompt_token_ids": ids, "multi_modal_data": {"image": images}})
        sampling = vllm.SamplingParams(temperature=0, max_tokens=8)
        with serving(folder, dtype="bfloat16", max_model_len=1024, enforce_eager=not NUM_GPUS) as llm:
            done = [each.outputs[0].text for each in llm.generate(requests, sampling, use_tqdm=False)]
        assert len(set(expected)) > 10
        return sum(one != other for one, other in zip(done, expected, strict=True))

    def test_answers_flip_no_more_than_those_of_stock(self, tmp_path, capsys):
        """Other kernels round differently, and an answer may turn where two words were nearly the same."""
        questions = demo_questions("test", 50 if NUM_GPUS else 3, hard=True)
        convert(str(MODEL_DIR), tmp_path / "served", find_merger("served"), 64)
        merged = self.flips(tmp_path / "served", LlavaMergeForConditionalGeneration, questions)
        stock = self.flips(MODEL_DIR, LlavaForConditionalGeneration, questions)
        with capsys.disabled():
            print(f"\nof {len(questions)} answers in bfloat16 flip: {merged} merged, {stock} stock")
        assert merged <= stock


SCRIPT = """
import json, sys, vllm
from PIL import Image
if __name__ == "__main__":
    task = json.load(open(sys.argv[1]))
    sampling = vllm.SamplingParams(**task["sampling"])
    requests = [
        {"prompt_token_ids": ids, "multi_modal_data": {"image": [Image.open(path) for path in paths]}}
        for ids, paths in task["requests"]
    ]
    done = vllm.LLM(**task["options"]).generate(requests, sampling, use_tqdm=False)
    print("ANSWERS", json.dumps([list(each.outputs[0].token_ids) for each in done]))
"""


def answers_elsewhere(folder, asked: list[tuple], tmp_path, plugin: bool, **options) -> list[list[int]]:
    """Ids of the answers of vLLM in processes of its own, with or without the plugin.

    Raises:
        AssertionError: It fails; with what it printed.
    """
    tokenizer, rows = LlavaMergeProcessor.from_pretrained(folder).tokenizer, []
    for number, (prompt, images, _) in enumerate(asked):
        paths = [str(tmp_path / f"{number}-{index}.png") for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        rows.append((tokenizer(prompt, add_special_tokens=False)["input_ids"], paths))
    defaults = {"model": str(folder), "dtype": "float32", "max_model_len": 256, "block_size": 32, "enforce_eager": True}
    defaults |= {"trust_remote_code": not plugin, **ON_GPU}
    task = {"options": {**defaults, **options}, "requests": rows, "sampling": SAMPLING}
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "serve.py").write_text(SCRIPT)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment |= {} if plugin else {"VLLM_PLUGINS": ""}
    command = [sys.executable, "serve.py", "task.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.partition("ANSWERS")[2].splitlines()[0])


@pytest.mark.skipif((NUM_GPUS or os.cpu_count() or 1) < 2, reason="each rank has a GPU or core of its own")
def test_two_ranks(question_aware, tmp_path, monkeypatch):
    folder, reference = question_aware
    asked = [case for case in cases() if case[2] is None and case[1]]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    answers = answers_elsewhere(folder, asked, tmp_path, True, tensor_parallel_size=2)
    assert answers == [reference.answer(*case) for case in asked]


@pytest.mark.skipif(NUM_GPUS < 2, reason="each replica has a GPU of its own")
def test_two_replicas(question_aware, tmp_path):
    folder, reference = question_aware
    with Clients(folder, tmp_path / "log", "--data-parallel-size", "2") as server, ThreadPoolExecutor(8) as pool:
        asked = [(image, question) for image in pictures() for question in QUESTIONS] * 4
        done = pool.map(lambda case: server.chat(case[1], images=[case[0]], return_token_ids=True), asked)
        for (image, question), each in zip(asked, done, strict=True):
            assert each.choices[0].token_ids == reference.answer(chat(question), [image])


def test_without_the_plugin(base, tmp_path):
    """The checkpoint's own code on vLLM's Transformers backend; tests/test_serving.py has what it refuses."""
    folder = make_checkpoint(base, tmp_path, agnostic(9))
    asked = [case for case in cases() if case[2] is None and case[1]]
    reference = Reference(folder)
    assert answers_elsewhere(folder, asked, tmp_path, False) == [reference.answer(*case) for case in asked]


class TestLoads:
    def parse(self, *arguments: str):
        return benchmark_serving.parse(["--merger", "tome", *arguments])

    def test_they_are_named(self):
        (load,) = self.parse("--load", "repeated,clients=3,tokens=128").load
        assert load == benchmark_serving.Load("repeated", clients=3, tokens=128)

    @pytest.mark.parametrize("load", ["old", "new,clients=many", "new,client=3", "new,clients"])
    def test_others_are_refused(self, load, capsys):
        with pytest.raises(SystemExit):
            self.parse("--load", load)
        assert load.partition(",")[0] in capsys.readouterr().err

    def test_settings_of_servers(self):
        asked = self.parse("--server", "one=", "four=OMP_NUM_THREADS=1 A=b=c --api-server-count 4 --x=2").server
        options = ["--api-server-count", "4", "--x=2"]
        assert asked == [("one", {}, []), ("four", {"OMP_NUM_THREADS": "1", "A": "b=c"}, options)]
        with pytest.raises(SystemExit):
            self.parse("--server", "--api-server-count 4")

    def test_pictures_and_questions(self, tmp_path):
        load = benchmark_serving.Load("repeated", requests=6)
        folders = [benchmark_serving.write_pictures(load, tmp_path / name, []) for name in "ab"]
        one, other = (benchmark_serving.make_requests(load, folder) for folder in folders)
        assert len({question for question, _ in one}) == 6 and len({path.read_bytes() for _, path in one + other}) == 8
        assert Image.open(one[0][1]).size == (632, 474)

    def test_answers_are_compared_with_those_before(self):
        def answers(*texts):
            return [benchmark_serving.Answer(text, 0.1, 0.2, 9, 4) for text in texts]

        cold = benchmark_serving.summarize(answers("a", "b", "c", None), 2.0, [])
        warm = benchmark_serving.summarize(answers("a", "x", None, "d"), 1.0, answers("a", "b", "c", None))
        assert (cold["compared"], cold["different"], cold["lost"], cold["tokens_per_second"]) == (0, 0, 1, 6.0)
        assert (warm["compared"], warm["different"], warm["lost"], warm["requests_per_second"]) == (2, 1, 1, 3.0)


class Clients:
    """What talks to a server, which is started as the guide says."""

    def __init__(self, folder, log, *more: str):
        (command,) = re.findall(r"^vllm serve .*", GUIDE, flags=re.MULTILINE)
        options = command.split()[3:]  # behind the folder
        options += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "256", *more]
        options += [f"--{name.replace('_', '-')}={value}" for name, value in ON_GPU.items()]
        self.server = benchmark_serving.Server(folder, log, *options)

    def __enter__(self):
        url = self.server.__enter__().url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        return self

    def __exit__(self, *error):
        self.server.__exit__(*error)

    def chat(self, *turns, images=(), budget=None, **options):
        """The server's answer to a chat, whose first question has the images, pictures or URLs."""
        roles = ("user", "assistant")
        messages = [
            {"role": roles[index % 2], "content": [{"type": "text", "text": turn}]} for index, turn in enumerate(turns)
        ]
        urls = [image if isinstance(image, str) else benchmark_serving.as_url(image) for image in images]
        messages[0]["content"][:0] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        extra = {"min_tokens": NUM_TOKENS, "return_token_ids": options.pop("return_token_ids", False)}
        if budget is not None:
            extra["mm_processor_kwargs"] = {"num_merged_tokens": budget}
        options = {"temperature": 0, "max_tokens": NUM_TOKENS, **options}
        return self.client.chat.completions.create(model="model", messages=messages, extra_body=extra, **options)


@pytest.fixture(scope="module")
def server(question_aware, tmp_path_factory):
    """A server with the question-aware checkpoint, whose requests may have a budget of their own."""
    with Clients(question_aware[0], tmp_path_factory.mktemp("log") / "log") as clients:
        yield clients


class TestServer:
    def test_a_chat_has_the_ids_that_the_processor_writes(self, server, question_aware):
        """Of the base, which training and evaluation ask: the server's template writes the BOS token."""
        reference, image = question_aware[1], pictures()[0]
        content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
        processor = make_processor(adds_bos=True, processor_class=LlavaMergeProcessor)
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        budget = reference.processor.num_merged_tokens
        (wanted,) = processor(images=image, text=prompt, num_merged_tokens=budget)["input_ids"]
        done = server.chat(QUESTIONS[0], images=[image], return_token_ids=True)
        assert done.prompt_token_ids == wanted and wanted.count(1) == 1

    def check(self, server, reference, done, prompt, images, budget=None):
        """Compares an answer, and the number of tokens that the prompt counted."""
        tokenizer = reference.processor.tokenizer
        text = tokenizer.decode(reference.answer(prompt, images, budget), skip_special_tokens=True)
        assert done.choices[0].message.content.strip() == text.strip()
        words = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert done.usage.prompt_tokens == words + len(images) * ((budget or 9) - 1)

    def test_clients_side_by_side(self, server, question_aware):
        asked = [(image, question, budget) for image in pictures() for question in QUESTIONS for budget in (None, 4)]
        with ThreadPoolExecutor(8) as pool:
            done = list(pool.map(lambda case: server.chat(case[1], images=[case[0]], budget=case[2]), asked * 2))
        for (image, question, budget), each in zip(asked * 2, done, strict=True):
            self.check(server, question_aware[1], each, chat(question), [image], budget)

    def test_a_second_turn_and_several_images(self, server, question_aware):
        images = pictures()[:2]
        done = server.chat(QUESTIONS[0], "red blue", QUESTIONS[1], images=images)
        prompt = chat(QUESTIONS[0], "red blue", QUESTIONS[1], images=2)
        self.check(server, question_aware[1], done, prompt, images)

    def test_no_question_and_no_image(self, server, question_aware):
        image = pictures()[:1]
        self.check(server, question_aware[1], server.chat("", images=image), chat(""), image)
        self.check(server, question_aware[1], server.chat("what is red ?"), chat("what is red ?", images=0), [])

    @pytest.mark.parametrize("budget", [0, 37, "auto", True])
    def test_a_budget_that_is_not_served(self, budget, server):
        with pytest.raises(openai.BadRequestError, match="num_merged_tokens=.* is served with whole numbers"):
            server.chat("what", images=pictures()[:1], budget=budget)

    @pytest.mark.parametrize(
        "request_of",
        [
            lambda: {"turns": ["red " * 300], "images": pictures()[:1]},
            lambda: {"turns": ["what"], "images": pictures(30)},
            lambda: {"turns": ["what"], "images": ["data:image/png;base64,bm8gcGljdHVyZQ=="]},
            lambda: {"turns": ["what"], "images": ["http://127.0.0.1:9/nothing.png"]},
        ],
        ids=["too long", "too many images", "broken image", "missing image"],
    )
    def test_an_error_for_that_request_alone(self, request_of, server, question_aware):
        request = request_of()
        with ThreadPoolExecutor(2) as pool:
            wrong = pool.submit(server.chat, *request["turns"], images=request["images"])
            right = pool.submit(server.chat, QUESTIONS[2], images=pictures()[:1]).result()
        self.check(server, question_aware[1], right, chat(QUESTIONS[2]), pictures()[:1])
        with pytest.raises(openai.APIStatusError) as caught:
            wrong.result()
        assert caught.value.status_code in (400, 422, 500) and server.server.is_up()
        self.test_a_second_turn_and_several_images(server, question_aware)

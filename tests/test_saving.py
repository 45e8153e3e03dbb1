# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A save leaves the old checkpoint or the new one, whatever happens in the middle."""

import ast
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import tqdm.auto
import transformers
from conftest import agnostic, aware, make_processor, pixels, prompts, tiny_model
from hub_server import HubServer
from safetensors.torch import load, load_file

import llava_merge.model.checkpoint_saving
from llava_merge import MERGING_METHODS, LlavaMergeForConditionalGeneration, LlavaMergeProcessor, TokenMerger
from llava_merge.model.checkpoint_saving import PROJECTOR, STAGED, replaced_weights, save_at_once, with_relative_imports
from llava_merge.model.compat import TRANSFORMERS_V5


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed")

OLD, NEW = agnostic(9), agnostic(4)  # of another budget and other weights


def save_merger(config: dict, directory: Path):
    tiny_model(config, train_merger=True).save_merger(directory)


def save_model(config: dict, directory: Path):
    tiny_model(config, train_merger=True).save_pretrained(directory, max_shard_size="200KB")


def content(directory: Path) -> tuple[int, dict]:
    """Budget and weights of the merger in a checkpoint, as a user gets them; raises where it is half of each."""
    if (directory / "config.json").read_text().count('"llava_merger"') and (
        directory / "generation_config.json"
    ).exists():
        model = LlavaMergeForConditionalGeneration.from_pretrained(directory)
        return model.config.merger_config.num_merged_tokens, model.state_dict()
    merger = TokenMerger.from_pretrained(directory)
    return merger.config.num_merged_tokens, merger.state_dict()


def is_one_of(directory: Path, checkpoints: list[Path]) -> bool:
    """Whether it is one of `checkpoints`, or, between the first rename and the last, a folder that does not load."""
    if not (directory / "config.json").exists():
        with pytest.raises((OSError, ValueError), match="config"):
            TokenMerger.from_pretrained(directory)
        with pytest.raises((OSError, ValueError), match="config"):
            LlavaMergeForConditionalGeneration.from_pretrained(directory)
        return True
    budget, weights = content(directory)
    for checkpoint in checkpoints:
        expected_budget, expected = content(checkpoint)
        if budget == expected_budget and all(torch.equal(weights[key], tensor) for key, tensor in expected.items()):
            return True
    return False


def in_a_process(call) -> int:
    """Process id of a child that runs `call` and ends without any cleaning up."""
    pid = os.fork()
    if pid == 0:
        # theirs is one for all processes, and the killed never give it back
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
            bar.set_lock(threading.RLock())
        try:
            call()
        finally:
            os._exit(0)
    return pid


@pytest.fixture(params=[save_merger, save_model], ids=["merger", "model"])
def save(request):
    return request.param


@pytest.fixture
def checkpoints(save, tmp_path):
    save(OLD, tmp_path / "old")
    save(NEW, tmp_path / "new")
    return [tmp_path / "old", tmp_path / "new"]


def test_killed_at_every_move(save, checkpoints, tmp_path):
    """The process dies at the n-th file operation of the save: of the first, and of every seventh."""
    for moves in (*range(14), *range(14, 400, 7)):
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "target")

        def die_at(name, real, left):
            def operation(*args, **kwargs):
                if not left:
                    os._exit(9)
                left.pop()
                return real(*args, **kwargs)

            return operation

        def call(left):
            for name in ("replace", "rename", "unlink", "rmdir"):
                setattr(os, name, die_at(name, getattr(os, name), left))
            save(NEW, tmp_path / "target")

        _, status = os.waitpid(in_a_process(lambda left=[0] * moves: call(left)), 0)
        assert is_one_of(tmp_path / "target", checkpoints), f"after {moves} operations"
        save(NEW, tmp_path / "target")  # leftovers are no obstacle
        assert is_one_of(tmp_path / "target", checkpoints[1:])
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert 3 < moves < 399


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment(save, checkpoints, tmp_path, seed):
    save(OLD, tmp_path / "target")

    def save_forever():
        models = [tiny_model(config, train_merger=True) for config in (NEW, OLD)]
        while True:
            for model in models:
                if save is save_merger:
                    model.save_merger(tmp_path / "target")
                else:
                    model.save_pretrained(tmp_path / "target", max_shard_size="200KB")

    child = in_a_process(save_forever)
    time.sleep(0.3 + random.Random(seed).random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert is_one_of(tmp_path / "target", checkpoints)


def test_killed_while_pushing(tmp_path):
    """The repo on the Hub has the old files or the new ones: the client commits them together."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import agnostic, tiny_model
model = tiny_model(agnostic(int(sys.argv[1])), train_merger=True)
print("ready", flush=True)
model.push_merger_to_hub("org/killed")
"""
    with HubServer() as server:
        environment = {**server.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        subprocess.run([sys.executable, "-c", code, "9"], env=environment, check=True, capture_output=True)
        process = subprocess.Popen([sys.executable, "-c", code, "4"], env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.1 * random.random())
        process.kill()
        process.wait()
        files = server.repos["org/killed"]
        budget = 9 if '"num_merged_tokens": 9' in files["config.json"].decode() else 4
        expected = tiny_model(agnostic(budget), train_merger=True).model.merger.state_dict()
        pushed = load(files["model.safetensors"])
        assert all(torch.equal(pushed[key], tensor) for key, tensor in expected.items())


def test_a_save_into_a_folder_leaves_that_of_another_process(tmp_path):
    save_merger(OLD, tmp_path)
    (tmp_path / f"{STAGED}{'a' * 32}").mkdir()
    save_merger(NEW, tmp_path)
    assert (tmp_path / f"{STAGED}{'a' * 32}").is_dir() and content(tmp_path)[0] == 4


def test_a_save_that_fails_at_any_move_leaves_the_old_checkpoint(save, checkpoints, tmp_path, monkeypatch):
    """Also where a file is open elsewhere, or the disk full, after half of the files are in their places."""
    target, real = tmp_path / "target", os.replace
    shutil.copytree(tmp_path / "old", target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    for number in range(400):
        calls = iter(range(1000))

        def refuse(source, to, number=number, calls=calls):
            if next(calls) == number:
                raise PermissionError("open elsewhere")
            real(source, to)

        with monkeypatch.context() as context:
            context.setattr(os, "replace", refuse)
            try:
                save(NEW, target)
                break
            except PermissionError:
                pass
        assert before == {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}, number
    assert 3 < number < 399 and is_one_of(target, checkpoints[1:])


def test_a_folder_in_the_place_of_a_file(tmp_path):
    save_model(OLD, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").mkdir()
    (tmp_path / "generation_config.json" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="generation_config.json is a folder, and a file is to be saved there"):
        save_model(NEW, tmp_path)
    assert (tmp_path / "generation_config.json" / "mine").read_text() == "mine"
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("folders", ["new", "existing", "one each"])
def test_threads_save_side_by_side(folders, tmp_path):
    model, processor = (
        tiny_model(OLD, train_merger=True),
        make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9),
    )
    for round in range(5):
        barrier, root = threading.Barrier(3), tmp_path / str(round)
        targets = [root / (f"target {thread}" if folders == "one each" else "target") for thread in range(3)]
        if folders == "existing":
            model.save_pretrained(targets[0])

        def work(target, barrier=barrier):
            barrier.wait()
            processor.save_pretrained(target)
            model.save_pretrained(target)

        with ThreadPoolExecutor(3) as pool:
            [*pool.map(work, targets)]  # raises what one of them raised
        for target in targets:
            assert content(target)[0] == 9 and LlavaMergeProcessor.from_pretrained(target).num_merged_tokens == 9
        assert not [*root.glob("**/.*")]


def test_processes_save_side_by_side(tmp_path):
    """Each rank of a launch saves the processor, say: stock transformers lets them."""
    model, processor = (
        tiny_model(OLD, train_merger=True),
        make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9),
    )
    for round in range(5):

        def work(target=tmp_path / str(round)):
            try:
                processor.save_pretrained(target)
                model.save_pretrained(target)
            except BaseException:
                os._exit(1)

        children = [in_a_process(work) for _ in range(3)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        assert content(tmp_path / str(round))[0] == 9
        assert LlavaMergeProcessor.from_pretrained(tmp_path / str(round)).num_merged_tokens == 9


def test_other_files_stay_and_old_shards_go(tmp_path):
    save_model(OLD, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    tiny_model(NEW, train_merger=True).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_weights_of_other_variants_and_names_stay(tmp_path):
    """As in transformers, which keeps them: a Hub repo has float32 and float16 side by side."""
    model = tiny_model(OLD)
    model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model_ema.safetensors")
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "model.safetensors",
        "model.fp16.safetensors",
        "model_ema.safetensors",
    }
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="200KB")
    assert not (tmp_path / "model.fp16.safetensors").exists() and (tmp_path / "model.safetensors").exists()
    loaded = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.newest
@pytest.mark.parametrize(
    "written, present, gone",
    [
        (["model.safetensors"], ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "all"),
        (["model-00001-of-00002.safetensors"], ["model.safetensors", "model-00001-of-00003.safetensors"], "all"),
        (["model.fp16.safetensors"], ["model.fp16-00001-of-00002.safetensors"], "all"),
        (["model.fp16.safetensors"], ["model.safetensors.index.fp16.json"], "all"),
        (["model.safetensors"], ["model.fp16.safetensors", "model.safetensors.index.fp16.json"], "none"),
        (["model.fp16.safetensors"], ["model.safetensors", "model.safetensors.index.json"], "none"),
        (["model.safetensors"], ["model_ema.safetensors", "models/model.safetensors", "model.bin"], "none"),
        (["config.json"], ["model.safetensors"], "none"),
        (["model.safetensors"], ["adapter_model.safetensors", "multi_modal_projector.safetensors"], "none"),
    ],
)
def test_what_a_save_replaces(written, present, gone):
    assert replaced_weights(written, present) == (present if gone == "all" else [])


def test_links_in_the_folder_are_not_followed(tmp_path):
    """A folder from elsewhere, such as a git clone, may hold links to a user's files."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "cloned").mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json", "modeling_llava_merge.py"):
        (tmp_path / "cloned" / name).symlink_to(tmp_path / "mine")
    tiny_model(OLD).save_pretrained(tmp_path / "cloned")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "cloned" / "deeper").symlink_to(tmp_path)

    def save(staged):
        (staged / "deeper").mkdir()
        (staged / "deeper" / "mine").write_text("theirs")

    with pytest.raises(ValueError, match="is a link that leads out of"):
        save_at_once(save, tmp_path / "cloned")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_merger_without_a_projector_replaces_one_with(tmp_path):
    model = tiny_model(OLD)
    model.save_merger(tmp_path / "merger", projector=True)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(tmp_path / "merger" / PROJECTOR, tmp_path / "model")
    model.save_merger(tmp_path / "merger")
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "merger" / PROJECTOR).exists()
    assert (tmp_path / "model" / PROJECTOR).exists(), "no file of a whole model, so somebody put it there"


def test_a_training_free_merger_leaves_the_weights_of_others(tmp_path):
    save_merger(OLD, tmp_path)
    tiny_model({"merger_type": "average_pooling", "num_merged_tokens": 9, "num_heads": 4}).save_merger(tmp_path)
    assert TokenMerger.from_pretrained(tmp_path).config.merger_type == "average_pooling"


def test_a_merger_and_a_whole_model_do_not_replace_each_other(tmp_path):
    model = tiny_model(OLD, train_merger=True)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    model.save_merger(tmp_path / "merger")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="model holds a model, which the merger would replace"):
        model.save_merger(tmp_path / "model")
    with pytest.raises(ValueError, match="merger holds a merger, which the model would replace"):
        model.save_pretrained(tmp_path / "merger")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_through_a_link_to_another_file_system(save, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    target = shared / f"llava_merge-{os.getpid()}"
    try:
        for existing in (False, True):
            (tmp_path / "link").unlink(missing_ok=True)
            (tmp_path / "link").symlink_to(target)
            assert target.exists() == existing
            save(NEW, tmp_path / "link")
            assert (tmp_path / "link").is_symlink() and content(target)[0] == 4
    finally:
        subprocess.run(["rm", "-r", target], check=False)


def test_permissions_are_those_of_any_folder(tmp_path):
    save_merger(OLD, tmp_path / "merger")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "merger").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; a checkpoint is saved as a folder"):
        save_merger(OLD, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_processes_than_the_main_one_write_as_in_transformers(tmp_path):
    tiny_model(OLD).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "config.json").exists()


@pytest.mark.skipif(TRANSFORMERS_V5, reason="gathers the shards of all ranks before the first one writes")
def test_ranks_with_parts_of_a_tensor_save_as_in_transformers(tmp_path, monkeypatch):
    """4.57 puts each tensor together while it writes, for which it waits for all ranks."""
    model, called = tiny_model(OLD), []
    monkeypatch.setattr(type(model), "_tp_size", 2)
    monkeypatch.setattr(llava_merge.model.checkpoint_saving, "is_first_rank", lambda: False)
    monkeypatch.setattr(
        transformers.PreTrainedModel, "save_pretrained", lambda *args, **kwargs: called.append(args[1:])
    )
    model.save_pretrained(tmp_path)
    assert called == [(tmp_path, True)]


def save_on_each_rank(rank: int, folder: str, rounds: int):
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    models = [tiny_model(config, train_merger=True) for config in (NEW, OLD)]
    if rank == 1:
        llava_merge.model.checkpoint_saving.save_at_once = None  # not to be called
    for number in range(rounds):
        for save, name in ((models[number % 2].save_pretrained, "model"), (models[number % 2].save_merger, "merger")):
            torch.distributed.barrier()
            save(f"{folder}/{name}")
            torch.distributed.barrier()
            names = [path.name for path in Path(folder, name).iterdir()]
            assert "model.safetensors" in names and not [name for name in names if name.startswith(".")], names
            assert content(Path(folder, name))[0] == (4, 9)[number % 2]
            torch.distributed.barrier()
            if rank == 0 and number % 3 == 2:  # else into a folder that exists
                shutil.rmtree(f"{folder}/{name}")
    torch.distributed.destroy_process_group()


def test_every_rank_may_save_and_the_first_one_writes(tmp_path):
    """As stock does on 5.x; scripts of the guides run under torchrun as they are."""
    torch.multiprocessing.spawn(save_on_each_rank, args=(str(tmp_path), 6), nprocs=2)


def test_a_save_that_raises_leaves_nothing(tmp_path):
    def fail(staged):
        (staged / "config.json").write_text("{")
        raise OSError("No space left on device")

    (tmp_path / "target").mkdir()
    for target in ("target", "fresh"):
        with pytest.raises(OSError, match="No space left"):
            save_at_once(fail, tmp_path / target)
    assert [path.name for path in tmp_path.rglob("*")] == ["target"]


METHOD = """
from llava_merge import MergeOutput, MergingMethod, register_merging_method


@register_merging_method("first_tokens")
class FirstTokens(MergingMethod):
    training_free = True

    def forward(self, features, context):
        return MergeOutput(merged_features=features[:, : context.num_tokens])
"""


class TestOwnMethod:
    @pytest.fixture(autouse=True)
    def forget(self):
        yield
        MERGING_METHODS.pop("first_tokens", None)

    def test_its_file_is_saved(self, tmp_path, monkeypatch):
        (tmp_path / "my_method.py").write_text(METHOD)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module("my_method")
        model = tiny_model({"merger_type": "first_tokens", "num_merged_tokens": 4, "num_heads": 4})
        model.save_pretrained(tmp_path / "model")
        model.save_merger(tmp_path / "merger")
        batch = {**prompts([1], 4), "pixel_values": pixels(1)}
        again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model")
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        for directory in (tmp_path / "model", tmp_path / "merger"):
            assert (directory / "my_method.py").read_text() == METHOD
        MERGING_METHODS.pop("first_tokens")
        with pytest.raises(ValueError, match="'first_tokens' does not exist.*Import a custom method before"):
            TokenMerger.from_pretrained(tmp_path / "merger")
        sys.modules.pop("my_method")

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            (
                "from llava_merge import MergingMethod as M, MergerConfig\n",
                "from .merging_base import MergingMethod as M\nfrom .configuration_llava_merge import MergerConfig\n",
            ),
            ("from llava_merge.model.merging_grid import slot_places\n", "from .merging_grid import slot_places\n"),
            (
                "try:\n    from llava_merge import (\n        MergeOutput,\n    )\nfinally:\n    a = 1\n",
                "try:\n    from .merging_base import MergeOutput\nfinally:\n    a = 1\n",
            ),
            (
                "import torch\nfrom llava_mergers import a\n",
                "import torch\nfrom llava_mergers import a\n",
            ),
            (
                "import torch; from llava_merge import MergeOutput\n",
                "import torch\nfrom .merging_base import MergeOutput\n",
            ),
            ("import helper\n", None),
            ("from helper import a\n", None),
            ("import llava_merge\n", None),
            ("import llava_merge.model.merging_base as base\n", None),
            ("from llava_merge.demo import MODEL_DIR\n", None),
            ("from llava_merge import __version__\n", None),
            ("from llava_merge import no_such_name\n", None),
        ],
    )
    def test_imports_of_the_copy_for_the_checkpoint_s_code(self, given, wanted, tmp_path):
        siblings = {"merging_base", "merging_grid", "configuration_llava_merge"}
        (tmp_path / "helper.py").write_text("")
        tree = with_relative_imports(ast.parse(given), siblings, tmp_path)
        assert (tree and ast.unparse(tree) + "\n") == wanted

    def test_a_file_that_is_called_as_one_of_the_package_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "merging_tome.py").write_text(METHOD)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module("merging_tome")
        model = tiny_model({"merger_type": "first_tokens", "num_merged_tokens": 4})
        for save, name in ((model.save_pretrained, "model"), (model.save_merger, "merger")):
            with pytest.raises(ValueError, match="merging_tome.py .* is called as one of llava_merge's own.*Rename it"):
                save(tmp_path / name)
            assert not (tmp_path / name).exists()
        sys.modules.pop("merging_tome")

    def test_what_the_code_of_a_checkpoint_cannot_import_is_said(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "my_method.py").write_text("import llava_merge\n" + METHOD)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module("my_method")
        tiny_model({"merger_type": "first_tokens", "num_merged_tokens": 4}).save_pretrained(tmp_path / "model")
        assert "my_method.py imports llava_merge otherwise" in caplog.text
        assert not (tmp_path / "model" / "merging_of_checkpoint.py").exists()
        sys.modules.pop("my_method")

    def test_of_a_script_it_is_refused(self, tmp_path):
        script = (
            METHOD
            + f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import tiny_model
model = tiny_model({{"merger_type": "first_tokens", "num_merged_tokens": 4, "num_heads": 4}})
for save, directory in ((model.save_merger, "merger"), (model.save_pretrained, "model")):
    try:
        save({str(tmp_path)!r} + "/" + directory)
    except ValueError as error:
        assert "defined in the script or notebook that runs" in str(error), error
    else:
        raise SystemExit("it was saved")
"""
        )
        (tmp_path / "script.py").write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


class TestOffloaded:
    @pytest.fixture
    def expected(self):
        return tiny_model(aware(), train_merger=True)

    @pytest.fixture(params=["merger", "all"])
    def offloaded(self, expected, tmp_path, request):
        expected.save_pretrained(tmp_path / "saved")
        device_map = {"": "disk"}
        if request.param == "merger":
            parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
            device_map = {part: "cpu" for part in parts} | {"model.merger": "disk"}
        return LlavaMergeForConditionalGeneration.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )

    def test_a_merger_on_disk_is_saved(self, offloaded, expected, tmp_path):
        offloaded.save_merger(tmp_path / "merger")
        saved = load_file(tmp_path / "merger" / "model.safetensors")
        state = expected.model.merger.state_dict()
        assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)

    def test_a_model_on_disk_answers(self, offloaded, expected):
        batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
        torch.testing.assert_close(offloaded(**batch).logits, expected(**batch).logits, atol=1e-5, rtol=1e-5)

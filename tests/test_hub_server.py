# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The loopback Hub keeps what the real client pushes, gives it back, and fails the way the Hub fails."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import LFS_THRESHOLD, HubServer, run_python


TINY_LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def tiny_llama(seed):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
"""

CUSTOM_MODEL = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_custom"

    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x):
        return self.layer(x)
"""

PROCESSOR = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 1, "a": 2, "dog": 3}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", additional_special_tokens=["<image>"])
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


def test_a_pushed_model_loads_back_equal(server: HubServer, tmp_path: Path) -> None:
    run_python(TINY_LLAMA + "tiny_llama(0).push_to_hub('org/llama')", server.environment(tmp_path / "pusher"))
    assert {"config.json", "model.safetensors"} <= set(server.repos["org/llama"])
    load = "assert same(LlamaForCausalLM.from_pretrained('org/llama'), tiny_llama(0))"
    run_python(TINY_LLAMA + load, server.environment(tmp_path / "loader"))


def test_the_second_push_wins_and_the_first_stays_in_history(server: HubServer, tmp_path: Path) -> None:
    push = "tiny_llama(0).push_to_hub('org/llama')\ntiny_llama(1).push_to_hub('org/llama')"
    run_python(TINY_LLAMA + push, server.environment(tmp_path / "pusher"))
    created, first, second = server.history("org/llama")
    load = f"""
assert same(LlamaForCausalLM.from_pretrained("org/llama"), tiny_llama(1))
assert same(LlamaForCausalLM.from_pretrained("org/llama", revision="{first}"), tiny_llama(0))
"""
    run_python(TINY_LLAMA + load, server.environment(tmp_path / "loader"))


def test_large_and_binary_files_travel_through_lfs(server: HubServer, tmp_path: Path) -> None:
    code = f"""
import io
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
api.create_repo("org/files")
files = {{"large.txt": b"x" * {LFS_THRESHOLD + 1}, "sub/small.bin": bytes(range(256)), "small.txt": b"caf\\xc3\\xa9"}}
for path, content in files.items():
    api.upload_file(repo_id="org/files", path_in_repo=path, path_or_fileobj=content)
api.upload_file(repo_id="org/files", path_in_repo="buffer.bin", path_or_fileobj=io.BytesIO(bytes(9)))
for path, content in files.items():
    assert open(hf_hub_download("org/files", path), "rb").read() == content
assert [info.lfs is not None for info in api.get_paths_info("org/files", list(files))] == [True, True, False]
"""
    run_python(code, server.environment(tmp_path))
    repo = server.repos["org/files"]
    assert repo["large.txt"] == b"x" * (LFS_THRESHOLD + 1)
    large, binary, buffer = repo["large.txt"], repo["sub/small.bin"], repo["buffer.bin"]
    expected = [("PUT", f"/lfs/{hashlib.sha256(data).hexdigest()}") for data in (large, binary, buffer)]
    assert [request for request in server.requests if request[0] == "PUT"] == expected


def test_safetensors_header_is_read_with_range_requests(server: HubServer, tmp_path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [50_000], "data_offsets": [0, 200_000]}}).encode()
    server.put("org/weights", {"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(200_000)})
    code = """
from huggingface_hub import HfApi, get_session, hf_hub_url
url = hf_hub_url("org/weights", "model.safetensors")
assert HfApi().get_safetensors_metadata("org/weights").parameter_count == {"F32": 50_000}
part = get_session().get(url, headers={"Range": "bytes=2-5"})
size = int(get_session().head(url).headers["Content-Length"])
assert (part.status_code, len(part.content), part.headers["Content-Range"]) == (206, 4, f"bytes 2-5/{size}")
assert get_session().get(url, headers={"Range": f"bytes={size}-"}).status_code == 416
"""
    run_python(code, server.environment(tmp_path))


def test_folder_round_trip_skips_unchanged_files_and_deletes(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, content in {"README.md": b"---\ntags: [a]\n---\n", "sub/a.txt": b"a", "sub/b.bin": b"\0b"}.items():
        (folder / name).write_bytes(content)
    code = f"""
import os
from huggingface_hub import CommitOperationDelete, HfApi, snapshot_download
api = HfApi()
api.create_repo("org/folder")
api.upload_folder(repo_id="org/folder", folder_path={str(folder)!r})
api.upload_folder(repo_id="org/folder", folder_path={str(folder)!r})
snapshot = snapshot_download("org/folder")
assert sorted(os.listdir(snapshot)) == ["README.md", "sub"]
assert sorted(os.listdir(snapshot + "/sub")) == ["a.txt", "b.bin"]
delete = CommitOperationDelete("sub/a.txt")
api.create_commit(repo_id="org/folder", operations=[delete], commit_message="delete a file")
assert api.list_repo_files("org/folder") == ["README.md", "sub/b.bin"]
api.delete_folder("sub", "org/folder")
"""
    run_python(code, server.environment(tmp_path / "home"))
    assert server.repos["org/folder"] == {"README.md": b"---\ntags: [a]\n---\n"}
    assert len(server.history("org/folder")) == 4  # created, pushed, a file deleted, a folder deleted
    assert ("POST", "/api/validate-yaml") in server.requests


def test_creating_a_repository_twice_needs_exist_ok(server: HubServer, tmp_path: Path) -> None:
    code = """
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
assert api.create_repo("mine").repo_id == "tester/mine" == api.whoami()["name"] + "/mine"
assert api.create_repo("tester/mine", exist_ok=True).repo_id == "tester/mine"
try:
    api.create_repo("tester/mine")
except HfHubHTTPError as error:
    assert error.response.status_code == 409
else:
    raise AssertionError("created twice")
"""
    run_python(code, server.environment(tmp_path))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("hf_hub_download('org/missing', 'config.json')", "RepositoryNotFoundError"),
        ("snapshot_download('org/missing')", "RepositoryNotFoundError"),
        ("api.model_info('missing')", "RepositoryNotFoundError"),
        ("api.upload_file(repo_id='org/missing', path_in_repo='a', path_or_fileobj=b'a')", "RepositoryNotFoundError"),
        ("hf_hub_download('org/here', 'missing.json')", "EntryNotFoundError"),
        ("list(api.list_repo_tree('org/here', 'missing'))", "EntryNotFoundError"),
        ("api.delete_file('missing.json', 'org/here')", "EntryNotFoundError"),
        ("hf_hub_download('org/here', 'a.txt', revision='missing')", "RevisionNotFoundError"),
    ],
)
def test_what_is_missing_raises_the_error_of_the_hub(server: HubServer, tmp_path: Path, call: str, error: str) -> None:
    server.put("org/here", {"a.txt": b"a"})
    code = f"""
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
api = HfApi()
try:
    {call}
except errors.{error} as caught:
    assert not isinstance(caught, errors.LocalEntryNotFoundError), caught
else:
    raise AssertionError("no error")
"""
    run_python(code, server.environment(tmp_path))


def test_custom_code_travels_with_the_model(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "tiny_model.py").write_text(CUSTOM_MODEL)
    push = """
import torch
from tiny_model import TinyConfig, TinyModel
TinyConfig.register_for_auto_class()
TinyModel.register_for_auto_class("AutoModel")
model = TinyModel(TinyConfig(width=3))
torch.nn.init.constant_(model.layer.weight, 0.5)
torch.nn.init.constant_(model.layer.bias, 2.0)
model.push_to_hub("org/custom")
"""
    run_python(push, server.environment(tmp_path / "pusher") | {"PYTHONPATH": str(tmp_path)})
    repo = server.repos["org/custom"]
    assert repo["tiny_model.py"].decode() == CUSTOM_MODEL
    assert json.loads(repo["config.json"])["auto_map"]["AutoModel"] == "tiny_model.TinyModel"
    load = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("org/custom", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
assert model(torch.ones(3)).tolist() == [3.5, 3.5, 3.5]
"""
    run_python(load, server.environment(tmp_path / "loader"))


def test_a_nested_processor_and_a_tokenizer_with_two_chat_templates_travel(server: HubServer, tmp_path: Path) -> None:
    # Two templates on the tokenizer only: transformers 4.57 asks for "short.jinja.jinja" when a processor has them.
    push = """
options = dict(patch_size=14, vision_feature_select_strategy="default", chat_template="{{ messages[0]['content'] }}")
LlavaProcessor(CLIPImageProcessor(), tokenizer, **options).push_to_hub("org/processor")
tokenizer.chat_template = {"default": "long", "short": "short"}
tokenizer.push_to_hub("org/tokenizer")
"""
    run_python(PROCESSOR + push, server.environment(tmp_path / "pusher"))
    assert {"processor_config.json", "tokenizer.json"} <= set(server.repos["org/processor"])
    assert server.repos["org/tokenizer"]["additional_chat_templates/short.jinja"] == b"short"
    load = """
from transformers import AutoProcessor, AutoTokenizer
processor, alone = AutoProcessor.from_pretrained("org/processor"), AutoTokenizer.from_pretrained("org/tokenizer")
assert type(processor).__name__ == "LlavaProcessor" and processor.patch_size == 14
assert processor.tokenizer("a dog <image>").input_ids == alone("a dog <image>").input_ids == [2, 3, 1]
assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"
assert alone.chat_template == {"default": "long", "short": "short"}
"""
    run_python(load, server.environment(tmp_path / "loader"))


def test_a_failing_script_shows_what_it_printed(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit status 1(.|\n)*ValueError: told"):
        run_python("raise ValueError('told')", server.environment(tmp_path))
    assert run_python("raise SystemExit(3)", server.environment(tmp_path), check=False).returncode == 3


def test_the_environment_forgets_the_callers_hub_settings(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "https_proxy"):
        monkeypatch.setenv(name, "1")
    environment = server.environment(tmp_path)
    assert not {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "https_proxy"} & set(environment)
    assert environment["HF_ENDPOINT"] == server.endpoint

# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What the package promises as a package: light import, files at their places, README's commands."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llava_merge


pytestmark = pytest.mark.newest
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ROOT / "examples" / "guides"
# What the parts of transformers and huggingface_hub that the core is built on import by themselves.
BASELINE = """
import transformers, torch, safetensors, huggingface_hub
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoModelForImageTextToText
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from huggingface_hub import HfApi, ModelCard, ModelCardData
"""
MODULES = "import sys; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"


def modules_after(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code + MODULES], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_adds_nothing_but_the_package_to_its_dependencies():
    ours = modules_after("import llava_merge\n")
    added = ours - modules_after(BASELINE) - sys.stdlib_module_names
    assert added <= {"llava_merge"}
    assert not ours & {"peft", "gradio", "matplotlib", "vllm", "typer", "datasets", "tensorboard"}


def test_import_does_not_build_or_patch_anything():
    code = """
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor, PreTrainedModel
classes = (LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor, PreTrainedModel)
before = [dict(vars(each)) for each in classes]
import llava_merge
assert before == [dict(vars(each)) for each in classes]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_top_level_is_as_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top == {"llava_merge", "examples", "tests", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}


def test_metadata_is_in_one_place():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"demo", "docs", "app", "evaluate", "train", "serve", "test", "dev"} == set(project["optional-dependencies"])
    assert {re.split("[<>=]", name)[0] for name in project["dependencies"]} == {
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
    }
    assert project["scripts"] == {"llava-merge": "llava_merge.cli:app"}
    assert "[metadata]" not in (ROOT / "setup.cfg").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", llava_merge.__version__) and "py.typed" in os.listdir(ROOT / "llava_merge")


def test_exports_are_there():
    assert all(hasattr(llava_merge, name) for name in llava_merge.__all__)


def modules_imported_by(path: Path) -> set[str]:
    """Modules of this package that a module imports when it is imported itself."""
    module = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.col_offset:
            parts = [*module[: -node.level], node.module] if node.level else [node.module]
            name = ".".join(filter(None, parts))
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "llava_merge").rglob("*.py")
}
IMPORTS = {name: (modules_imported_by(path) & FILES.keys()) - {name} for name, path in FILES.items()}


class TestLayout:
    def test_the_root_has_few_entries(self):
        entries = [path.name for path in (ROOT / "llava_merge").iterdir() if path.name != "__pycache__"]
        assert len(entries) <= 12, entries

    def test_what_travels_imports_nothing_that_stays(self):
        core = {name for name in FILES if name.startswith("llava_merge.model.")}
        assert len(core) > 40 and set().union(*(IMPORTS[name] for name in core)) <= core
        folder = ROOT / "llava_merge" / "model"
        assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"], "none travels"

    def test_no_import_goes_in_a_circle(self):
        TopologicalSorter(IMPORTS).prepare()


def test_readme_has_two_commands_and_a_changelog():
    section = README.split("## Two commands")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert len(lines) == 2 and "llava-merge demo" in lines[0] and "pytest" in lines[1]
    assert f"## {llava_merge.__version__}" in (GUIDES / "changelog.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 20_000
    assert all(f"(examples/guides/{path.name})" in README for path in GUIDES.glob("*.md"))


DOCUMENTS = [
    path
    for pattern in ("*.md", ".github/*.md", "examples/**/*.md", "llava_merge/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def without_code(path: Path) -> str:
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document)):
        if link.startswith(("http", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        there = (document.parent / target).resolve() if target else document
        assert there.exists(), link
        assert not anchor or anchor in anchors_of(there), link


def test_the_guide_quotes_errors_as_they_are():
    section = (GUIDES / "troubleshooting.md").read_text(encoding="utf-8").split("\n## ")[0]
    quoted = re.findall(r'^\| "(.*?)" \|', section, flags=re.MULTILINE)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "llava_merge").rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    assert len(quoted) > 8
    for text in quoted:
        parts = [part for part in re.split(r"…|\d+(?:, \d+)*|none|:", text) if len(part.strip(" ('=")) > 5]
        assert parts and all(part.strip() in plain for part in parts), text

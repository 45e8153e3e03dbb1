# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The browser app: one picture and question, answered with all visual tokens and with merged ones."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from PIL import Image, UnidentifiedImageError

from llava_merge import list_mergers
from llava_merge.demo import KNOWS, MERGERS, MODEL_DIR, NUM_MERGED_TOKENS, PICTURE, QUESTIONS
from llava_merge.demo.compare import Answer, Comparison
from llava_merge.demo.scenes import draw_scene, scene_of
from llava_merge.evaluation.candidates import OWN, UNMERGED, shown_name
from llava_merge.training.pictures import open_image
from llava_merge.visualization import draw_merging, draw_token_maps, thumbnail


MAX_QUESTION_LENGTH = 1000  # characters
MAX_MEGAPIXELS = 50
ONLY_UPLOADS = "Only pictures that were uploaded here can be asked about."
OF_VISITORS = {"duration": None, "print_exception": False}  # errors that are theirs, and no news for the log
PICTURE_SIZE = 448  # of what is drawn, in pixels
TITLE = "# llava_merge\nAsk about a picture, and see what is left of it when its visual tokens are merged."
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is fetched
LAUNCH = {"theme": THEME, "max_file_size": "20mb", "show_error": True, "ssr_mode": False, "footer_links": []}


class Asking:
    """What the app does, without the page: pictures and words in, answers and pictures out.

    One question at a time, as each puts its merger into the model.
    """

    def __init__(self, comparison: Comparison):
        self.comparison = comparison

    def both(self, path: str | None, question: str, merger: str, num_merged_tokens: int):
        """The answer with all tokens, and what [`merged`] gives."""
        unmerged = self.comparison.with_all_tokens(*read(path, question), repeats=1)
        return in_words(unmerged), *self.merged(path, question, merger, num_merged_tokens)

    def merged(self, path: str | None, question: str, merger: str, num_merged_tokens: int):
        """The answer with merged tokens, what they keep of the picture, and the patches of each."""
        picture, question = read(path, question)
        self.comparison.use(merger)
        self.comparison.num_merged_tokens = int(num_merged_tokens)
        answer = self.comparison.with_merged_tokens(picture, question, repeats=1)
        source = self.comparison.source(picture, question)
        small, processor = thumbnail(picture, PICTURE_SIZE), self.comparison.processor
        return in_words(answer), draw_merging(small, source, processor), draw_token_maps(small, source, processor)


def read(path: str | None, question: str) -> tuple[Image.Image, str]:
    """The picture and the question, as given by a visitor.

    Raises:
        ValueError: There is none, or it is too large, or cannot be opened.
    """
    if path is None:
        raise ValueError("There is no picture: upload one, or draw a scene.")
    question = question.strip()
    if not question:
        raise ValueError("There is no question: type one.")
    if len(question) > MAX_QUESTION_LENGTH:
        raise ValueError(f"The question has {len(question)} characters, more than {MAX_QUESTION_LENGTH}: shorten it.")
    check_megapixels(path)
    return open_image(path), question


def check_megapixels(path: str):
    """Refuses a picture that is too large, before it is decoded.

    Raises:
        ValueError: So it is.
    """
    try:
        with Image.open(path) as picture:
            size = picture.width * picture.height
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
        return  # which opening it says better
    if size > MAX_MEGAPIXELS * 1e6:
        raise ValueError(f"The picture has more than {MAX_MEGAPIXELS} megapixels: scale it down.")


def in_words(answer: Answer) -> str:
    """An answer and its numbers as Markdown."""
    return f"### {answer.text or '(no answer)'}\n{answer.num_image_tokens} visual tokens, {answer.milliseconds:.0f} ms"


def for_visitors(function):
    """The function, with errors about what was given shown in the page, by their first line, without paths."""

    def shown(*arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            message = str(error).splitlines()[0].replace(arguments[0] or "\0", "The file")
            raise gr.Error(message, **OF_VISITORS) from error

    return shown


def merger_choices(bundled: bool, given: list[str]) -> list[tuple[str, str]]:
    """What is shown and what it names: mergers that were given, bundled ones, the model's own, all methods."""
    names = [*given, *(MERGERS if bundled else [OWN])]
    names += [method.name for method in list_mergers() if method.name not in (UNMERGED, *given)]
    return [(shown_name(name), name) for name in names]


def draw_other_scene() -> Image.Image:
    """A drawn scene that the bundled model was not trained on."""
    return draw_scene(scene_of("test", random.randrange(10000), hard=random.random() < 0.5)[0])


def picture_upload() -> gr.Image:
    """A picture that nothing opens before [`read`] does, whose errors say what is wrong with it."""
    picture = gr.Image(str(PICTURE), label="Picture", sources=["upload", "clipboard"], height=320, buttons=[])
    # of the object, since a subclass makes Gradio write a .pyi file
    picture.preprocess = lambda payload: payload and stored_by_gradio(payload.path)
    return picture


def stored_by_gradio(path: str | None) -> str | None:
    """The path of an upload, which a request may name as it likes.

    Raises:
        gr.Error: It is a file that nobody uploaded, or a URL.
    """
    if path is not None and not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error(ONLY_UPLOADS, **OF_VISITORS)
    return path


def fetch_nothing(page: gr.Blocks):
    """Keeps Gradio from downloading what a request names, for any of its inputs, before a function is called.

    Gradio guards against addresses inside, and only where no proxy is set.
    """
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = functools.partial(
            only_files, block.async_move_resource_to_block_cache
        )


async def only_files(move: Callable, url_or_file_path: str | Path | None) -> str | None:
    """What `move` returns for a file.

    Raises:
        gr.Error: It is a URL.
    """
    if is_http_url_like(str(url_or_file_path)):
        raise gr.Error(ONLY_UPLOADS, **OF_VISITORS)
    return await move(url_or_file_path)


def answer_column(title: str, name: str) -> gr.Markdown:
    """A place for an answer, with a title above."""
    with gr.Column(min_width=140):
        gr.Markdown(title)
        return gr.Markdown(elem_id=name)


def make_app(
    model: str | None = None,
    mergers: list[str] | None = None,
    num_merged_tokens: int | None = None,
    attention_mass: float | None = None,
) -> gr.Blocks:
    """The page, to be launched with `launch(**LAUNCH)`.

    Args:
        model: Directory or Hub repo of a LLaVA; default the bundled one.
        mergers: To choose among, first; see [`Comparison.use`]. Bundled ones, the model's own and all methods follow.
        num_merged_tokens: Tokens per image at the start; default 16 of the bundled model, else the merger's.
        attention_mass: What merged tokens weigh, instead of what a merger says; see [`MergerConfig`].

    Raises:
        ValueError: The model, or the first merger, cannot be used.
    """
    bundled = model is None
    choices = merger_choices(bundled, mergers or [])
    if bundled and num_merged_tokens is None:
        num_merged_tokens = NUM_MERGED_TOKENS
    comparison = Comparison(model or str(MODEL_DIR), num_merged_tokens, choices[0][1], attention_mass)
    asking = Asking(comparison)
    with gr.Blocks(title="llava_merge", analytics_enabled=False) as page:
        gr.Markdown(f"{TITLE} {KNOWS if bundled else f'The model is `{model}`.'}")
        with gr.Row():
            with gr.Column():
                picture = picture_upload()
                scene = gr.Button("Draw another scene", size="sm", visible=bundled)
                question = gr.Textbox(QUESTIONS[0], label="Question", max_length=MAX_QUESTION_LENGTH)
                with gr.Row(visible=bundled):
                    examples = [gr.Button(each, size="sm", min_width=180) for each in QUESTIONS]
                merger = gr.Dropdown(choices, value=choices[0][1], label="Merger")
                budget = gr.Slider(
                    1,
                    comparison.model.config.num_patches,
                    value=comparison.num_merged_tokens,
                    step=1,
                    label="Visual tokens after merging",
                )
                ask = gr.Button("Ask", variant="primary")
            with gr.Column():
                with gr.Row():
                    unmerged_answer = answer_column("With all tokens", "unmerged_answer")
                    merged_answer = answer_column("With merged tokens", "merged_answer")
                gr.Markdown("What the merged tokens keep of the picture")
                overlay = gr.Image(show_label=False, buttons=["fullscreen"], elem_id="overlay")
                with gr.Accordion("Each token's patches", open=False):
                    maps = gr.Image(show_label=False, buttons=["fullscreen"], elem_id="token_maps")
        outputs = [unmerged_answer, merged_answer, overlay, maps]
        call = {"inputs": [picture, question, merger, budget], "concurrency_limit": 1, "concurrency_id": "model"}
        both, merged = for_visitors(asking.both), for_visitors(asking.merged)
        gr.on([ask.click, question.submit, *([page.load] if bundled else [])], both, outputs=outputs, **call)
        for example in examples:
            example.click(lambda text: text, example, question).then(both, outputs=outputs, **call)
        gr.on([merger.change, budget.change], merged, outputs=outputs[1:], trigger_mode="always_last", **call)
        scene.click(draw_other_scene, outputs=picture)
        picture.change(lambda: [None] * len(outputs), outputs=outputs)  # they are of the picture before
    fetch_nothing(page)
    return page.queue(max_size=32)

# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Entry point of vLLM, which runs in each of its processes, whatever model that serves."""


def register():
    """Makes the model known to vLLM. Its module is imported only where it is served."""
    from vllm import ModelRegistry

    import llava_merge  # noqa: F401 - registers the configuration and the processor with transformers

    ModelRegistry.register_model(
        "LlavaMergeForConditionalGeneration", "llava_merge.serving.vllm:LlavaMergeForConditionalGeneration"
    )

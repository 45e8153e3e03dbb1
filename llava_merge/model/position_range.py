# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Warns of prompts whose merged tokens keep positions that the language model was not made for.

The warnings of transformers and of engines count tokens, of which such a prompt has few.
"""

from transformers.utils import logging


logger = logging.get_logger(f"transformers.{__name__}")


def warn_of_positions(num_positions: int, num_tokens: int, limit: int, name: str = "max_position_embeddings"):
    """Warns, once for each sum of images, where a prompt with its answer takes more than `limit` positions.

    Args:
        num_positions: What it takes, of `num_tokens`.
        name: Of the limit.
    """
    skipped = num_positions - num_tokens
    if num_positions > limit and skipped > 0:
        logger.warning_once(
            f"A prompt with its answer can pass {name}={limit}, though it has fewer tokens: merged tokens keep the "
            f"positions of their patches, and those of its images skip {skipped} positions, which leaves room for "
            f"{max(0, limit - skipped)} tokens. Beyond, answers may be much worse. Give fewer images or less text, or "
            f"use merger_config={{'position_ids': 'packed'}}."
        )

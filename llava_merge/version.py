# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The version of the package."""

__version__ = "0.2.0"

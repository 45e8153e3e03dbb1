# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The model, its mergers and its processor: all that may travel to the Hub, flat, since folders do not."""

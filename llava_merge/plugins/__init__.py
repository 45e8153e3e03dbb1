# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What other packages find by entry point: the model of lmms-eval."""

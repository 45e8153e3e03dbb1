# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The app as a Space; MODEL, a variable of the Space, names a LLaVA on the Hub, default the bundled demo model."""

import os

from llava_merge.demo.browser import LAUNCH, make_app


make_app(os.environ.get("MODEL")).launch(**LAUNCH)

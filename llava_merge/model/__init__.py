# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Everything that may travel to the Hub, flat; a pushed model takes its own merging method along, and no other."""

import importlib
import pkgutil


for module in pkgutil.iter_modules(__path__):
    if module.name.startswith("merging_"):  # registers its method
        importlib.import_module(f"{__name__}.{module.name}")

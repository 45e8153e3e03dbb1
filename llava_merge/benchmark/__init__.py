# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What merging saves on the hardware at hand: phases, memory and throughput, beside the stock model in one run."""

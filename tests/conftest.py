"""Settings of Triton, made before kernels are defined, in the environment: processes that tests start have them too."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if sys.prefix != sys.base_prefix:
    # In the virtual environment, which stays: what is compiled once need not be compiled by the next run.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(sys.prefix) / "triton_cache"))

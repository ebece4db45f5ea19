"""Parts of the project against plain library code; each file of this folder is one benchmark."""

import os

# DeepSpeed reads it when it is imported; the benchmarks compare what runs on processors.
os.environ["DS_ACCELERATOR"] = "cpu"

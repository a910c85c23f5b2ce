"""Speed, memory and arithmetic of training, sampling, encoding and reading, beside other libraries.

`scripts/bench.py` is the command. The other libraries (diffusers, MONAI) are optional packages,
imported when a benchmark runs.
"""

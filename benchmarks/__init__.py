"""Speed, memory and arithmetic of training, sampling, encoding and loading, beside other libraries.

Each module is a command that prints one line of JSON; docs/benchmarks.md has results. Nothing has
to be there: networks have random weights and tiles are procedural.
"""

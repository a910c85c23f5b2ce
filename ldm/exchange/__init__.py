"""Checkpoints of other libraries: import into this toolkit, and export to diffusers."""

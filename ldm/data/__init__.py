"""Tiles, data modules and the procedural tiles."""

import os

# albumentations asks its registry for a newer version when it is imported; nothing here may use
# the network at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

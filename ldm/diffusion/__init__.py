"""Diffusion: processes, predictions, samplers, guidance."""

from typing import Any

from ldm.diffusion.flow import RectifiedFlow
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import NoiseSchedule


def make_process(settings: dict[str, Any]) -> Process:
    """The process whose `settings` these are."""
    if settings.get("name") == "flow":
        return RectifiedFlow(**{k: v for k, v in settings.items() if k != "name"})
    return NoiseSchedule(**settings)

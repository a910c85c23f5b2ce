"""Synthesis: class folders of sampled tiles with a manifest, from checkpoints.

models = load_models(DIFFUSION, CLASSIFIER)
sampling = Sampling("ddim", steps=50, eta=1.0, scale=10.0, seed=0)
folder = SampleFolder(OUT, make_settings(sampling, models), models.facts)
report = synthesise(Synthesiser(models, sampling), folder, {"ADI": 500}, batch_size=32)
"""

from ldm.synthesis.folder import SampleFolder
from ldm.synthesis.models import Models, load_models, make_settings
from ldm.synthesis.production import SampleReport, synthesise
from ldm.synthesis.settings import UNCONDITIONAL, Sampling
from ldm.synthesis.synthesiser import Synthesiser

__all__ = [
    "UNCONDITIONAL",
    "Models",
    "SampleFolder",
    "SampleReport",
    "Sampling",
    "Synthesiser",
    "load_models",
    "make_settings",
    "synthesise",
]

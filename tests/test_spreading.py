"""Labels that are spread over unlabelled tiles, on two half-moons that no line tells apart."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from ldm.errors import UserError
from ldm.features import spreading
from ldm.features.probe import Probe
from ldm.features.spreading import Spreading

CLASSES = ["lower", "upper"]


@pytest.fixture(scope="module")
def moons():
    """Features (N, 2) and labels (N,); the first six are labelled, three of each class."""
    values, labels = make_moons(2500, noise=0.05, random_state=0)
    first = np.concatenate([np.flatnonzero(labels == k)[:3] for k in (0, 1)])
    order = np.concatenate([first, np.setdiff1d(np.arange(2500), first)])
    return torch.from_numpy(values[order]), labels[order]


def spread(moons, labelled=6, count=2000):
    values, labels = moons
    return Spreading(values[:labelled], labels[:labelled], CLASSES, values[labelled:count])


def accuracy(model, moons):
    """On tiles that lie in no graph."""
    logits = model.logits(moons[0][2000:])  # (500, 2)
    return float((logits.argmax(dim=1).numpy() == moons[1][2000:]).mean())


def test_the_shape_of_the_unlabelled_set_helps(moons):
    values, labels = moons
    model = spread(moons)
    probe = Probe.fit(values[:6].numpy(), labels[:6], CLASSES)
    assert accuracy(model, moons) > 0.97 > 0.9 > accuracy(probe, moons)


def test_a_left_out_tile_does_not_see_its_own_label(moons):
    values, labels = moons
    wrong = labels.copy()
    wrong[0] = 1 - wrong[0]
    left_out = Spreading(values[:6], wrong[:6], CLASSES, values[6:2000]).left_out
    assert left_out.shape == (6, 2)
    assert left_out[0].argmax() == labels[0]  # as its neighbours say
    true = torch.from_numpy(labels[:6])
    assert spread(moons).scores(true)["accuracy"] == 1.0


def test_many_tiles_are_drawn_from(moons, monkeypatch):
    monkeypatch.setattr(spreading, "MOST_TILES", 300)
    models = [spread(moons), spread(moons)]
    assert len(models[0]._shares) == 306
    assert torch.equal(*(model.logits(moons[0][2000:]) for model in models))
    assert accuracy(models[0], moons) > 0.9


def test_fewer_tiles_than_neighbours(moons):
    assert spread(moons, count=20).logits(moons[0][2000:]).isfinite().all()


def test_a_single_labelled_tile_of_a_class_is_refused(moons):
    values, labels = moons
    with pytest.raises(UserError, match="at least 2"):
        Spreading(values[:4], labels[:4], CLASSES, values[6:100])

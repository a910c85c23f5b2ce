"""The data module: hold-out, loaders, and batches that do not depend on how they are loaded."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.config import instantiate_from_config
from ldm.data.datamodule import DataModuleFromConfig, ResumableSampler, split_by_group
from ldm.errors import UserError
from ldm.files import write_png

TARGET = "ldm.data.tiles.TileFolder"


@pytest.fixture
def root(tmp_path):
    """Two classes of 12 tiles from six slides, slide s0 .. s5 in the name, two of each slide."""
    rng = np.random.default_rng(0)
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        for i in range(12):
            image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            write_png(tmp_path / name / f"s{i // 2}_{i}.png", image)
    return tmp_path


DATA = "ldm.data.datamodule.DataModuleFromConfig"


def node(root, **params) -> dict:
    return {"target": TARGET, "params": {"root": str(root), "size": 8, **params}}


def module(root, batch_size=4, num_workers=0, train=None, **options) -> DataModuleFromConfig:
    return DataModuleFromConfig(
        batch_size, train=node(root, **(train or {})), num_workers=num_workers, **options
    )


def names(dataset) -> set[str]:
    return set(dataset.relative_paths)


def test_hold_out_is_disjoint_complete_deterministic_and_seeded(root):
    def held(seed: int) -> set[str]:
        data = module(root, val_fraction=0.25, seed=seed)
        assert not names(data.train_dataset) & names(data.val_dataset)
        assert len(data.train_dataset) + len(data.val_dataset) == 24
        assert len(data.val_dataset) == 6
        return names(data.val_dataset)

    assert held(0) == held(0)
    assert len({frozenset(held(seed)) for seed in range(5)}) > 1


def test_hold_out_has_every_class_and_no_augmentation(root):
    train = {"labelled": True, "augment": ["d4"], "crop": "random"}
    data = module(root, val_fraction=0.05, train=train)
    assert data.val_dataset.labels == [0, 1] and data.classes == ["A", "B"]
    assert data.train_dataset.is_random and not data.val_dataset.is_random


@pytest.mark.parametrize("labelled", [False, True])
def test_hold_out_by_slide(root, labelled):
    data = module(
        root, val_fraction=0.3, group_regex=r"(s\d+)_", train={"labelled": labelled}, seed=3
    )
    slides = [
        {name.split("/")[1].split("_")[0] for name in names(part)}
        for part in (data.train_dataset, data.val_dataset)
    ]
    assert not slides[0] & slides[1] and len(slides[0] | slides[1]) == 6
    assert len(slides[1]) == 2


def test_adding_tiles_keeps_the_sides_of_the_others():
    many = [f"{i}.png" for i in range(1000)]
    _, held = split_by_group(many, [0] * 1000, 0.1, seed=0)
    _, held_of_half = split_by_group(many[:500], [0] * 500, 0.1, seed=0)
    assert len(held) == 100 and len(held_of_half) == 50
    # The order is by hash; only the number of tiles that are taken differs a little.
    assert len(set(held_of_half) - set(held)) <= 15


def test_a_class_is_never_emptied():
    # One slide holds all of class 1 and all but two tiles of class 0.
    members = ["big"] * 8 + ["s1", "s2"] + ["big"] * 5
    labels = [0] * 10 + [1] * 5
    for seed in range(10):
        kept, held = split_by_group(members, labels, 0.1, seed)
        assert {labels[i] for i in kept} == {0, 1} and len(held) == 1


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(", "is no regular expression"),
        ("slide", "needs parentheses"),
        (r"slyde(\d+)", "does not match"),
        (r"\.(png)", "too few"),
    ],
)
def test_bad_groups(root, pattern, text):
    with pytest.raises(UserError, match=text) as error:
        _ = module(root, group_regex=pattern).train_dataset
    assert "\n" not in str(error.value)


def test_one_tile_cannot_be_held_out():
    with pytest.raises(UserError, match="too few"):
        split_by_group(["a.png"], [-1], 0.05, 0)


def test_no_validation(root):
    data = module(root, val_fraction=0)
    assert data.val_dataset is None and data.val_dataloader() == []
    assert len(data.train_dataset) == 24


def test_given_validation_must_have_the_same_classes(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "A").mkdir()
    write_png(other / "A" / "0.png", np.zeros((8, 8, 3), np.uint8))
    validation = node(other, labelled=True)
    with pytest.raises(UserError, match=r"\['A', 'B'\] and validation \['A'\] differ"):
        module(root, train={"labelled": True}, validation=validation).setup()
    data = module(root, validation=validation)
    assert len(data.train_dataset) == 24 and len(data.val_dataset) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 2.5}, "batch_size: 2.5"),
        ({"num_workers": -1}, "num_workers: -1"),
        ({"prefetch": 0}, "prefetch: 0"),
        ({"val_fraction": 0.6}, "val_fraction: 0.6"),
        ({"val_fraction": float("nan")}, "val_fraction: nan"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_bad_settings(root, options, text):
    params = {"batch_size": 4, "train": node(root), **options}
    with pytest.raises(UserError, match=text):
        instantiate_from_config({"target": DATA, "params": params})


@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5] * 4), (24, [24]), (100, [24])])
def test_an_incomplete_batch_is_dropped_unless_it_is_the_only_one(root, batch_size, sizes):
    loader = module(root, batch_size, val_fraction=0).train_dataloader()
    assert [len(batch["path"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


def epochs(data: DataModuleFromConfig, count: int = 2) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches.append(torch.cat([batch["image"] for batch in loader]))
    return batches


def test_batches_do_not_depend_on_workers_or_global_seeds(root):
    train = {"augment": ["d4", "stain"], "crop": "random"}
    torch.manual_seed(0)
    first = epochs(module(root, num_workers=0, train=train))
    torch.manual_seed(1)
    assert all(map(torch.equal, first, epochs(module(root, num_workers=2, train=train))))
    assert not torch.equal(first[0], epochs(module(root, train=train, seed=1))[0])
    assert not torch.equal(first[0], first[1])


def test_loading_leaves_the_global_random_numbers_alone(root):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data = module(root, train={"augment": ["d4"]})
    list(data.train_dataloader()), list(data.val_dataloader())
    assert torch.equal(torch.rand(3), expected)


def test_workers_persist(root):
    assert module(root, num_workers=1).train_dataloader().persistent_workers
    assert not module(root, num_workers=0).train_dataloader().persistent_workers


def test_prefetching(root):
    assert module(root, num_workers=1, prefetch=5).train_dataloader().prefetch_factor == 5
    assert module(root, num_workers=0, prefetch=5).train_dataloader().prefetch_factor is None


def test_ranks_share_a_pass(root):
    data = module(root, val_fraction=0).train_dataset
    ranks = [list(ResumableSampler(data, 4, 5, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert sorted(index for rank in ranks for index, _ in rank) == list(range(24))
    # The augmentation of a tile does not depend on the rank that sees it.
    alone = dict(ResumableSampler(data, 4, 5))
    assert all(alone[index] == seed for rank in ranks for index, seed in rank)
    with pytest.raises(UserError, match="too few for 25 devices"):
        ResumableSampler(data, 4, num_replicas=25)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_a_pass_is_a_window_onto_one_endless_order(batch_size):
    data = torch.utils.data.TensorDataset(torch.zeros(10))  # no TileFolder: plain indices
    whole: list[int] = []
    sampler = ResumableSampler(data, batch_size, seed=1)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        assert len(set(sampler)) == len(sampler)
        whole += sampler
    size = min(batch_size, 10)
    assert len(sampler) == 10 - 10 % size
    for position in range(2 * len(sampler) // size):
        start = position * size
        window = ResumableSampler(data, batch_size, seed=1, position=lambda p=position: p)
        assert list(window) == whole[start : start + len(window)]


class Recorder(pl.LightningModule):
    """Trains one number and writes down which tiles it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, ...]] = []

    def validation_step(self, batch, batch_index):
        pass

    def training_step(self, batch, batch_index):
        self.seen.append((*batch["path"], *map(float, batch["image"].mean((1, 2, 3)))))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize(
    ("stop", "when"),
    [(3, "after fit"), (3, "after a batch"), (10, "after fit"), (10, "after a batch")]
    + [(5, "after an epoch"), (10, "after an epoch")],
)
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(root, tmp_path_factory, stop, when):
    """Five batches per pass: stops in the middle and at the end of a pass, saved in three ways."""
    folder = tmp_path_factory.mktemp("run")

    def fit(steps: int, checkpoint=None, callbacks=()) -> tuple[pl.Trainer, Recorder]:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = module(root, train={"augment": ["stain"]}, val_fraction=0.1)
        model = Recorder()
        trainer.fit(model, data, ckpt_path=checkpoint)
        return trainer, model

    every = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    if when == "after a batch":
        every = {"every_n_train_steps": 1}
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
    _, whole = fit(14, callbacks=[saver])
    checkpoint = folder / f"step={stop}.ckpt"
    if when == "after fit":
        trainer, _ = fit(stop)
        trainer.save_checkpoint(checkpoint)
    _, resumed = fit(14, checkpoint)
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.weight, whole.weight)

"""Tiles: finding, decoding, augmenting and writing them, and what bad folders say."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.config import instantiate_from_config
from ldm.data import tiles
from ldm.data.images import check_tiles, class_folders, list_images, read_tile
from ldm.data.tiles import TileFolder, to_tensor, to_uint8
from ldm.errors import UserError
from ldm.files import write_png


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def labelled(tmp_path):
    """Two classes of three and two tiles."""
    for seed, name in enumerate(("A/0.png", "A/1.png", "A/sub/2.png", "B/0.png", "B/1.png")):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture(seed))
    return tmp_path / "set"


def message(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_listing_is_sorted_recursive_and_ignores_hidden_entries(labelled):
    (labelled / ".cache").mkdir()
    write_png(labelled / ".cache" / "x.png", picture(0))
    write_png(labelled / "A" / "z.png", picture(0))
    (labelled / "A" / "z.png").rename(labelled / "A" / ".z.png")
    (labelled / "A" / "notes.txt").write_text("no image")
    write_png(labelled / "B" / "2.png", picture(9))
    (labelled / "B" / "2.png").rename(labelled / "B" / "2.PNG")
    names = [p.relative_to(labelled).as_posix() for p in list_images(labelled)]
    assert names == ["A/0.png", "A/1.png", "A/sub/2.png", "B/0.png", "B/1.png", "B/2.PNG"]
    assert class_folders(labelled) == ["A", "B"]


@pytest.mark.parametrize("extension", [".png", ".tif", ".webp"])
def test_lossless_formats_read_back_exactly(tmp_path, extension):
    image = picture(3, 9, 14)
    options = {"lossless": True, "exact": True} if extension == ".webp" else {}
    Image.fromarray(image).save(tmp_path / f"x{extension}", **options)
    assert np.array_equal(read_tile(tmp_path / f"x{extension}"), image)


def test_modes_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    assert (read_tile(tmp_path / "grey.png") == 7).all()
    clear = np.zeros((4, 4, 4), np.uint8)  # transparent black, as slide viewers export the outside
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_tile(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError) as error:
        read_tile(tmp_path / "deep.tif")
    assert "deep.tif" in message(error) and "8-bit" in message(error)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("extension", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path, extension, kept):
    path = tmp_path / f"cut{extension}"
    Image.fromarray(picture(0, 64, 64)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(UserError) as error:
        read_tile(path)
    assert str(path) in message(error)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        read_tile(tmp_path / "none.png")
    assert "none.png: No such file" in message(error)


def test_check_names_the_first_bad_files_and_counts_them(labelled):
    check_tiles(list_images(labelled))
    for i in range(5):
        (labelled / "B" / f"bad{i}.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(UserError) as error:
        check_tiles(list_images(labelled))
    text = message(error)
    assert "5 of 10" in text and "bad0.png" in text and "bad2.png" in text and "2 more" in text
    assert "bad3.png" not in text


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"check": True}])
def test_a_bad_file_stops_construction(labelled, options):
    (labelled / "A" / "bad.png").write_text("hello")
    with pytest.raises(UserError, match=r"bad\.png"):
        TileFolder(labelled, 8, **options)


def test_large_sets_are_not_decoded_up_front(labelled, monkeypatch):
    (labelled / "A" / "bad.png").write_text("hello")
    monkeypatch.setattr(tiles, "CHECK_LIMIT", 3)
    data = TileFolder(labelled, 8)
    at = [path.name for path in data.paths].index("bad.png")
    for workers in (0, 1):
        loader = DataLoader(data, batch_size=1, num_workers=workers, sampler=[at])
        with pytest.raises(UserError, match=r"bad\.png"):
            next(iter(loader))


def test_every_level_survives_the_tensor_and_the_png(tmp_path):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = to_tensor(image)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert np.array_equal(to_uint8(x), image)
    assert np.array_equal(to_uint8(x[None]), image[None])
    write_png(tmp_path / "x.png", to_uint8(x))
    assert np.array_equal(read_tile(tmp_path / "x.png"), image)
    assert os.listdir(tmp_path) == ["x.png"]


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5).expand(3, 1, 5)
    assert to_uint8(x)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    # One level is 1 / 127.5; truncation would turn 100.9 into 100.
    assert to_uint8(torch.full((3, 1, 1), 100.9 / 127.5 - 1)).item(0) == 101
    assert to_uint8(torch.zeros(3, 1, 1, dtype=torch.bfloat16)).item(0) == 128


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_png(tmp_path / "x.png", np.zeros((2, 2, 3), np.complex64))
    assert os.listdir(tmp_path) == []


def test_labelled_items(labelled):
    data = TileFolder(labelled, 8, labelled=True)
    assert data.classes == ["A", "B"] and data.labels == [0, 0, 0, 1, 1]
    assert data.relative_paths[2] == "A/sub/2.png" and len(data) == 5
    item = data[4]
    assert item["image"].shape == (3, 8, 8) and item["image"].dtype == torch.float32
    assert item["label"] == 1 and item["path"] == str(labelled / "B" / "1.png")
    assert TileFolder(labelled, 8, labelled=True, classes=["B", "A"]).labels == [0, 0, 1, 1, 1]


def test_unlabelled_roots_are_joined(labelled):
    data = TileFolder([labelled / "A", labelled / "B"], 8)
    assert len(data) == 5 and set(data.labels) == {-1} and data.classes == []
    assert data.relative_paths == ["0.png", "1.png", "sub/2.png", "0.png", "1.png"]
    assert next(iter(DataLoader(data, batch_size=5)))["label"].dtype == torch.int64


def test_tiles_of_the_right_size_are_not_touched(labelled):
    data = TileFolder(labelled, 16)
    assert np.array_equal(to_uint8(data[0]["image"]), read_tile(data.paths[0]))


@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (10, 7)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_any_shape_becomes_a_square(tmp_path, shape, crop):
    write_png(tmp_path / "x.png", picture(0, *shape))
    for cache in (False, True):
        assert TileFolder(tmp_path, 10, crop=crop, cache=cache)[0]["image"].shape == (3, 10, 10)


def test_resizing_keeps_the_mean_and_the_centre(tmp_path):
    ramp = np.linspace(0, 255, 96).astype(np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    write_png(tmp_path / "x.png", ramp)
    x = TileFolder(tmp_path, 8)[0]["image"]
    assert abs(x.mean()) < 0.02  # the middle third of the ramp, averaged by area
    assert (x[:, :, 1:] > x[:, :, :-1]).all()


def test_d4_gives_the_eight_symmetries_and_nothing_else(labelled):
    data = TileFolder(labelled, 16, augment=["d4"])
    image = read_tile(data.paths[0])
    symmetries = {
        np.rot90(flipped, k).tobytes() for flipped in (image, image[:, ::-1]) for k in range(4)
    }
    seen = {to_uint8(data[0, seed]["image"]).tobytes() for seed in range(100)}
    assert seen == symmetries


def test_stain_changes_colour_but_not_white_or_shape(tmp_path):
    white = np.full((16, 16, 3), 255, np.uint8)
    tissue = white.copy()
    tissue[4:12, 4:12] = (180, 90, 160)
    write_png(tmp_path / "x.png", tissue)
    data = TileFolder(tmp_path, 16, augment="stain")
    colours = set()
    for seed in range(20):
        out = to_uint8(data[0, seed]["image"])
        assert out[:4].min() > 220  # brightness and contrast only
        assert np.ptp(out[4:12, 4:12], axis=(0, 1)).max() == 0
        colours.add(tuple(out[8, 8]))
    assert len(colours) == 20
    assert np.ptp(np.array(sorted(colours), float), axis=0).min() > 15


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_repeats_under_a_seeded_loader(labelled, workers):
    data = TileFolder(labelled, 8, augment=["d4", "stain"], crop="random")

    def batches(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            data, batch_size=2, shuffle=True, num_workers=workers, generator=generator
        )
        return torch.cat([batch["image"] for _ in range(2) for batch in loader])

    first = batches(1)
    assert torch.equal(first, batches(1))
    assert not torch.equal(first, batches(2))
    assert not torch.equal(first[:5], first[5:])  # another epoch, other draws


def test_an_item_depends_on_its_seed_only(labelled):
    data = TileFolder(labelled, 8, augment=["d4", "stain"], crop="random")
    first = data[1, 7]["image"]
    data[2, 8]
    torch.manual_seed(3)
    assert torch.equal(data[1, 7]["image"], first)
    assert not torch.equal(data[1, 8]["image"], first)


def test_cached_items_are_the_same(labelled):
    for options in ({}, {"augment": ["d4", "stain"], "crop": "random"}):
        plain = TileFolder(labelled, 12, labelled=True, **options)
        cached = TileFolder(labelled, 12, labelled=True, cache=True, **options)
        for i in range(len(plain)):
            assert torch.equal(plain[i, i]["image"], cached[i, i]["image"])


def test_the_cache_is_bounded(labelled, monkeypatch):
    monkeypatch.setattr(tiles, "CACHE_LIMIT", 5 * 8 * 8 * 3 - 1)
    with pytest.raises(UserError, match="cache=true: 5 tiles of 8 px"):
        TileFolder(labelled, 8, cache=True)


@pytest.mark.parametrize("cache", [False, True])
def test_subset(labelled, cache):
    data = TileFolder(
        labelled, 8, labelled=True, augment=["stain"], crop="random", cache=cache, check=False
    )
    part = data.subset([4, 0], random=False)
    plain = TileFolder(labelled, 8, labelled=True)
    assert part.labels == [1, 0] and part.classes == data.classes and not part.is_random
    assert torch.equal(part[0]["image"], plain[4]["image"])
    assert data.is_random and data.subset([1]).is_random and len(data) == 5


def test_an_empty_class_folder_is_named(labelled):
    (labelled / "C").mkdir()
    (labelled / "C" / "notes.txt").write_text("nothing")
    with pytest.raises(UserError) as error:
        TileFolder(labelled, 8, labelled=True)
    assert str(labelled / "C") in message(error) and "no images" in message(error)


def test_differing_classes_name_the_differences(labelled):
    with pytest.raises(UserError) as error:
        TileFolder(labelled, 8, labelled=True, classes=["A", "MUS"])
    assert "missing ['MUS'], extra ['B']" in message(error)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"root": "nowhere"}, "nowhere does not exist"),
        ({"root": "A/0.png"}, "is not a folder"),
        ({"root": []}, "root=[]"),
        ({"root": None}, "root=None"),
        ({"root": ""}, "root=''"),
        ({"root": "A", "labelled": True}, "no images"),  # its only folder holds a text file
        ({"root": "empty"}, "no images"),
        ({"root": "empty", "labelled": True}, "no class folders"),
        ({"augment": ["d5"]}, "['d5']"),
        ({"classes": ["A"]}, "labelled=true"),
    ],
)
def test_bad_settings(labelled, monkeypatch, options, text):
    monkeypatch.chdir(labelled)
    os.mkdir("empty")
    (labelled / "A" / "sub" / "2.png").rename(labelled / "A" / "sub" / "2.txt")
    with pytest.raises(UserError) as error:
        TileFolder(**{"root": ["A", "B"], "size": 8, **options})
    assert text in message(error)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 8.5}, {"crop": "middle"}, {"check": "never"}]
)
def test_bad_settings_of_a_configuration(labelled, options):
    node = {"target": "ldm.data.tiles.TileFolder", "params": {"root": str(labelled), "size": 8}}
    node["params"] |= options
    (name,) = options
    with pytest.raises(UserError, match=f"params.{name}: "):
        instantiate_from_config(node)


def test_loose_images_are_reported(labelled, caplog):
    write_png(labelled / "grid.png", picture(0))  # of sampled images
    assert len(TileFolder(labelled, 8, labelled=True)) == 5
    assert not caplog.text
    write_png(labelled / "loose.png", picture(0))
    assert len(TileFolder(labelled, 8, labelled=True)) == 5
    assert "1 images beside the class folders" in caplog.text

"""One rule for the pixels of every format, and what is left out of a folder of tiles."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from ldm.data.images import class_folders, list_images, read_tile, walk
from ldm.data.tile_files import TileFiles
from ldm.data.tiles import TileFolder
from ldm.errors import UserError

LEVELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = {"uint16": LEVELS * np.uint16(257), "float32": (LEVELS / 255).astype(np.float32)}
DEEP |= {"float64": LEVELS / 255, "12 bits": np.rint(LEVELS / 255 * 4095).astype(np.uint16)}
WHITE = {"uint16": "65535", "float32": "1", "float64": "1", "12 bits": "4095\n"}


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> Path:
    """Write a file by a library that is not the one that reads it, where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".tif":
        tag = (274, "H", 1, orientation, True)
        photometric = "rgb" if pixels.ndim == 3 else "minisblack"
        tifffile.imwrite(path, pixels, photometric=photometric, extratags=[tag])
    else:
        cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return path


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    ("extension", "depth"),
    [(".png", "uint16"), (".png", "12 bits"), (".npy", "12 bits")]
    + [(extension, depth) for extension in (".tif", ".npy") for depth in ("uint16", "float32")]
    + [(".npy", "float64")],
)
def test_deep_pixels_are_scaled_by_what_the_set_declares(tmp_path, extension, depth, grey):
    chosen = (..., 0) if grey else (...,)
    path = save(tmp_path / "A" / f"x{extension}", DEEP[depth][chosen])
    with pytest.raises(
        UserError, match=rf"x\{extension}: .* values, more than 8 bits; .*white\.txt"
    ):
        read_tile(path)
    path = save(tmp_path / "set" / "A" / f"x{extension}", DEEP[depth][chosen])
    (tmp_path / "set" / "white.txt").write_text(WHITE[depth])
    expected = np.stack([LEVELS[..., 0]] * 3, axis=2) if grey else LEVELS
    assert np.array_equal(read_tile(path), expected)
    # 8 bits beside them stay what they are.
    plain = save(path.with_name(f"plain{extension}"), LEVELS[chosen])
    assert np.array_equal(read_tile(plain), expected)


def test_a_dark_tile_is_read_as_the_others_of_its_set(tmp_path):
    (tmp_path / "white.txt").write_text("255")
    dark = np.minimum(LEVELS, 1).astype(np.float32)  # its largest value, 1, says nothing
    assert np.array_equal(read_tile(save(tmp_path / "dark.npy", dark)), dark.astype(np.uint8))


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf])
def test_values_outside_the_declared_range(tmp_path, value):
    pixels = DEEP["float32"].copy()
    pixels[0, 0, 0] = value
    (tmp_path / "white.txt").write_text("1")
    with pytest.raises(UserError, match=r"must be within \[0, 1\]"):
        read_tile(save(tmp_path / "x.npy", pixels))


@pytest.mark.parametrize("text", ["", "bright", "0", "-1", "nan", "inf"])
def test_a_range_is_a_number(tmp_path, text):
    (tmp_path / "white.txt").write_text(text)
    with pytest.raises(UserError, match=r"white\.txt must hold a number"):
        read_tile(save(tmp_path / "x.npy", DEEP["uint16"]))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "deep.tif", "x.jpg"])
def test_orientation_is_always_applied(tmp_path, name, orientation):
    path = tmp_path / name
    (tmp_path / "white.txt").write_text("65535")
    flat = np.kron(LEVELS // 64 * 64, np.ones((16, 16, 1), np.uint8))  # JPEG keeps these blocks
    if name.startswith("deep"):
        save(path, flat * np.uint16(257), orientation)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if name == "x.jpg" else {"lossless": True}
        options = {"quality": 100, "subsampling": 0} if name == "x.jpg" else options
        Image.fromarray(flat).save(path, exif=exif, **options)
    turned = np.rot90(flat, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    found = read_tile(path)
    assert found.shape == turned.shape and np.abs(found.astype(int) - turned).max() <= 4


def in_mode(mode: str) -> Image.Image:
    image = Image.fromarray(LEVELS)
    if mode == "LAB":
        ends = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*ends, "RGB", "LAB"))
    if mode == "P":
        return image.quantize(64)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("P", "x.png", {}),
        ("RGBA", "x.png", {}),
        ("CMYK", "x.tif", {}),
        ("LAB", "x.tif", {}),
        ("L", "x.webp", {"lossless": True}),
        ("1", "x.png", {}),
        ("RGB", "x.tif", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
        ("RGB", "x.tif", {"compression": "jpeg", "quality": 100}),
    ],
)
def test_kinds_of_8_bits(tmp_path, mode, name, options):
    image = in_mode(mode)
    image.save(tmp_path / name, **options)
    expected = LEVELS if mode in ("LAB", "RGBA") else np.array(image.convert("RGB"))
    found = read_tile(tmp_path / name).astype(int)
    assert found.shape == LEVELS.shape
    assert np.abs(found - expected).mean() < (40 if "quality" in options else 3)


def test_deep_transparency_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), np.dstack([DEEP["uint16"], DEEP["uint16"][..., :1]]))
    with pytest.raises(UserError, match=r"x\.png: .*transparency; convert"):
        read_tile(tmp_path / "x.png")


# What is in a folder


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("A/0.png", "A/deep/1.png", "B/2.png"):
        save(tmp_path / "set" / name, LEVELS)
    return tmp_path / "set"


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


def test_what_operating_systems_leave_is_no_tile_and_no_class(folder):
    for name in ("Thumbs.db", ".DS_Store", "A/._0.png", "__MACOSX/A/._0.png", "__MACOSX/x.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("junk")
    for name in (".ipynb_checkpoints", "B/.ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN"):
        (folder / name).mkdir()
    assert names(folder) == ["A/0.png", "A/deep/1.png", "B/2.png"]
    assert class_folders(folder) == TileFiles.below(folder).classes == ["A", "B"]


def test_files_of_other_kinds_are_counted_by_kind(folder, caplog):
    for name in ("A/x.bmp", "B/y.BMP", "B/z.npz", "table.csv", "A/notes.txt"):
        (folder / name).write_text("no tile")
    assert len(TileFolder(folder, 5, labelled=True)) == 3
    lines = [line for line in caplog.messages if "left out" in line]
    assert len(lines) == 1 and "2 .bmp, 1 .npz" in lines[0] and "csv" not in lines[0]


@pytest.mark.parametrize("target", [".", "..", "../..", "A/deep", "A"])
def test_a_link_counts_no_tile_twice(folder, caplog, target):
    (folder / "A" / "0link").symlink_to(folder / target, target_is_directory=True)
    assert names(folder) == ["A/0.png", "A/deep/1.png", "B/2.png"]
    assert "0link leads to a folder that is read already" in caplog.text


def test_links_out_of_the_folder_are_followed_once(folder, tmp_path):
    save(tmp_path / "elsewhere" / "9.png", LEVELS)
    for name in ("C", "D"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    found = [f.path.name for f in walk(folder, lambda name: name == "9.png") if f.files]
    assert len(found) == 1 and found[0] in "CD"
    os.remove(folder / found[0])
    assert len(names(folder)) == 4


@pytest.mark.parametrize("classes", [["A", "b"], None])
def test_classes_that_differ_in_case_are_named(folder, classes):
    save(folder / "a" / "0.png", LEVELS)
    with pytest.raises(UserError, match="A and a differ in case only|b and B differ in case only"):
        TileFiles.below(folder, classes=classes)

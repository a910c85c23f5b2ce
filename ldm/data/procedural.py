"""Procedural H&E-like tiles of nine tissue classes, named as in NCT-CRC-HE-100K.

They need no download, so they serve the demo, tests and benchmarks; they are no medical images.

A tile is a field of view of about 112 micrometres. Each tissue is a pair of concentration maps, of
haematoxylin (nuclei, mucin) and eosin (cytoplasm, fibres); the slide then has its own stains and
the camera its own light, focus and noise (`ldm.data.stain` says how stains become colour). Slides
differ so much that colour alone does not tell the classes apart, and three pairs of classes share
one generator with overlapping parameters: NORM and TUM, STR and MUS, MUC and DEB.

Lengths are in micrometres and random numbers do not depend on the size in pixels, so one
(class, index, seed) is the same field of view at any size.

Letters: S side in pixels, N nuclei, G glands.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from ldm.data.stain import EOSIN, HAEMATOXYLIN

CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
TILES_PER_SLIDE = 5
VERSION = 1  # to be raised when the pictures change, so that a folder never holds two kinds
FIELD = 112.0  # micrometres, as 224 px at 0.5 micrometres per pixel
SIZES = (32, 512)

# Other absorbance vectors of the same stains: Macenko et al., "A method for normalizing histology
# slides for quantitative analysis", ISBI 2009. Slides lie between these and Ruifrok & Johnston's.
MACENKO_HAEMATOXYLIN = np.array([0.563, 0.720, 0.406])
MACENKO_EOSIN = np.array([0.216, 0.801, 0.558])

Maps = tuple[np.ndarray, np.ndarray]  # haematoxylin, eosin: (S, S) float32, optical density units


@dataclass
class Field:
    """The pixels of a tile in micrometres, the centre at 0."""

    size: int
    pixel: float  # micrometres per pixel
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.half = self.size * self.pixel / 2
        line = ((np.arange(self.size) + 0.5) * self.pixel - self.half).astype(np.float32)
        self.x, self.y = np.meshgrid(line, line)  # (S, S)
        # Fainter where a pixel averages over several clumps.
        self.chromatin = 1 + 0.2 / max(1.0, self.pixel) * self.noise(1.7)

    def constant(self, value: float) -> np.ndarray:
        return np.full((self.size, self.size), value, np.float32)

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def noise(self, wavelength: float) -> np.ndarray:
        """A new random field at the pixels, (S, S)."""
        return Noise(self.rng, wavelength)(self.x, self.y)

    def near(self, points: np.ndarray, margin: float = 8.0) -> np.ndarray:
        """Those of the points, (N, 2), that lie in the field or at most `margin` beside it."""
        return (np.abs(points) < self.half + margin).all(axis=1)


class Noise:
    """Smooth random field of unit variance (value noise) that can be asked at any coordinates."""

    SIDE = 32  # lattice points per period

    def __init__(self, rng: np.random.Generator, wavelength: float | tuple[float, float] = 1.0):
        self.lattice = rng.standard_normal((self.SIDE, self.SIDE), dtype=np.float32)
        self.shift = rng.uniform(0, self.SIDE, 2).astype(np.float32)
        self.wavelength = np.broadcast_to(wavelength, 2).astype(np.float32)
        # The axes of an isotropic field would show in the picture if they were not turned.
        self.angle = 0.0 if np.ndim(wavelength) else rng.uniform(0, math.pi)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if self.angle:
            x, y = _turned(x, y, self.angle)
        x = x / self.wavelength[0] + self.shift[0]
        y = y / self.wavelength[1] + self.shift[1]
        column, row = np.floor(x), np.floor(y)
        fx, fy = x - column, y - row
        fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
        mask = self.SIDE - 1
        c0, r0 = column.astype(np.int32) & mask, row.astype(np.int32) & mask
        c1, r1 = (c0 + 1) & mask, (r0 + 1) & mask
        top = self.lattice[r0, c0] * (1 - fx) + self.lattice[r0, c1] * fx
        bottom = self.lattice[r1, c0] * (1 - fx) + self.lattice[r1, c1] * fx
        return (top * (1 - fy) + bottom * fy) * np.float32(1.5)  # interpolation halves the variance


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction; also hides the axes of a noise lattice."""
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return c * x + s * y, c * y - s * x


def _smooth(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _cells(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest and second nearest point of a jittered lattice (Worley 1996)."""
    points = rng.uniform(0.08, 0.92, (2, 64, 64)).astype(np.float32)
    u, v = x / spacing + 32, y / spacing + 32
    column, row = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    first = np.full(u.shape, np.inf, np.float32)
    second = first.copy()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            c, r = column + dx, row + dy
            px, py = points[0][r & 63, c & 63], points[1][r & 63, c & 63]
            distance = np.hypot(c + px - u, r + py - v)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    return first * spacing, second * spacing


def _scatter(field: Field, spacing: float, jitter: float = 0.3, margin: float = 8.0) -> np.ndarray:
    """Points of a turned, jittered hexagonal lattice over the field, (N, 2)."""
    reach = 1.5 * (field.half + margin)
    rows = np.arange(-reach, reach, spacing * 0.866)
    columns = np.arange(-reach, reach, spacing)
    x, y = np.meshgrid(columns, rows)
    x = x + spacing * 0.5 * (np.arange(len(rows)) % 2)[:, None]
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    points += field.rng.normal(0, jitter * spacing * 0.5, points.shape)
    points += field.rng.uniform(-spacing, spacing, 2)
    angle = field.uniform(0, math.pi)
    points = np.stack(_turned(points[:, 0], points[:, 1], angle), axis=1)
    return points[field.near(points, margin)]


@dataclass
class Nuclei:
    """Ellipses with an uneven outline; each value a number or one per nucleus."""

    centre: np.ndarray  # (N, 2)
    a: np.ndarray | float  # half axes
    b: np.ndarray | float
    angle: np.ndarray | float = 0.0  # of axis a
    level: np.ndarray | float = 1.3  # concentration
    pale: np.ndarray | float = 0.0  # how much paler the middle is (open chromatin)
    uneven: float = 0.06
    soft: float = 0.5  # width of the edge


def _paint(field: Field, nuclei: Nuclei) -> tuple[np.ndarray, np.ndarray]:
    """Coverage in [0, 1] and concentration of nuclei, each (S, S). Overlaps take the larger."""
    cover, level = field.constant(0), field.constant(0)
    count = len(nuclei.centre)
    if count == 0:
        return cover, level

    def column(value) -> np.ndarray:
        return np.broadcast_to(value, count).astype(np.float32)[:, None, None]

    a, b, angle = column(nuclei.a), column(nuclei.b), column(nuclei.angle)
    lobes = field.rng.normal(0, nuclei.uneven, (2, count)).astype(np.float32)[:, :, None, None]
    # One window of pixels around each centre, as large as the largest nucleus needs.
    reach = float(np.maximum(a, b).max()) * 1.3 + nuclei.soft
    radius = int(math.ceil(reach / field.pixel)) + 1
    offset = np.arange(-radius, radius + 1)
    position = (nuclei.centre + field.half) / field.pixel - 0.5  # in pixels
    corner = np.rint(position).astype(np.int64)
    xx = corner[:, 0, None, None] + offset[None, None, :]  # (N, 1, W)
    yy = corner[:, 1, None, None] + offset[None, :, None]  # (N, W, 1)
    dx = ((xx - position[:, 0, None, None]) * field.pixel).astype(np.float32)
    dy = ((yy - position[:, 1, None, None]) * field.pixel).astype(np.float32)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / a  # (N, W, W)
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / b
    square = u * u + v * v + np.float32(1e-6)
    rho = np.sqrt(square)
    # cos 2 phi and cos 3 phi of the polar angle, without computing it.
    two = (u * u - v * v) / square
    three = u * (u * u - 3 * v * v) / (square * rho)
    rho = rho * (1 + lobes[0] * two + lobes[1] * three)
    soft = max(nuclei.soft, field.pixel)
    to_edge = (1 - rho) * np.sqrt((dx * dx + dy * dy) / square)  # along the ray from the centre
    alpha = np.clip(to_edge / soft + 0.5, 0, 1)
    value = alpha * column(nuclei.level) * (1 - column(nuclei.pale) * np.clip(1.15 - rho, 0, 1))
    inside = (xx >= 0) & (xx < field.size) & (yy >= 0) & (yy < field.size) & (alpha > 0)
    flat = (yy * field.size + xx)[inside]
    np.maximum.at(cover.reshape(-1), flat, alpha[inside])
    np.maximum.at(level.reshape(-1), flat, value[inside])
    return cover, level


def _add_nuclei(field: Field, maps: Maps, nuclei: Nuclei) -> Maps:
    """Nuclei in front of the tissue, which they displace."""
    h, e = maps
    cover, level = _paint(field, nuclei)
    return h * (1 - 0.9 * cover) + level * field.chromatin, e * (1 - 0.6 * cover)


def _lymphocytes(field: Field, centre: np.ndarray) -> Nuclei:
    """Small, round and dark."""
    count = len(centre)
    radius = field.rng.normal(3.1, 0.3, count).clip(2.2, 4.2)
    return Nuclei(
        centre,
        a=radius * field.rng.uniform(1.0, 1.2, count),
        b=radius,
        angle=field.rng.uniform(0, math.pi, count),
        level=field.rng.normal(1.55, 0.2, count).clip(0.9, 2.2),
        pale=0.15,
    )


def _random_points(field: Field, count: int) -> np.ndarray:
    return field.rng.uniform(-field.half - 4, field.half + 4, (count, 2))


def _background(field: Field) -> Maps:
    """Glass: nothing, or a little dirt, dried protein and shade."""
    rng = field.rng
    smear = field.noise(field.uniform(20, 60))
    h = 0.012 * np.abs(field.noise(4.0)) * field.uniform(0, 1)
    e = field.uniform(0, 0.06) * _smooth(smear, 0.2, 1.5) + 0.01
    count = int(rng.poisson(rng.choice([0.2, 4.0])))
    specks = Nuclei(
        _random_points(field, count),
        a=rng.uniform(0.5, 3.0, count),
        b=rng.uniform(0.4, 1.5, count),
        angle=rng.uniform(0, math.pi, count),
        level=rng.uniform(0.03, 0.35, count),
        uneven=0.2,
        soft=field.uniform(0.5, 3.0),
    )
    return _add_nuclei(field, (h, e.astype(np.float32)), specks)


def _adipose(field: Field) -> Maps:
    """Empty round cells between thin walls, a flat nucleus on the wall here and there."""
    rng = field.rng
    spacing = field.uniform(26, 62)
    wall = field.uniform(0.8, 2.0)
    angle = field.uniform(0, math.pi)
    warp = Noise(rng, spacing * 0.8), Noise(rng, spacing * 0.8)
    bend = spacing * 0.09
    cell_seed = int(rng.integers(2**62))

    def depth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Distance from the nearest wall, about."""
        u, v = x + bend * warp[0](x, y), y + bend * warp[1](x, y)
        u, v = _turned(u, v, angle)
        first, second = _cells(np.random.default_rng(cell_seed), u, v * 1.1, spacing)
        return (second - first) / 2

    d = depth(field.x, field.y)
    soft = max(wall, field.pixel * 0.7)
    membrane = np.exp(-((d / soft) ** 2)) * (wall / soft) ** 0.7
    patchy = 1 + 0.3 * field.noise(9.0)
    e = field.uniform(0.45, 0.95) * membrane * patchy + field.uniform(0.0, 0.05)
    h = 0.18 * membrane
    candidates = _random_points(field, 120)
    x, y = candidates.T.astype(np.float32)
    at, right, below = depth(np.stack([x, x + 1, x]), np.stack([y, y, y + 1]))
    slope_x, slope_y = right - at, below - at
    on_wall = np.flatnonzero(at < 1.5)[: int(rng.integers(0, 6))]
    nuclei = Nuclei(
        candidates[on_wall],
        a=rng.uniform(3.5, 6.0, len(on_wall)),
        b=rng.uniform(1.2, 2.0, len(on_wall)),
        angle=(np.arctan2(slope_y, slope_x) + math.pi / 2)[on_wall],
        level=1.3,
    )
    return _add_nuclei(field, (h, e), nuclei)


def _lymphoid(field: Field) -> Maps:
    """Sheets of lymphocytes with hardly any cytoplasm; some larger pale cells."""
    rng = field.rng
    uneven = Noise(rng, 25.0)
    h = field.uniform(0.12, 0.3) + 0.08 * field.noise(5.0)
    e = field.uniform(0.2, 0.5) * (1 + 0.3 * field.noise(8.0))
    points = _scatter(field, field.uniform(7.2, 9.6), jitter=0.45)
    density = uneven(points[:, 0].astype(np.float32), points[:, 1].astype(np.float32))
    points = points[density + rng.normal(0, 0.7, len(points)) > -field.uniform(0.7, 2.2)]
    large = rng.random(len(points)) < rng.choice([0.02, 0.12, 0.35])
    maps = _add_nuclei(field, (h.clip(0), e.clip(0)), _lymphocytes(field, points[~large]))
    count = int(large.sum())
    radius = rng.normal(4.3, 0.4, count).clip(3, 6)
    centroblasts = Nuclei(
        points[large],
        a=radius * 1.1,
        b=radius,
        angle=rng.uniform(0, math.pi, count),
        level=rng.uniform(0.8, 1.2, count),
        pale=0.5,
    )
    return _add_nuclei(field, maps, centroblasts)


def _fibres(field: Field, tightness: float) -> Maps:
    """Fibres along one direction: loose wavy collagen at 0, dense smooth muscle at 1."""
    rng = field.rng
    angle = field.uniform(0, math.pi)
    wave = Noise(rng, (field.uniform(35, 70), field.uniform(40, 90)))
    amplitude = field.uniform(3, 6) + 9 * (1 - tightness)
    along, across = _turned(field.x, field.y, angle)
    across = across + amplitude * wave(along, across)
    width = 2.2 + 1.6 * tightness
    strand = Noise(rng, (30.0 + 30 * tightness, width))(along, across)
    bundle = Noise(rng, (90.0, field.uniform(9, 18)))(along, across)
    patch = field.noise(30.0)
    base = field.uniform(0.42, 0.7) + 0.36 * tightness
    e = base * (1 + (0.34 - 0.14 * tightness) * strand + 0.16 * bundle + 0.12 * patch)
    cleft = Noise(rng, (50.0, 5.0 + 4 * tightness))(along, across) + 0.5 * bundle
    limit = 0.55 + 0.9 * tightness + field.uniform(-0.2, 0.5)
    gap = _smooth(cleft, limit, limit + 0.5)
    e = (e * (1 - 0.85 * gap)).clip(0.02)
    h = (0.05 + 0.1 * tightness) * (1 + 0.4 * strand).clip(0) * (1 - gap)

    points = _scatter(field, field.uniform(13, 22) - 2 * tightness, jitter=0.8)
    s, t = _turned(points[:, 0].astype(np.float32), points[:, 1].astype(np.float32), angle)
    slope = amplitude * (wave(s + 2, t) - wave(s - 2, t)) / 4
    count = len(points)
    spindles = Nuclei(
        points,
        a=rng.normal(5.6 + 1.6 * tightness, 1.3, count).clip(2.5, 11),
        b=rng.normal(1.35 + 0.55 * tightness, 0.3, count).clip(0.9, 3),
        angle=angle - np.arctan(slope) + rng.normal(0, 0.2 - 0.12 * tightness, count),
        level=rng.normal(1.35 - 0.2 * tightness, 0.2, count).clip(0.6, 2),
        pale=0.2,
    )
    maps = _add_nuclei(field, (h, e), spindles)
    guests = int(rng.poisson(rng.choice([1.0, 6.0, 25.0]) * (1 - tightness)))
    return _add_nuclei(field, maps, _lymphocytes(field, _random_points(field, guests)))


def _cross_cut_muscle(field: Field) -> Maps:
    """Muscle bundles cut across: pink polygons, round nuclei in some of them."""
    rng = field.rng
    spacing = field.uniform(7, 11)
    bend = Noise(rng, 30.0), Noise(rng, 30.0)
    x, y = field.x + 5 * bend[0](field.x, field.y), field.y + 5 * bend[1](field.x, field.y)
    first, second = _cells(rng, *_turned(x, y, field.uniform(0, math.pi)), spacing)
    body = _smooth(second - first, 0.0, 2.2)
    bundle = _cells(rng, x, y, field.uniform(45, 80))
    septum = 1 - _smooth(bundle[1] - bundle[0], 1.0, 5.0)
    e = field.uniform(0.6, 0.95) * (0.72 + 0.28 * body) * (1 - 0.6 * septum)
    e = e * (1 + 0.12 * field.noise(12.0))
    h = 0.08 + 0.06 * body
    points = _scatter(field, spacing * field.uniform(1.4, 2.2), jitter=0.8)
    count = len(points)
    nuclei = Nuclei(
        points,
        a=rng.uniform(1.8, 3.0, count),
        b=rng.uniform(1.4, 2.2, count),
        angle=rng.uniform(0, math.pi, count),
        level=rng.normal(1.2, 0.2, count).clip(0.6, 2),
    )
    return _add_nuclei(field, (h, e), nuclei)


def _fluid(field: Field, cellular: float) -> Maps:
    """Mucin at 0: pale bluish threads and few cells; necrotic debris at 1: pink grains and dust."""
    rng = field.rng
    angle = field.uniform(0, math.pi)
    flow = Noise(rng, 40.0), Noise(rng, 14.0)
    along, across = _turned(field.x, field.y, angle)
    across = across + 14 * flow[0](along, across) + 3 * flow[1](along, across)
    cloud = field.noise(26.0)
    # Threads are where a stretched field crosses zero.
    thread = np.exp(-((Noise(rng, (60.0, 11.0))(along, across) / 0.3) ** 2))
    fine = np.exp(-((Noise(rng, (30.0, 6.0))(along, across) / 0.45) ** 2))
    wet = 1 - cellular
    strength = field.uniform(0.5, 1.3)
    h = wet * strength * (0.09 + 0.05 * cloud + 0.24 * thread + 0.12 * fine)
    e = wet * strength * (0.04 + 0.02 * cloud + 0.1 * thread + 0.04 * fine)

    grain = 0.7 * (field.noise(2.0) + field.noise(3.7))
    lump = field.noise(8.0)
    full = _smooth(cloud + 0.45 * lump + 0.15 * grain, -1.5 + 0.5 * wet, 0.5)
    h = h + cellular * full * (0.14 + 0.09 * lump + 0.08 * grain)
    e = e + cellular * full * field.uniform(0.4, 0.85) * (1 + 0.25 * lump + 0.3 * grain)
    maps = h.clip(0), e.clip(0.01)

    count = int(rng.poisson(10 + 190 * cellular))
    dust = Nuclei(
        _random_points(field, count),
        a=rng.lognormal(0.05, 0.45, count).clip(0.4, 3.2),
        b=rng.lognormal(-0.2, 0.4, count).clip(0.4, 2.5),
        angle=rng.uniform(0, math.pi, count),
        level=rng.uniform(0.3, 1.6, count),
        uneven=0.2,
    )
    maps = _add_nuclei(field, maps, dust)
    count = int(rng.poisson(3 + 22 * cellular))
    ghosts = Nuclei(
        _random_points(field, count),
        a=rng.uniform(2.5, 5.0, count),
        b=rng.uniform(2.0, 3.5, count),
        angle=rng.uniform(0, math.pi, count),
        level=rng.uniform(0.25, 1.3, count),
        uneven=0.15,
        soft=1.5,
    )
    return _add_nuclei(field, maps, ghosts)


@dataclass
class Glands:
    """Outlines of glands: ellipses with lobes. `lumen` is the radius of the hole, of 1."""

    centre: np.ndarray  # (G, 2)
    radius: np.ndarray  # (G,)
    stretch: np.ndarray  # (G,) square root of the ratio of the axes
    tilt: np.ndarray  # (G,)
    lobe: np.ndarray  # (G, 4) relative amplitudes of cos 2 phi ... cos 5 phi
    phase: np.ndarray  # (G, 4)
    lumen: np.ndarray  # (G,)

    @property
    def thickness(self) -> np.ndarray:
        """Of the epithelium, (G,)."""
        return self.radius * (1 - self.lumen)

    def outline(self, gland: np.ndarray, phi: np.ndarray) -> np.ndarray:
        """Relative distance of the outline at polar angle `phi`, about 1."""
        value = np.ones_like(phi)
        for k in range(4):
            value += self.lobe[gland, k] * np.cos((k + 2) * phi + self.phase[gland, k])
        return value

    def locate(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each point the gland that is relatively nearest, and the depth in it (< 0: out)."""
        dx = x.ravel() - self.centre[:, 0, None]  # (G, N)
        dy = y.ravel() - self.centre[:, 1, None]
        c, s = np.cos(self.tilt)[:, None], np.sin(self.tilt)[:, None]
        u = (c * dx + s * dy) / (self.stretch * self.radius)[:, None]
        v = (c * dy - s * dx) * (self.stretch / self.radius)[:, None]
        square = u * u + v * v
        gland = square.argmin(axis=0)  # (N,)
        u, v, square = (q[gland, np.arange(len(gland))] for q in (u, v, square))
        ratio = np.sqrt(square) / self.outline(gland, np.arctan2(v, u))  # 1 on the outline
        depth = (1 - ratio) * self.radius[gland]
        return gland.reshape(x.shape), depth.reshape(x.shape)

    def rings(
        self,
        rng: np.random.Generator,
        gland: np.ndarray,
        depth: np.ndarray,
        spacing: float,
        spread: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points along rings, each `depth` below the outline of a gland: (N, 2), outward angles."""
        around = 2 * math.pi * np.maximum(self.radius[gland] - depth, 3) / spacing
        count = np.maximum(3, around).astype(int)  # points per ring
        ring, number = _numbered(count)
        gland, depth, step = gland[ring], depth[ring], 2 * math.pi / count[ring]
        phi = ((number + rng.normal(0, 0.22, len(number))) * step).astype(np.float32)
        at = self.radius[gland] * self.outline(gland, phi) - depth
        at = at + rng.normal(0, spread, len(at))
        u, v = at * np.cos(phi) * self.stretch[gland], at * np.sin(phi) / self.stretch[gland]
        c, s = np.cos(self.tilt[gland]), np.sin(self.tilt[gland])
        offset = np.stack([c * u - s * v, s * u + c * v], axis=1)
        return offset + self.centre[gland], np.arctan2(offset[:, 1], offset[:, 0])


def _make_glands(field: Field, atypia: float) -> Glands:
    rng = field.rng
    spacing = field.uniform(56, 92) + 14 * (1 - atypia)
    centre = _scatter(field, spacing, jitter=0.25 + 0.45 * atypia, margin=0.6 * spacing)
    if len(centre) == 0:  # the lattice has left the field out; one gland in the middle
        centre = rng.normal(0, 10, (1, 2))
    count = len(centre)
    gap = field.uniform(3, 10) * (1 - 0.5 * atypia)
    size = rng.uniform(0.85 - 0.25 * atypia, 1.05 + 0.15 * atypia, count)
    harmonic = np.arange(2, 6)
    return Glands(
        centre=centre.astype(np.float32),
        radius=((spacing / 2 - gap) * size).astype(np.float32),
        stretch=np.sqrt(rng.uniform(1.0, 1.15 + 0.35 * atypia, count)).astype(np.float32),
        tilt=rng.uniform(0, math.pi, count).astype(np.float32),
        lobe=rng.normal(0, (0.04 + 0.15 * atypia) / harmonic, (count, 4)).astype(np.float32),
        phase=rng.uniform(0, 2 * math.pi, (count, 4)).astype(np.float32),
        lumen=(
            rng.uniform(0.08, 0.28 + 0.3 * atypia, count) * (rng.random(count) > 0.25 * atypia)
        ).astype(np.float32),
    )


def _glands(field: Field, atypia: float) -> Maps:
    """Glands in stroma: crypts with goblet cells at 0, crowded carcinoma glands at 1."""
    glands = _make_glands(field, atypia)
    maps = _gland_tissue(field, glands, atypia)
    # Half axes of a nucleus.
    long = field.uniform(3.5, 4.2 + 0.8 * atypia)
    wide = field.uniform(2.2, 2.7 + 0.4 * atypia)
    maps = _add_mucus(field, maps, glands, atypia, long)
    maps = _add_nuclei(field, maps, _epithelial_nuclei(field, glands, atypia, long, wide))
    # Lymphocytes and plasma cells of the stroma; those that would lie on epithelium stay away.
    guests = _random_points(field, int(field.rng.choice([30, 70, 130])))
    _, depth = glands.locate(*guests.T.astype(np.float32))
    return _add_nuclei(field, maps, _lymphocytes(field, guests[depth < -1.5]))


def _gland_tissue(field: Field, glands: Glands, atypia: float) -> Maps:
    """Stroma, epithelium and what fills the lumen, without nuclei and mucus."""
    rng = field.rng
    gland, depth = glands.locate(field.x, field.y)
    lumen = glands.lumen[gland]

    ragged = 0.1 * field.noise(7.0)
    epithelium = _smooth(depth, -0.8, 0.8)
    rim = 1 - depth / glands.radius[gland] + ragged - lumen
    hole = (1 - _smooth(rim, -0.05, 0.05)) * (lumen > 0)
    grain = field.noise(4.0)
    bend = 5 * field.noise(15.0)
    along, across = _turned(field.x, field.y, field.uniform(0, math.pi))
    strand = Noise(rng, (8.0 + 14 * atypia, 3.2))(along, across + bend)
    loose = _smooth(strand + 0.5 * grain, 0.9 + 0.5 * atypia, 2.2)

    stroma_e = field.uniform(0.35, 0.65) * (1 + 0.22 * strand + 0.1 * grain) * (1 - 0.8 * loose)
    cell_e = field.uniform(0.35, 0.65) * (1 + 0.15 * grain)
    cell_h = field.uniform(0.1, 0.2) + 0.22 * atypia * (1 + 0.2 * grain)
    secretion = field.uniform(0, 0.25) * (1 + 0.5 * grain)
    e = stroma_e * (1 - epithelium) + cell_e * epithelium
    h = 0.07 * (1 - epithelium) + cell_h * epithelium
    e = e * (1 - hole) + 0.25 * secretion * hole
    h = h * (1 - hole) + (1 - 0.5 * atypia) * secretion * hole
    return h.clip(0), e.clip(0.01)


def _add_mucus(field: Field, maps: Maps, glands: Glands, atypia: float, long: float) -> Maps:
    """Goblet cells: rings of pale mucin drops between the nuclei and the lumen."""
    rng = field.rng
    share = max(0.0, field.uniform(0.6, 1.0) - 1.25 * atypia)
    ring_gland, ring_depth = _stack(glands.thickness - 2, first=2.6 * long, step=8.0)
    points, angle = glands.rings(rng, ring_gland, ring_depth, spacing=7.6, spread=0.8)
    keep = field.near(points) & (rng.random(len(points)) < share)
    points, angle = points[keep], angle[keep]
    drops = Nuclei(
        points,
        a=rng.uniform(3.4, 5.2, len(points)),
        b=rng.uniform(2.6, 3.7, len(points)),
        angle=angle,
        level=1.0,
        soft=1.2,
    )
    cover, _ = _paint(field, drops)
    mucus = field.uniform(0.06, 0.26)
    return maps[0] * (1 - cover) + mucus * cover, maps[1] * (1 - 0.9 * cover)


def _epithelial_nuclei(
    field: Field, glands: Glands, atypia: float, long: float, wide: float
) -> Nuclei:
    """One row of nuclei at the base, more of them the more atypical, some glands solid."""
    rng = field.rng
    rows = 1 + int(rng.random() < 2 * atypia) + int(rng.random() < 1.4 * atypia - 0.4)
    filled = np.where((glands.lumen == 0) & (atypia > 0.5), np.inf, rows * 1.6 * long)
    ring_gland, ring_depth = _stack(
        np.minimum(glands.thickness, filled), first=0.95 * long, step=1.6 * long
    )
    crowding = field.uniform(1.9, 2.5) + 0.2 * atypia
    points, angle = glands.rings(
        rng, ring_gland, ring_depth, spacing=crowding * wide, spread=0.4 + 1.6 * atypia
    )
    keep = field.near(points)
    points, angle = points[keep], angle[keep]
    count = len(points)
    size = (1 + 0.15 * atypia) * rng.lognormal(0, 0.08 + 0.2 * atypia, count).clip(0.6, 1.7)
    return Nuclei(
        points,
        a=size * long,
        b=size * wide,
        angle=angle + rng.normal(0, 0.15 + 0.4 * atypia, count),
        level=rng.normal(field.uniform(1.05, 1.45), 0.08 + 0.14 * atypia, count).clip(0.5, 2),
        pale=field.uniform(0.15, 0.35 + 0.3 * atypia),
        uneven=0.04 + 0.08 * atypia,
    )


def _stack(limit: np.ndarray, first: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Depths first, first + step, ... below each gland's limit: gland of each ring, its depth."""
    count = np.maximum(0, np.ceil((np.minimum(limit, 1000) - first) / step)).astype(int)
    gland, number = _numbered(count)
    return gland, first + step * number


def _numbered(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owners i, each count[i] times, and the numbers 0 ... count[i] - 1 of what each owns."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - np.repeat(count.cumsum() - count, count)


def _muscle(field: Field) -> Maps:
    if field.rng.random() < 0.2:
        return _cross_cut_muscle(field)
    return _fibres(field, field.uniform(0.42, 1.0))


TISSUES: dict[str, Callable[[Field], Maps]] = {
    "ADI": _adipose,
    "BACK": _background,
    "DEB": lambda field: _fluid(field, field.uniform(0.4, 1.0)),
    "LYM": _lymphoid,
    "MUC": lambda field: _fluid(field, field.uniform(0.0, 0.5)),
    "MUS": _muscle,
    "NORM": lambda field: _glands(field, field.uniform(0.0, 0.45)),
    "STR": lambda field: _fibres(field, field.uniform(0.0, 0.58)),
    "TUM": lambda field: _glands(field, field.uniform(0.38, 1.0)),
}

# What may intrude from the side, in at most a third of the tile.
NEIGHBOURS = {
    "ADI": ("STR",),
    "BACK": (),
    "DEB": ("TUM", "MUC"),
    "LYM": ("STR", "ADI"),
    "MUC": ("TUM", "STR"),
    "MUS": ("STR",),
    "NORM": ("LYM",),
    "STR": ("TUM", "LYM", "ADI"),
    "TUM": ("STR", "DEB"),
}


def slide_of(index: int) -> int:
    """The slide that tile `index` of any class lies on; a slide has one stain."""
    return index // TILES_PER_SLIDE


@dataclass(frozen=True)
class Slide:
    """How one slide was stained and scanned."""

    haematoxylin: np.ndarray  # unit absorbance vector
    eosin: np.ndarray
    strength: np.ndarray  # (2,) factors of haematoxylin and eosin
    light: np.ndarray  # (3,) colour of empty glass in [0, 1]
    blur: float  # micrometres
    noise: float  # grey levels


def make_slide(slide: int, seed: int = 0) -> Slide:
    rng = np.random.default_rng((1, seed, slide))

    def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        vector = first + rng.uniform(0.1, 1.0) * (second - first) + rng.normal(0, 0.025, 3)
        vector = vector.clip(0.02)
        return vector / np.linalg.norm(vector)

    return Slide(
        haematoxylin=mixed(HAEMATOXYLIN, MACENKO_HAEMATOXYLIN),
        eosin=mixed(EOSIN, MACENKO_EOSIN),
        strength=rng.lognormal(0, 0.22, 2),
        light=(rng.uniform(0.91, 0.985) + rng.normal(0, 0.012, 3)).clip(0.85, 1.0),
        blur=float(rng.uniform(0.3, 0.9)),
        noise=float(rng.uniform(0.8, 3.5)),
    )


def _tissue(name: str, field: Field) -> Maps:
    """Concentrations of a class, with a neighbour at one side now and then."""
    h, e = TISSUES[name](field)
    others = NEIGHBOURS[name]
    if others and field.rng.random() < 0.25:
        other_h, other_e = TISSUES[others[int(field.rng.integers(len(others)))]](field)
        along, _ = _turned(field.x, field.y, field.uniform(0, 2 * math.pi))
        border = along / field.half + 0.18 * field.noise(25.0)
        start = field.uniform(0.45, 0.95)
        side = _smooth(border, start, start + 0.06)
        h, e = h * (1 - side) + other_h * side, e * (1 - side) + other_e * side
    return h, e


def render_tile(class_name: str, index: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """One tile, the same for the same arguments.

    Args:
        class_name: One of `CLASSES`.
        index: Number of the tile in its class, from 0; `slide_of(index)` sets the stain.
        size: S, pixels, in [32, 512].
        seed: Seed of the data set, from 0.

    Returns:
        uint8 (S, S, 3), RGB.
    """
    assert SIZES[0] <= size <= SIZES[1] and index >= 0 and seed >= 0, (size, index, seed)
    rng = np.random.default_rng((0, seed, CLASSES.index(class_name), index))
    slide = make_slide(slide_of(index), seed)

    field = Field(size, FIELD * rng.uniform(0.8, 1.25) / size, rng)
    h, e = _tissue(class_name, field)
    # Sections are uneven: thickness across the tile, uptake from place to place of a slide.
    thickness = 1 + 0.06 * field.noise(80.0)
    uptake = slide.strength * rng.lognormal(0, 0.08, 2)
    amounts = np.stack([h * thickness, e * thickness], axis=-1).astype(np.float32)  # (S, S, 2)
    stains = uptake[:, None] * np.stack([slide.haematoxylin, slide.eosin])  # (2, 3)
    light = np.exp(-amounts @ stains.astype(np.float32)) * slide.light.astype(np.float32)
    focus = slide.blur * rng.lognormal(0, 0.25) / field.pixel  # in pixels
    if focus > 0.2:
        light = cv2.GaussianBlur(light, (0, 0), focus, borderType=cv2.BORDER_REFLECT_101)
    shade = 1 + 0.02 * field.noise(90.0)
    light = light * shade[..., None]
    noise = slide.noise * rng.standard_normal(light.shape, dtype=np.float32)
    return np.clip(np.rint(light * 255 + noise), 0, 255).astype(np.uint8)

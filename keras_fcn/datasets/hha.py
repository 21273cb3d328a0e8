"""HHA: depth as horizontal disparity, height above ground and angle with gravity.

Source: rcnn/saveHHA.m and mcg/depth_features/processDepthImage.m of s-gupta/rcnn-depth
(Gupta, Girshick, Arbelaez & Malik, 2014, section 2), of which this follows every
constant. Coordinates are the camera's: x to the right, y down, z into the scene.
"""

import math
from typing import NamedTuple

import numpy as np


class Camera(NamedTuple):
    """A pinhole camera.

    Args:
        focal: (x, y) focal lengths, in pixels.
        center: (x, y) of the optical axis, in pixels, the first of which is 1.
    """

    focal: tuple[float, float]
    center: tuple[float, float]


# The colour camera of NYUDv2, and as the reference's pictures of 560 x 425 are cropped.
NYUD_CAMERA = Camera(
    (518.85790117450188, 519.46961112127485), (325.58244941119034, 253.73616633400465)
)
NYUD_CROPPED = NYUD_CAMERA._replace(
    center=(NYUD_CAMERA.center[0] - 40, NYUD_CAMERA.center[1] - 45)
)
DOWN = np.array([0.0, 1.0, 0.0])  # where gravity points if the camera is level
RADII = (3, 10)  # pixels around each for normals: those of angles, those of gravity
THRESHOLDS = (45, 15)  # degrees from gravity or the horizon: what is floor or wall
ITERATIONS = 5  # for each threshold
UPRIGHT = 0.1  # degrees: a camera less tilted counts as level
LOWEST, LEVEL_GROUND = -90, -130  # cm: with nothing below the one, the ground is there
NEAREST = 100  # cm
DISPARITY = 31_000  # of 1 cm


def encode(depth, camera=NYUD_CROPPED, missing=None):
    """Encodes a depth map as an HHA picture.

    Args:
        depth: (height, width), metres, without holes (in-filled).
        camera: The `Camera` that took it.
        missing: (height, width) booleans, where the sensor had measured nothing: these
            pixels do not count in the normals of their neighbours.

    Returns:
        (height, width, 3) uint8, as in the channels of the reference's PNG files:
        disparity (31,000 / cm, of 100 cm at least), height (cm above the lowest point,
        or above 130 cm below a camera that sees nothing below 90), and the angle
        between gravity and the surface's normal away from the camera, plus 38 degrees:
        floors are 38, walls 128, ceilings 218. 0 where no normal is known.

    Raises:
        ValueError: If the depth is no such array, or not positive somewhere.
    """
    depth = np.asarray(depth, np.float64)
    sound = (depth > 0) & (depth < math.inf)
    if depth.ndim != 2 or not depth.size or not sound.all():
        raise ValueError(
            f"The depth map has shape {depth.shape} and values from "
            f"{depth.min(initial=math.inf):g} to {depth.max(initial=0):g}; expected "
            "(height, width), in metres, above 0 and finite. Fill its holes first."
        )
    if missing is None:
        missing = np.zeros(depth.shape, bool)
    z = 100 * depth
    rays = _rays(depth.shape, camera)
    points = rays * z[..., None]
    fine, coarse = (_normals(rays, z, points, missing, radius) for radius in RADII)
    down = gravity(coarse)
    tilt = math.degrees(math.acos(np.clip(down @ DOWN, -1, 1)))
    height = -points @ (down if tilt > UPRIGHT else DOWN)
    lowest = height.min()
    ground = LEVEL_GROUND if lowest > LOWEST else lowest
    angle = np.degrees(np.arccos(np.clip(fine @ down, -1, 1)))
    channels = [DISPARITY / np.maximum(z, NEAREST), height - ground, angle + 128 - 90]
    return _to_uint8(np.stack(channels, axis=-1))


def gravity(normals):
    """Estimates where gravity points: along floors' normals, across walls'.

    Args:
        normals: (..., 3) unit normals, NaN where unknown.

    Returns:
        (3,) unit vector; (0, 1, 0) if no normal is known.
    """
    normals = normals.reshape(-1, 3)
    normals = normals[np.isfinite(normals).all(axis=1)]
    down = DOWN
    for threshold in map(math.radians, THRESHOLDS):
        for _ in range(ITERATIONS):
            along = np.abs(normals @ down)
            floor = normals[along > math.cos(threshold)]
            wall = normals[along < math.sin(threshold)]
            if not len(floor) + len(wall):
                break
            _, vectors = np.linalg.eigh(wall.T @ wall - floor.T @ floor)
            found = vectors[:, 0]
            down = found if found @ down >= 0 else -found
    return down


def _rays(shape, camera):
    """Returns (height, width, 3): where each pixel looks, of z 1."""
    y, x = np.mgrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    (fx, fy), (cx, cy) = camera
    return np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(shape)], axis=-1)


def _normals(rays, z, points, missing, radius):
    """Fits a plane around each pixel: n . ray = 1 / z in least squares.

    Returns:
        (height, width, 3) unit normals that point away from the camera.
    """
    known = ~missing[..., None]
    products = rays[..., :, None] * rays[..., None, :]
    matrix = _box_sum((products.reshape(*z.shape, 9)) * known, radius)
    vector = _box_sum(rays / z[..., None] * known, radius)
    matrix = matrix.reshape(*z.shape, 3, 3)
    # The adjugate is the inverse but for a factor, which does not matter here.
    a, b, c = (matrix[..., i, :] for i in range(3))
    adjugate = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=-1)
    normal = (adjugate @ vector[..., None])[..., 0]
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing is known
        normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    away = (normal * points).sum(axis=-1, keepdims=True)
    return np.where(away < 0, -normal, normal)


def _box_sum(array, radius):
    """Sums (height, width, n) over windows of 2 radius + 1, zero outside."""
    for axis in (0, 1):
        length = array.shape[axis]
        widths = [(0, 0)] * array.ndim
        widths[axis] = (1, 0)
        sums = np.pad(np.cumsum(array, axis=axis), widths)
        places = np.arange(length)
        last = np.minimum(places + radius + 1, length)
        first = np.maximum(places - radius, 0)
        array = np.take(sums, last, axis=axis) - np.take(sums, first, axis=axis)
    return array


def _to_uint8(array):
    """Rounds halves up and saturates, as MATLAB does, for which NaN is 0."""
    return np.clip(np.floor(np.nan_to_num(array) + 0.5), 0, 255).astype(np.uint8)

"""HHA on planes whose distance, height and angle are known in closed form."""

import numpy as np
import pytest

from keras_fcn.datasets.hha import NYUD_CAMERA, NYUD_CROPPED, Camera, encode, gravity

SHAPE = (85, 112)
CAMERA = Camera((52.0, 51.0), (57.3, 41.9))


def rays(shape=SHAPE, camera=CAMERA):
    y, x = np.mgrid[: shape[0], : shape[1]] + 1.0
    (fx, fy), (cx, cy) = camera
    return np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(shape)], axis=-1)


def tilted(degrees):
    """Where gravity points in a camera that looks down by so many degrees."""
    radians = np.radians(degrees)
    return np.array([0, np.cos(radians), np.sin(radians)])


def distance(normal, offset):
    """Depth of the plane of points p with normal . p = offset; infinite behind."""
    along = rays() @ np.asarray(normal, float)
    return np.where(along > 1e-9, offset / np.where(along > 1e-9, along, 1), np.inf)


def room(degrees, floor=1.2, wall=3.0, ceiling=None):
    """Depth of a room, its points in cm, and which plane each pixel sees."""
    down = tilted(degrees)
    ahead = np.array([0, -np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])
    planes = [distance(down, floor), distance(ahead, wall)]
    if ceiling:
        planes.append(distance(-down, ceiling))
    depth = np.min(planes, axis=0)
    return depth, 100 * rays() * depth[..., None], np.argmin(planes, axis=0)


def inside(seen, plane, margin=4):
    """Pixels of a plane whose neighbours are all of that plane."""
    same = np.ones(seen.shape, bool)
    for dy in range(-margin, margin + 1):
        for dx in range(-margin, margin + 1):
            same &= np.roll(seen, (dy, dx), (0, 1)) == plane
    border = np.zeros(seen.shape, bool)
    border[margin:-margin, margin:-margin] = True
    return same & border


@pytest.mark.parametrize("degrees", [0, 5, 14, -8])
def test_a_room_has_the_disparity_height_and_angles_that_geometry_says(degrees):
    depth, points, seen = room(degrees, ceiling=0.9)
    found = encode(depth, CAMERA).astype(float)
    disparity = np.minimum(31_000 / np.maximum(100 * depth, 100), 255)
    np.testing.assert_allclose(found[..., 0], disparity, rtol=0, atol=0.51)
    height = -(points @ tilted(degrees))
    wanted = np.clip(height - height.min(), 0, 255)
    np.testing.assert_allclose(found[..., 1], wanted, rtol=0, atol=1.5)
    for plane, angle in enumerate((38, 128, 218)):
        where = inside(seen, plane)
        assert where.sum() > 100
        np.testing.assert_allclose(found[where][:, 2], angle, rtol=0, atol=1)


def test_above_a_table_the_ground_is_taken_to_be_130_cm_below():
    depth, points, _ = room(0, floor=0.6)
    found = encode(depth, CAMERA)[..., 1].astype(float)
    wanted = np.clip(130 - points[..., 1], 0, 255)
    # The edge between floor and wall bends gravity by half a degree.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4)


def test_a_slanted_plane_has_its_angle_beside_a_floor_that_outweighs_it():
    slope = np.array([0.0, 0.5, np.sqrt(0.75)])  # 60 degrees from a level floor
    planes = [distance([0, 1, 0], 1.2), distance(slope, 2.5)]
    depth, seen = np.min(planes, axis=0), np.argmin(planes, axis=0)
    depth = np.minimum(depth, 50)
    down = gravity(np.tile([0.0, 1.0, 0.0], (10, 1)))
    np.testing.assert_allclose(down, [0, 1, 0], atol=1e-9)
    found = encode(depth, CAMERA)
    where = inside(seen, 1)
    assert where.sum() > 100
    tilt = found[inside(seen, 0)][:, 2].astype(float).mean() - 38
    np.testing.assert_allclose(found[where][:, 2].astype(float), 98, atol=2 + abs(tilt))


def test_missing_pixels_do_not_bend_the_normals_around_them():
    depth, _, seen = room(5)
    missing = np.zeros(SHAPE, bool)
    missing[60:64, 40:44] = True
    spoiled = np.where(missing, 0.3, depth)
    clean = encode(depth, CAMERA)
    where = inside(seen, 0) & ~missing
    found = encode(spoiled, CAMERA, missing)[where][:, 2].astype(int)
    assert np.abs(found - clean[where][:, 2]).max() <= 1
    found = encode(spoiled, CAMERA)[where][:, 2].astype(int)
    assert np.abs(found - clean[where][:, 2]).max() > 20


def test_where_no_normal_is_known_the_angle_is_zero_as_in_matlab():
    missing = np.ones(SHAPE, bool)
    found = encode(np.full(SHAPE, 2.0), CAMERA, missing)
    assert not found[..., 2].any()
    assert (found[..., 0] == 155).all()


def test_gravity_lies_across_walls_where_there_is_no_floor():
    rng, down = np.random.default_rng(0), tilted(12)
    across = np.cross(down, rng.standard_normal((500, 3)))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    np.testing.assert_allclose(gravity(across), down, atol=1e-9)
    np.testing.assert_array_equal(gravity(np.full((5, 3), np.nan)), [0, 1, 0])


# Down or up alone: all that is seen is one plane, whose normals are exact.
BENEATH = Camera((52.0, 51.0), (57.3, -2.0))


def flat(below, degrees=0.0):
    """Depth of a floor so many metres below a camera that looks down by degrees."""
    along = rays(camera=BENEATH) @ tilted(degrees)
    return below / along


@pytest.mark.parametrize(("below", "height"), [(0.89, 41), (0.91, 0), (1.3, 0)])
def test_what_is_less_than_90_cm_below_is_no_ground_which_is_130_cm_below_then(
    below, height
):
    found = encode(flat(below), BENEATH)
    assert (found[..., 1] == height).all()


@pytest.mark.parametrize(("degrees", "level"), [(0.08, True), (0.12, False)])
def test_a_camera_counts_as_level_up_to_a_tenth_of_a_degree(degrees, level):
    depth = flat(1.3, degrees)
    found = encode(depth, BENEATH)[..., 1]
    raised = -100 * depth * rays(camera=BENEATH)[..., 1]
    wanted = raised - raised.min() if level else np.zeros(SHAPE)
    assert np.ptp(raised) > 2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.51)


def test_floors_are_38_and_ceilings_218():
    assert (encode(flat(1.3), BENEATH)[..., 2] == 38).all()
    above = Camera((52.0, 51.0), (57.3, 90.0))
    ceiling = -0.9 / rays(camera=above)[..., 1]
    assert (encode(ceiling, above)[..., 2] == 218).all()


def test_halves_are_rounded_up_as_in_matlab():
    for metres, disparity in [(4.96, 63), (1.2, 255), (1.24, 250), (310, 1), (700, 0)]:
        found = encode(np.full(SHAPE, metres), CAMERA)[..., 0]
        assert (found == disparity).all()


def test_the_cameras_are_that_of_the_reference_and_its_crop_which_is_the_default():
    focal = 518.85790117450188, 519.46961112127485
    assert NYUD_CAMERA == (focal, (325.58244941119034, 253.73616633400465))
    assert NYUD_CROPPED == (focal, (285.58244941119034, 208.73616633400465))
    depth = np.linspace(1, 3, 85 * 112).reshape(SHAPE)
    np.testing.assert_array_equal(encode(depth), encode(depth, NYUD_CROPPED))
    assert (encode(depth) != encode(depth, NYUD_CAMERA)).any()


def turned(*degrees):
    """Unit normals, turned by so many degrees from down to the right."""
    radians = np.radians(degrees)
    return np.stack([np.sin(radians), np.cos(radians), 0 * radians], axis=-1)


def test_what_lies_nearer_than_45_degrees_to_gravity_is_a_floor_and_else_a_wall():
    ahead = np.array([[0.0, 0.0, 1.0]])  # a wall, so that there is one solution
    for degrees, down in [(44.9, 44.9), (45.1, 45.1 - 90), (-44.9, -44.9)]:
        found = gravity(np.concatenate([turned(degrees), ahead]))
        np.testing.assert_allclose(found, turned(down)[0], atol=1e-9)


@pytest.mark.parametrize(("counted", "left_out"), [(14.9, 15.1), (75.1, 74.9)])
def test_what_is_15_degrees_off_floors_and_walls_counts_at_first_alone(
    counted, left_out
):
    floors, ahead = np.zeros(1000), np.array([[0.0, 0.0, 1.0]])
    for degrees, least in ((counted, 1e-5), (left_out, 0)):
        x, *_ = np.abs(gravity(np.concatenate([turned(degrees, *floors), ahead])))
        assert least <= x < 1e-3
    assert x < 1e-9


# The reference's steps, a pixel at a time, with its numbers


def plane(z, row, column, radius):
    """The normal of the plane through the pixels of a window, away from the camera."""
    window = tuple(slice(max(i - radius, 0), i + radius + 1) for i in (row, column))
    seen = rays(z.shape, BENEATH)[window].reshape(-1, 3)
    normal = np.linalg.lstsq(seen, 1 / z[window].ravel(), rcond=None)[0]
    normal /= np.linalg.norm(normal)
    return normal if normal @ rays(z.shape, BENEATH)[row, column] >= 0 else -normal


def down_of(normals):
    down = np.array([0.0, 1.0, 0.0])
    for degrees in [45] * 5 + [15] * 5:
        walls, floors = np.zeros((3, 3)), np.zeros((3, 3))
        for normal in normals:
            off = np.degrees(np.arccos(min(abs(normal @ down), 1)))
            if off < degrees:
                floors += np.outer(normal, normal)
            if off > 90 - degrees:
                walls += np.outer(normal, normal)
        values, vectors = np.linalg.eig(walls - floors)
        found = vectors[:, values.argmin()]
        down = found if found @ down >= 0 else -found
    return down


def test_gravity_is_found_in_five_steps_and_five_more():
    # All over the sphere, so that no step is the last to change anything.
    normals = np.random.default_rng(2).standard_normal((200, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    np.testing.assert_allclose(gravity(normals), down_of(normals), atol=1e-9)


def test_a_rough_surface_is_encoded_as_step_by_step():
    rng, shape = np.random.default_rng(0), (26, 34)
    z = 250 + np.cumsum(np.cumsum(rng.standard_normal(shape), axis=0), axis=1)
    places = list(np.ndindex(shape))
    down = down_of([plane(z, *place, 10) for place in places])
    fine = np.array([plane(z, *place, 3) for place in places]).reshape(*shape, 3)
    height = -(rays(shape, BENEATH) * z[..., None]) @ down
    assert height.min() < -90
    angle = np.degrees(np.arccos(fine @ down))
    channels = [31_000 / z, height - height.min(), angle + 38]
    wanted = np.clip(np.round(np.stack(channels, axis=-1)), 0, 255)
    np.testing.assert_array_equal(encode(z / 100, BENEATH), wanted)


def test_the_cropped_camera_sees_the_same_rays():
    whole = rays((480, 640), NYUD_CAMERA)[45:470, 40:600]
    np.testing.assert_allclose(rays((425, 560), NYUD_CROPPED), whole, atol=1e-12)


@pytest.mark.parametrize(
    "depth",
    [
        np.zeros((4, 4)),
        np.ones(4),
        np.full((4, 4), np.nan),
        np.where(np.eye(4), np.inf, 1),
    ],
)
def test_what_is_no_depth_map_is_refused(depth):
    with pytest.raises(ValueError, match="expected .height, width., in metres"):
        encode(depth)

import numpy as np
import pytest
from PIL import Image

from bpkd_sdk.data.public import CITYSCAPES_CLASSES
from bpkd_sdk.serve import draw_difference, draw_overlay, label_boundaries

PALETTE = ((60, 180, 200), (200, 100, 0), (255, 255, 255))  # all light enough for overlays
STEP = np.array([[0, 0, 1, 1]] * 3)


def grey(height, width, value=100):
    return np.full((height, width, 3), value, np.uint8)


def columns(line):
    """Return the columns that are True in every row."""
    return np.flatnonzero(line.all(axis=0)).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_colours_are_blended_by_alpha(dtype):
    mask = np.array([[0, 1, 2]], dtype)
    picture = draw_overlay(grey(1, 3), mask, PALETTE, boundaries=False, alpha=0.25)
    # 0.75 * 100 + 0.25 * (60, 200, 255): 90, 125, 138.75
    assert picture.tolist() == [[[90, 120, 125], [125, 100, 75], [139, 139, 139]]]
    assert picture.dtype == np.uint8


@pytest.mark.parametrize(("alpha", "value"), [(0, 100), (1, 200)], ids=["image", "colour"])
def test_alpha_goes_from_the_image_to_the_colour(alpha, value):
    picture = draw_overlay(grey(2, 2), np.ones((2, 2), int), PALETTE, alpha=alpha)
    assert (picture[..., 0] == value).all()


@pytest.mark.parametrize("ignore_index", [255, -1, 0])
def test_ignored_pixels_keep_the_image(ignore_index):
    mask = np.array([[1, ignore_index, 2]] * 2)
    picture = draw_overlay(grey(2, 3), mask, PALETTE, ignore_index=ignore_index, boundary_width=3)
    assert picture[0].tolist() == [[150, 100, 50], [100, 100, 100], [178, 178, 178]]


def test_a_mask_of_void_leaves_the_image_unchanged():
    image = grey(4, 5)
    np.testing.assert_array_equal(draw_overlay(image, np.full((4, 5), 255, np.uint8), PALETTE), image)


def test_a_palette_can_have_256_colours():
    palette = [(i, i, i) for i in range(256)]
    mask = np.arange(256, dtype=np.uint8)[None]
    picture = draw_overlay(grey(1, 256), mask, palette, boundaries=False, alpha=1, ignore_index=-1)
    assert len(np.unique(picture[0], axis=0)) == 256


def test_no_class_is_drawn_dark_and_no_two_alike():
    """Cityscapes has dark blue for three classes; here it and the others are drawn over a street at night."""
    palette = [*CITYSCAPES_CLASSES.values(), (0, 0, 0), (0, 0, 1)]
    mask = np.arange(len(palette), dtype=np.uint8)[None]
    street = grey(1, len(palette), 40)
    drawn = draw_overlay(street, mask, palette, boundaries=False)[0].astype(int)
    assert drawn.max(axis=1).min() > 70
    differences = np.abs(drawn[:, None] - drawn).max(axis=2) + 255 * np.eye(len(palette), dtype=int)
    assert differences.min() >= 8
    solid = draw_overlay(street, mask, palette, boundaries=False, alpha=1)[0].tolist()
    kept = CITYSCAPES_CLASSES["sidewalk"], CITYSCAPES_CLASSES["terrain"]
    assert [tuple(solid[list(palette).index(color)]) for color in kept] == list(kept)


def test_the_legend_has_the_colours_of_the_overlay():
    mask = np.repeat([0, 1], 20)[None].repeat(30, axis=0)
    dark = ((0, 0, 0), (0, 0, 70))
    picture = draw_overlay(grey(30, 40), mask, dark, boundaries=False, alpha=1, legend=True)
    strip = {tuple(color) for color in picture[30:].reshape(-1, 3).tolist()}
    assert {tuple(picture[0, 0].tolist()), tuple(picture[0, -1].tolist())} <= strip
    assert not strip & set(dark)


def test_boundaries_have_their_colour_and_width():
    picture = draw_overlay(grey(3, 4), STEP, PALETTE, boundary_width=2, boundary_color=(1, 2, 3))
    assert picture[1].tolist() == [[80, 140, 150], [1, 2, 3], [1, 2, 3], [150, 100, 50]]


@pytest.mark.parametrize(("width", "expected"), [(1, [3]), (2, [3, 4]), (3, [2, 3, 4]), (4, [2, 3, 4, 5])])
def test_a_boundary_surrounds_the_border(width, expected):
    mask = np.repeat([0, 1], 4)[None].repeat(5, axis=0)
    assert columns(label_boundaries(mask, width)) == expected
    assert columns(label_boundaries(mask.T, width).T) == expected


def test_the_boundary_of_a_square_is_closed_and_one_pixel_wide():
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 2:4] = 1
    assert label_boundaries(mask).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_void_has_no_boundary():
    assert not label_boundaries(np.array([[0, 255, 1]] * 3), width=3).any()
    beside = label_boundaries(np.array([[0, 0, 1, 255]] * 3), width=4)
    assert columns(beside) == [0, 1, 2]
    assert not beside[:, 3].any()


@pytest.mark.parametrize("width", [40, 160, 640])
def test_a_legend_is_a_strip_below_the_picture(width):
    image, mask = grey(30, width), np.zeros((30, width), np.uint8)
    mask[:, width // 2 :] = 2
    plain = draw_overlay(image, mask, PALETTE)
    picture = draw_overlay(image, mask, PALETTE, class_names=("sky", "road", "tree"), legend=True)
    assert picture.shape[1:] == (width, 3)
    np.testing.assert_array_equal(picture[:30], plain)
    strip = {tuple(color) for color in picture[30:].reshape(-1, 3).tolist()}
    assert PALETTE[0] in strip
    assert PALETTE[2] in strip
    assert PALETTE[1] not in strip


def test_a_legend_wraps_and_shows_ids_of_classes_without_names():
    mask = np.arange(3, dtype=np.uint8)[None].repeat(100, axis=0).repeat(20, axis=1)
    narrow = draw_overlay(grey(100, 60), mask, PALETTE, class_names=("a long name", "another"), legend=True)
    wide = draw_overlay(grey(100, 600), mask.repeat(10, axis=1), PALETTE, class_names=("a long name",), legend=True)
    assert narrow.shape[0] > wide.shape[0] > 100


def test_arguments_are_not_modified():
    image, mask = grey(8, 8), np.eye(8, dtype=np.uint8)
    mask[0, 0] = 255
    image.flags.writeable = mask.flags.writeable = False
    for picture in (draw_overlay(image, mask, PALETTE, legend=True), draw_difference(image, mask, mask.copy())[0]):
        assert picture.flags.owndata
        assert (image == 100).all()


def test_views_are_drawn_like_copies():
    image = np.random.default_rng(0).integers(0, 256, (3, 6, 7), np.uint8).transpose(1, 2, 0)
    mask = np.random.default_rng(0).integers(0, 3, (7, 6), np.uint8).T
    np.testing.assert_array_equal(
        draw_overlay(image[::-1], mask[::-1], PALETTE), draw_overlay(image[::-1].copy(), mask[::-1].copy(), PALETTE)
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": np.zeros((3, 4, 3))}, TypeError, "`image` to be uint8"),
        ({"image": Image.new("RGB", (4, 3))}, TypeError, r"`image` to be a numpy array, but got Image.* np.asarray\("),
        ({"mask": STEP.tolist()}, TypeError, "`mask` to be a numpy array, but got list"),
        ({"image": np.zeros((3, 4), np.uint8)}, ValueError, r"`image` of shape \(H, W, 3\)"),
        ({"mask": STEP.astype(float)}, TypeError, "`mask` to contain integer class ids, but got float64"),
        ({"mask": STEP == 1}, TypeError, "bool"),
        ({"mask": STEP[None]}, ValueError, r"`mask` of shape \(H, W\)"),
        ({"mask": STEP[:2]}, ValueError, r"size of the image, \(3, 4\), but got \(2, 4\)"),
        ({"mask": STEP * 7}, ValueError, r"ids \[7\], but `palette` has 3 colours"),
        ({"mask": STEP - 1}, ValueError, r"ids \[-1\]"),
        ({"mask": STEP * 255, "ignore_index": 0}, ValueError, r"ids \[255\]"),
        ({"palette": [(0, 0, 0)] * 257}, ValueError, "at most 256 colours, but got 257"),
        ({"alpha": 1.5}, ValueError, "`alpha` to be between 0 and 1, but got 1.5"),
        ({"alpha": float("nan")}, ValueError, "`alpha`"),
        ({"boundary_width": 0}, ValueError, "at least 1 pixel"),
    ],
)
def test_invalid_arguments_are_rejected(changes, error, message):
    arguments = {"image": grey(3, 4), "mask": STEP, "palette": PALETTE} | changes
    with pytest.raises(error, match=message):
        draw_overlay(**arguments)


def test_differences_near_edges_and_elsewhere_have_different_colours():
    teacher = np.zeros((10, 20), np.uint8)
    teacher[:, 10:] = 1
    student = teacher.copy()
    student[:5, 9] = 1  # beside the border: 5 pixels
    student[0, 0:2] = 2  # far from it: 2 pixels
    picture, difference = draw_difference(grey(10, 20), teacher, student, edge_width=3)
    assert difference.edge_share == 5 / 200
    assert difference.body_share == 2 / 200
    assert difference.share == pytest.approx(7 / 200)
    edge, body, dim = picture[0, 9].tolist(), picture[0, 0].tolist(), picture[9, 0].tolist()
    assert edge != body
    assert len(set(dim)) == 1
    assert (picture == edge).all(axis=2).sum() == 5
    assert (picture == body).all(axis=2).sum() == 2


def test_the_edge_band_is_that_of_the_label():
    teacher, student = np.zeros((2, 9, 9), np.uint8)
    student[:, 4] = 1
    label = np.zeros((9, 9), np.uint8)
    label[:, 5:] = 1
    assert draw_difference(grey(9, 9), teacher, student)[1].edge_share == 0
    assert draw_difference(grey(9, 9), teacher, student, label=label)[1].body_share == 0


def test_void_is_not_compared():
    teacher, student = np.zeros((2, 4, 4), np.uint8)
    label = np.full((4, 4), 255, np.uint8)
    label[0], student[:2] = 0, 1
    assert draw_difference(grey(4, 4), teacher, student, label=label)[1].share == 1
    assert draw_difference(grey(4, 4), teacher, student, label=np.full((4, 4), 255))[1].share == 0


def test_the_error_names_the_mask_with_the_wrong_size():
    with pytest.raises(ValueError, match="`student` to have the size of the image"):
        draw_difference(grey(3, 4), STEP, STEP[:2])


def test_the_error_for_another_size_states_how_to_resize():
    with pytest.raises(ValueError, match="Resize it with cv2.INTER_NEAREST_EXACT"):
        draw_overlay(grey(6, 8), STEP, PALETTE)

"""The predictor, compared with an independent computation in float64."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from bpkd_sdk.colors import distinct_colors
from bpkd_sdk.runtime import AcceptedImages, TorchRuntime
from bpkd_sdk.serve import Prediction, Predictor, Timings, draw_overlay
from tests.networks import tiny
from tests.serve.cases import CLASSES, NAMES, PALETTE, SIZE, exact_logits, network, scene


def starts(length, window):
    step = window * 2 // 3
    return sorted({min(start, length - window) for start in range(0, length, step)})


def windows(image, size):
    """Yield the top left corner and the pixels of every window."""
    for top, left in itertools.product(starts(image.shape[0], size[0]), starts(image.shape[1], size[1])):
        yield top, left, image[top : top + size[0], left : left + size[1]]


def averaged_logits(model, image, size):
    total, visits = np.zeros((CLASSES, *image.shape[:2])), np.zeros(image.shape[:2])
    for top, left, part in windows(image, size):
        total[:, top : top + size[0], left : left + size[1]] += exact_logits(model, part)
        visits[top : top + size[0], left : left + size[1]] += 1
    return total / visits


def probabilities(logits):
    shifted = np.exp(logits - logits.max(0))
    return shifted / shifted.sum(0)


def entropy(p):
    return -(p * np.log(p)).sum(0) / np.log(len(p))


def agreement(mask, expected):
    assert (mask.dtype, mask.shape) == (np.uint8, expected.shape)
    return (mask == expected).mean()


@pytest.mark.parametrize("size", [(48, 64), (33, 7), (1, 1), (130, 257)])
def test_masks_confidence_and_entropy(model, size):
    image = scene(*size)
    prediction = Predictor(model, "cpu")(image, confidence=True, entropy=True)
    p = probabilities(exact_logits(model, image))
    assert agreement(prediction.mask, p.argmax(0)) > 0.999
    np.testing.assert_allclose(prediction.confidence, p.max(0), atol=1e-5)
    np.testing.assert_allclose(prediction.entropy, entropy(p), atol=1e-5)
    assert prediction.confidence.dtype == prediction.entropy.dtype == np.float32
    assert (prediction.class_names, prediction.palette) == (NAMES, PALETTE)


def test_the_network_of_these_tests_predicts_every_class(model):
    assert (np.bincount(Predictor(model, "cpu")(scene(*SIZE)).mask.ravel()) > 50).all()


def test_probabilities_are_computed_only_on_request(model):
    predict, image = Predictor(model, "cpu"), scene(*SIZE)
    assert (predict(image).confidence, predict(image).entropy) == (None, None)
    assert predict(image, confidence=True).entropy is None
    assert predict(image, entropy=True).confidence is None


def test_a_network_with_one_class_predicts_background_and_class():
    model = network(1, class_names=("road",), palette=((1, 2, 3),))
    image = scene(*SIZE)
    prediction = Predictor(model, "cpu")(image, confidence=True, entropy=True)
    p = 1 / (1 + np.exp(-exact_logits(model, image)[0]))
    assert agreement(prediction.mask, p > 0.5) > 0.999
    assert set(np.unique(prediction.mask)) == {0, 1}
    np.testing.assert_allclose(prediction.confidence, np.maximum(p, 1 - p), atol=1e-5)
    np.testing.assert_allclose(prediction.entropy, entropy(np.stack([p, 1 - p])), atol=1e-5)
    assert (prediction.class_names, prediction.palette) == (("background", "road"), ((0, 0, 0), (1, 2, 3)))
    assert draw_overlay(image, prediction.mask, prediction.palette).shape == image.shape


def test_the_overlay_is_that_of_draw_overlay(model):
    image = scene(*SIZE)
    prediction = Predictor(model, "cpu")(image)
    options = {"alpha": 0.3, "boundary_width": 3, "boundary_color": (1, 2, 3), "legend": True}
    for arguments in ({}, options, {"boundaries": False}):
        expected = draw_overlay(image, prediction.mask, PALETTE, class_names=NAMES, **arguments)
        np.testing.assert_array_equal(prediction.overlay(**arguments), expected)
    with pytest.raises(ValueError, match="`alpha` to be between 0 and 1, but got 2"):
        prediction.overlay(alpha=2)


def test_the_overlay_shows_the_image_of_its_prediction(model, tmp_path):
    images = [scene(*SIZE, 0), scene(*SIZE, 1), scene(33, 7)]
    cv2.imwrite(str(tmp_path / "scene.png"), images[0][..., ::-1])
    predict = Predictor(model, "cpu")
    batch = predict([tmp_path / "scene.png", *images[1:]])
    for predictions in (batch, list(predict(iter(images)))):
        for prediction, image in zip(predictions, images, strict=True):
            np.testing.assert_array_equal(prediction.overlay(alpha=0, boundaries=False), image)
    assert batch[2].image is images[2]


def test_the_overlay_draws_class_255():
    mask, palette = np.full((8, 8), 255, np.uint8), ((0, 0, 0),) * 255 + ((230, 120, 40),)
    prediction = Prediction(scene(8, 8), mask, tuple(map(str, range(256))), palette, Timings(1, 1, 1))
    assert np.unique(prediction.overlay(alpha=1).reshape(-1, 3), axis=0).tolist() == [[230, 120, 40]]


def test_batches_give_the_same_masks_as_single_images(model, files, tmp_path):
    images = [scene(48, 64, 0), scene(48, 64, 1), scene(64, 48, 2), *(scene(48, 64, index) for index in range(3, 13))]
    cv2.imwrite(str(tmp_path / "scene.png"), images[2][..., ::-1])
    for predict in (Predictor(model, "cpu"), Predictor(files / "masks.onnx", "cpu")):
        alone = [predict(image).mask for image in images]
        mixed = [*images[:2], tmp_path / "scene.png", *images[3:]]
        for together in (predict(mixed), predict(tuple(mixed))):
            for prediction, mask in zip(together, alone, strict=True):
                np.testing.assert_array_equal(prediction.mask, mask)
        for prediction, mask in zip(predict(np.stack(images[3:])), alone[3:], strict=True):
            np.testing.assert_array_equal(prediction.mask, mask)
        assert predict([]) == []


def test_a_frame_is_read_when_its_prediction_is_requested(model):
    read = []

    def video():
        for index in range(3):
            read.append(index)
            yield scene(*SIZE, index)

    predict = Predictor(model, "cpu")
    predictions = predict(video(), confidence=True)
    assert read == []
    first = next(predictions)
    assert read == [0]
    np.testing.assert_array_equal(first.mask, predict(scene(*SIZE)).mask)
    assert first.confidence is not None
    assert len(list(predictions)) == 2


@pytest.mark.parametrize("size", [(48, 150), (101, 64), (90, 131)], ids=str)
def test_logits_of_fixed_size_are_averaged_over_windows(model, files, size):
    image = scene(*size)
    prediction = Predictor(files / "logits.onnx", "cpu")(image, confidence=True, entropy=True)
    p = probabilities(averaged_logits(model, image, SIZE))
    assert agreement(prediction.mask, p.argmax(0)) > 0.999
    np.testing.assert_allclose(prediction.confidence, p.max(0), atol=1e-4)
    np.testing.assert_allclose(prediction.entropy, entropy(p), atol=1e-4)


def test_masks_of_fixed_size_come_from_the_window_with_the_nearest_centre(model, files):
    image = scene(101, 131)
    masks = {(top, left): exact_logits(model, part).argmax(0) for top, left, part in windows(image, SIZE)}

    def owner(position, length, window):
        return max(starts(length, window), key=lambda start: (-abs(position + 0.5 - start - window / 2), start))

    expected = np.zeros(image.shape[:2], int)
    for row, column in np.ndindex(*expected.shape):
        top, left = owner(row, 101, SIZE[0]), owner(column, 131, SIZE[1])
        expected[row, column] = masks[top, left][row - top, column - left]
    assert agreement(Predictor(files / "masks.onnx", "cpu")(image).mask, expected) > 0.999


@pytest.mark.parametrize("name", ["masks.onnx", "logits.onnx"])
@pytest.mark.parametrize("size", [(20, 30), (1, 1), (40, 100)], ids=str)
def test_images_smaller_than_a_fixed_size_are_padded_with_the_mean_colour(model, files, name, size):
    image = scene(*size)
    padded = np.full((SIZE[0], max(size[1], SIZE[1]), 3), (124, 116, 104), np.uint8)
    padded[: size[0], : size[1]] = image
    prediction = Predictor(files / name, "cpu")(image)
    if size[1] <= SIZE[1]:
        expected = exact_logits(model, padded).argmax(0)[: size[0], : size[1]]
        assert agreement(prediction.mask, expected) > 0.999
    elif name == "logits.onnx":
        assert agreement(prediction.mask, averaged_logits(model, padded, SIZE).argmax(0)[: size[0]]) > 0.999
    assert prediction.mask.shape == size


def test_large_images_are_segmented_in_windows_of_1024(model):
    """The image has 4.3 million pixels; the limit without windows is 4.2 million."""
    image = cv2.resize(scene(60, 720), (7200, 600), interpolation=cv2.INTER_LINEAR)
    expected = averaged_logits(model, image, (600, 1024)).argmax(0)
    assert agreement(Predictor(model, "cpu")(image).mask, expected) > 0.999


def test_batches_are_padded_to_the_batch_size_of_the_runtime(model):
    runtime = TorchRuntime(model, "cpu")
    runtime.accepts = AcceptedImages((4, 4), *((side, side) for side in SIZE))
    images = [scene(*SIZE, index) for index in range(6)]
    for prediction, image in zip(Predictor(runtime)(images), images, strict=True):
        np.testing.assert_array_equal(prediction.mask, Predictor(model, "cpu")(image).mask)


@pytest.mark.parametrize("name", ["module", "logits.onnx", "masks.onnx"])
def test_calls_from_several_threads_give_the_same_masks(model, files, name):
    predict = Predictor(model if name == "module" else files / name, "cpu")
    images = [scene(*size, index) for index, size in enumerate([SIZE, (64, 48), (101, 131), SIZE])]
    alone = [predict(image).mask for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: predict(images[index % 4]).mask, range(64)))
    for index, mask in enumerate(together):
        np.testing.assert_array_equal(mask, alone[index % 4])


@pytest.mark.parametrize("size", [SIZE, (101, 131)], ids=["whole", "windows"])
def test_the_stages_add_up_to_the_latency(files, size):
    predict = Predictor(files / "masks.onnx", "cpu")
    images = [scene(*size, index) for index in range(5)]
    predict(images)
    start = time.perf_counter()
    predictions = predict(images)
    wall = 1000 * (time.perf_counter() - start)
    stages = [(timings.pre, timings.inference, timings.post) for timings in (each.timings for each in predictions)]
    assert min(map(min, stages)) > 0
    assert sum(map(sum, stages)) < wall
    assert [prediction.latency_ms for prediction in predictions] == pytest.approx(list(map(sum, stages)))


def test_missing_names_and_colours_have_defaults():
    classes = Predictor(tiny(3).eval(), "cpu")
    assert (len(classes.class_names), len(classes.palette)) == (256, 256)
    assert Predictor(network(), "cpu").class_names == ("0", "1", "2", "3", "4")
    assert len({(0, 0, 0), *distinct_colors(tuple(map(str, range(256))))}) == 257


def test_a_file_contains_names_and_colours(files):
    predict = Predictor(str(files / "masks.onnx"))
    assert (predict.class_names, predict.palette) == (NAMES, PALETTE)
    assert not predict.has_probabilities
    assert Predictor(files / "logits.onnx").has_probabilities


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda files: Predictor(network().train()), r"in training mode. Call model.eval\(\) first"),
        (lambda files: Predictor(network(300)), "at most 256 classes, but this network has 300"),
        (
            lambda files: Predictor(files / "masks.onnx")(scene(*SIZE), confidence=True),
            "returns masks, so it has neither confidence nor entropy. Use the checkpoint, or export it with argmax=False",
        ),
        (lambda files: Predictor(network())([scene(*SIZE), b"no image"]), "file of 8 bytes is none of them"),
    ],
    ids=["training mode", "classes", "masks only", "no image"],
)  # fmt: skip
def test_invalid_arguments_are_rejected(files, make, message):
    with pytest.raises(ValueError, match=message):
        make(files)


def test_a_frame_whose_array_is_filled_again_keeps_its_picture(model):
    buffer = np.zeros((48, 64, 3), np.uint8)

    def frames():
        for value in (50, 200):
            buffer[:] = value
            yield buffer

    first, second = Predictor(model, "cpu")(frames())
    assert (first.image == 50).all()
    assert (second.image == 200).all()

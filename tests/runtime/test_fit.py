"""Tests of the rule for images of sizes that an artifact does not accept, against each step written out."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bpkd_sdk
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.runtime import AcceptedImages, TorchRuntime
from bpkd_sdk.runtime.fit import FittedSize, fit_size, fitted_bands, fitted_masks
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.serve import Predictor
from bpkd_sdk.sizes import check_size
from tests.edges import Brightness, images_with_edges, mask_offsets
from tests.networks import tiny

SIZE = (48, 64)
FIXED = AcceptedImages((1, None), *((side, side) for side in SIZE))
ENGINE = AcceptedImages((1, 8), (32, 96), (32, 128))  # takes a range of sizes
ANY = AcceptedImages()


class MaskRuntime(TorchRuntime):
    """A network that returns masks, as a file with its argmax inside does."""

    def infer(self, inputs):
        return to_mask(super().infer(inputs))


def runtime_of(model, accepts=FIXED, masks=False):
    runtime = (MaskRuntime if masks else TorchRuntime)(model, "cpu")
    runtime.accepts = accepts
    runtime.metadata = runtime.metadata | {"argmax": masks}
    return runtime


@pytest.fixture(scope="module")
def model():
    network = tiny(5).eval()
    network.spec = bpkd_sdk.NetworkSpec(None, 5, mean=(0.2, 0.4, 0.6), std=(0.2, 0.3, 0.4))
    return network


def images_of(*size, count=1):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size[0] // 7 + 2, size[1] // 7 + 2, generator=generator)
    return (255 * F.interpolate(coarse, size, mode="bilinear")).to(torch.uint8)


def logits_of(model, images):
    normal = (images.float() / 255 - torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    with torch.no_grad():
        return F.interpolate(model(normal), images.shape[2:], mode="bilinear")


def padded(images):
    result = torch.tensor([51, 102, 153], dtype=torch.uint8).view(3, 1, 1).expand(len(images), 3, *SIZE).clone()
    result[:, :, : images.shape[2], : images.shape[3]] = images
    return result


def shrunk(images, size):
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "accepts", "fit", "inner", "window", "windows"),
    [
        pytest.param(SIZE, FIXED, "slide", SIZE, SIZE, 1, id="its own size"),
        pytest.param((100, 100), FIXED, "slide", (100, 100), SIZE, 6, id="windows: 3 rows of 2"),
        pytest.param((100, 20), FIXED, "slide", (100, 20), SIZE, 3, id="tall and narrow"),
        pytest.param((20, 30), FIXED, "slide", (20, 30), SIZE, 1, id="small"),
        pytest.param((100, 100), FIXED, "resize", SIZE, SIZE, 1, id="resized"),
        pytest.param((20, 30), FIXED, "resize", SIZE, SIZE, 1, id="enlarged"),
        pytest.param((96, 96), FIXED, "pad", (48, 48), SIZE, 1, id="letterbox"),
        pytest.param((20, 30), FIXED, "pad", (20, 30), SIZE, 1, id="padded at its own scale"),
        pytest.param((1, 1000), FIXED, "pad", (1, 64), SIZE, 1, id="a line keeps one pixel"),
        pytest.param((50, 70), ENGINE, "resize", (50, 70), (50, 70), 1, id="within a range"),
        pytest.param((192, 192), ENGINE, "resize", (96, 96), (96, 96), 1, id="range with its aspect ratio"),
        pytest.param((192, 16), ENGINE, "pad", (96, 8), (96, 32), 1, id="range, padded to the least"),
        pytest.param((192, 16), ENGINE, "slide", (192, 16), (96, 32), 3, id="range, windows"),
        pytest.param((4096, 2048), ANY, "slide", (4096, 2048), (1024, 1024), 18, id="windows of a large image"),
        pytest.param((4096, 4096), ANY, "resize", (2048, 2048), (2048, 2048), 1, id="a large image shrunk"),
        pytest.param((2048, 2048), ANY, "slide", (2048, 2048), (2048, 2048), 1, id="not yet large"),
    ],
)  # fmt: skip
def test_sizes_of_each_rule(size, accepts, fit, inner, window, windows):
    fitted = fit_size(size, accepts, fit)
    assert fitted == FittedSize(inner, window)
    assert len(fitted.corners()) == windows


@pytest.mark.parametrize("masks", [False, True], ids=["logits", "masks"])
@pytest.mark.parametrize(
    ("fit", "size", "inner"),
    [("resize", (70, 90), SIZE), ("resize", (30, 40), SIZE), ("pad", (100, 90), (48, 43)), ("pad", (30, 41), (30, 41))],
)
def test_outputs_return_to_the_size_of_the_image(model, fit, size, inner, masks):
    images = images_of(*size, count=2)
    logits = logits_of(model, padded(shrunk(images, inner)))[:, :, : inner[0], : inner[1]]
    expected = F.interpolate(logits, size, mode="bilinear").argmax(1)
    runtime = runtime_of(model, masks=masks)
    assert fitted_masks(runtime, images, fit).shape == (2, *size)
    if masks:
        rows, columns = (((2 * torch.arange(n) + 1) * m) // (2 * n) for n, m in zip(size, inner, strict=True))
        nearest = logits.argmax(1)[:, rows][:, :, columns]
        assert (fitted_masks(runtime, images, fit) == nearest).float().mean() > 0.97  # ties between two pixels
    else:
        assert (fitted_masks(runtime, images, fit) == expected).float().mean() > 0.999


@pytest.mark.parametrize("masks", [False, True], ids=["logits", "masks"])
@pytest.mark.parametrize("fit", ["slide", "resize", "pad"])
@pytest.mark.parametrize("size", [(70, 90), (96, 40), (30, 40)], ids=str)
def test_predictor_and_evaluation_give_the_same_masks(model, fit, size, masks):
    images = images_of(*size, count=2)
    runtime = runtime_of(model, masks=masks)
    expected = [prediction.mask for prediction in Predictor(runtime, fit=fit)(list(images.permute(0, 2, 3, 1).numpy()))]
    np.testing.assert_array_equal(EvaluationProtocol(fit).segment(runtime, images, batch_size=3), expected)
    any_size = EvaluationProtocol(fit, SIZE).segment(runtime_of(model, ANY, masks), images)
    if fit != "slide" or min(size) >= 64:  # a window that slides over a network of any size is no larger than the image
        np.testing.assert_array_equal(any_size, expected)


@pytest.mark.parametrize("masks", [False, True], ids=["logits", "masks"])
@pytest.mark.parametrize("fit", ["slide", "resize", "pad"])
@pytest.mark.parametrize("size", [(100, 30), (31, 31)], ids=str)
def test_masks_lie_on_the_edges_of_images(fit, size, masks):
    runtime = runtime_of(Brightness().eval(), masks=masks)
    for axis, images_size in enumerate((size, size[::-1])):
        images, places = images_with_edges(images_size, axis, margin=9)
        masks_of_images = fitted_masks(runtime, images, fit)
        assert abs(mask_offsets(masks_of_images, places, axis).mean()) < 0.1


@pytest.mark.parametrize("batch", [(1, 1), (4, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("masks", [False, True], ids=["logits", "masks"])
def test_batches_have_the_size_that_the_artifact_requires(model, batch, masks):
    images = images_of(60, 100, count=3)
    limited = runtime_of(model, AcceptedImages(batch, FIXED.height, FIXED.width), masks)
    for fit in ("slide", "resize"):
        assert torch.equal(
            fitted_masks(limited, images, fit), fitted_masks(runtime_of(model, masks=masks), images, fit)
        )


def test_many_windows_are_reported_once_with_the_faster_rules(model):
    runtime = runtime_of(model)
    with pytest.warns(
        UserWarning, match=r"on 9 windows of 48 x 64 for an image of 100 x 140.*fit='resize' or fit='pad'"
    ):
        list(fitted_bands(runtime, images_of(100, 140)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(fitted_bands(runtime, images_of(120, 140)))
        list(fitted_bands(runtime_of(model), images_of(120, 140), "pad"))
        list(fitted_bands(runtime_of(model), images_of(60, 100)))


def test_height_and_width_that_are_exchanged_are_reported(model):
    with pytest.warns(
        UserWarning, match=r"takes images of 48 x 64 \(height x width\), but an image is 64 x 48.*\(64, 48\)"
    ):
        list(fitted_bands(runtime_of(model), images_of(64, 48)))


def test_a_size_that_the_artifact_does_not_accept_is_refused(model):
    protocol = EvaluationProtocol(crop_size=(32, 32))
    with pytest.raises(
        ValueError, match=r"`crop_size` to be a size that Sequential accepts, 48 x 64 .*but got 32 x 32"
    ):
        protocol.segment(runtime_of(model), images_of(50, 50))


def test_averages_over_views_need_logits(model):
    with pytest.raises(ValueError, match=r"returns masks, but several `scales` or `flip` average logits"):
        EvaluationProtocol(flip=True).segment(runtime_of(model, masks=True), images_of(*SIZE))
    one_view = EvaluationProtocol(scales=(0.5,)).segment(runtime_of(model, ANY, masks=True), images_of(*SIZE))
    assert one_view.shape == (1, *SIZE)


@pytest.mark.parametrize("value", [64, (64,), (3, 64, 96), (64.0, 96.0), "64x96", (0, 8), (True, 8), None], ids=repr)
def test_what_is_not_a_size_is_refused(value):
    with pytest.raises(
        ValueError, match=r"Expected `input_size` to be \(height, width\), two whole numbers of at least 1"
    ):
        check_size("input_size", value)


def test_sizes_of_numpy_and_lists_become_tuples_of_ints():
    assert check_size("input_size", [np.int64(64), 96]) == (64, 96)
    assert check_size("input_size", torch.Size((64, 96))) == (64, 96)

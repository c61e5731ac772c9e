"""Predictor, HTTP service and page for images of four channels of 12 bits."""

import io
import re
import zipfile

import cv2
import gradio as gr
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.serve import Predictor, build_demo
from bpkd_sdk.serve.demo.file_tabs import write_zip
from bpkd_sdk.serve.networks import open_models
from bpkd_sdk.serve.service.limits import Limits
from tests.bands import band_scene
from tests.serve.cases import encoded, network, pixels, served

RULE = "Channels 2, 1, 0 of 4 (counted from 0) as red, green and blue, each scaled from its 2nd to its 98th percentile."
IMAGE, LABEL = band_scene(200)


def tiff(image):
    file = io.BytesIO()
    tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


@pytest.fixture(scope="module")
def predictor(bands):
    return Predictor(bands.onnx, "cpu")


def test_arrays_and_files_have_one_prediction(predictor, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(IMAGE))
    np.save(tmp_path / "a.npy", np.moveaxis(IMAGE, -1, 0))
    png = cv2.imencode(".png", cv2.cvtColor(IMAGE, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    expected = predictor(IMAGE).mask
    assert (expected == LABEL).mean() > 0.8
    for prediction in predictor([tmp_path / "a.tif", tmp_path / "a.npy", png, IMAGE.astype(np.float32)]):
        np.testing.assert_array_equal(prediction.mask, expected)


def test_the_overlay_is_drawn_over_the_chosen_bands(predictor):
    prediction = predictor(IMAGE)
    assert prediction.image.shape == (48, 48, 4)
    expected = PixelFormat(4, (0, 4095), (2, 1, 0)).picture(IMAGE)
    np.testing.assert_array_equal(prediction.picture, expected)
    np.testing.assert_array_equal(prediction.overlay(alpha=0, boundaries=False), expected)
    assert prediction.pixels.picture_rule == RULE


def test_images_of_another_size_are_segmented_in_windows(predictor):
    wide = np.concatenate([IMAGE, band_scene(201)[0]], axis=1)
    assert predictor(wide).mask.shape == (48, 96)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE[..., :3], r"\(H, W, 4\) or \(4, H, W\), but got the shape \(48, 48, 3\)"),
        (IMAGE * np.uint16(16), "outside of 0 to 4095"),
        ((IMAGE >> 4).astype(np.uint8), "pixels are uint8, but values of 0 to 4095 are expected"),
    ],
)
def test_other_channels_and_ranges_are_refused(predictor, image, message):
    with pytest.raises(ValueError, match=message):
        predictor(image)


def test_an_rgb_network_refuses_an_array_of_four_channels():
    rgb = Predictor(network(), "cpu")
    array = np.full((8, 8, 4), 100, np.uint8)
    with pytest.raises(ValueError, match=r"3 channels of 0 to 255, but got an array of 4 channels, \(8, 8, 4\)"):
        rgb(array)
    assert rgb(Image.fromarray(array)).image[0, 0].tolist() == [194] * 3  # over white, as before


def test_a_network_that_is_not_measured_yet_is_refused():
    import bpkd_sdk

    with pytest.raises(ValueError, match="mean and the standard deviation of the network's 4 channels are not known"):
        Predictor(bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 2, in_channels=4).eval())


def test_the_service_takes_tiff_and_npy_files_with_original_values(bands, predictor):
    with served(bands.onnx, limits=Limits(max_pixels=100_000)) as server:
        mask = pixels(server.segment(tiff(IMAGE), params={"format": "mask"}))
        np.testing.assert_array_equal(mask, predictor(IMAGE).mask)
        npy = io.BytesIO()
        np.save(npy, IMAGE)
        overlay = pixels(server.segment(npy.getvalue(), params={"format": "overlay"}))
        np.testing.assert_array_equal(overlay, predictor(IMAGE).overlay())
        (model,) = server.client.get("/v1/models").json()
        assert (model["channels"], model["value_range"], model["pictures"]) == (4, [0, 4095], RULE)
        assert model["formats"] == ["TIFF", "NPY", "PNG"]
        refused = {
            415: encoded(np.zeros((8, 8, 3), np.uint8), "JPEG"),
            413: tiff(np.zeros((400, 400, 4), np.uint16)),
            422: tiff(IMAGE[..., :2]),
        }
        for status, content in refused.items():
            answer = server.segment(content)
            assert answer.status_code == status, answer.text


def test_an_rgb_network_refuses_a_tiff_file_as_before(model):
    with served(model) as server:
        assert server.segment(tiff(IMAGE)).status_code == 415


def test_the_page_shows_the_bands_and_states_them(bands, predictor, tmp_path):
    page = build_demo(open_models([bands.onnx], device="cpu"), examples=bands.root)
    (photo,) = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == "photo"]
    assert isinstance(photo, gr.File)
    assert photo.file_types == [".tif", ".tiff", ".npy", ".png"]
    texts = [block.value for block in page.blocks.values() if isinstance(block, gr.Markdown)]
    assert any("A video has three channels of 8 bits" in text for text in texts)
    (tmp_path / "field.tif").write_bytes(tiff(IMAGE))
    (open_,) = {function.fn for function in page.fns.values() if getattr(function.fn, "__name__", "") == "_open"}
    updates = open_(str(tmp_path / "field.tif"), bands.onnx.name, 0.5, 2)
    texts = [value for value in updates.values() if isinstance(value, str)]
    assert any(RULE in text for text in texts)
    (slider,) = [value for block, value in updates.items() if getattr(block, "elem_id", None) == "overlay"]
    shown = np.asarray(Image.open(slider["value"][0]))
    expected = np.kron(predictor(IMAGE).picture.mean(2), np.ones((26, 26)))
    assert np.corrcoef(shown.mean(2).ravel(), expected.ravel())[0, 1] > 0.8


def test_many_images_are_segmented_into_a_zip_file(predictor, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(IMAGE))
    (tmp_path / "b.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8)))
    images = [tmp_path / "a.tif", tmp_path / "b.png"]
    problems = list(write_zip(tmp_path / "all.zip", images, predictor, 0.5, 1, Limits()))
    assert problems[0] is None
    assert re.search(r"b.png was skipped: .*\(4, H, W\), but got the shape \(8, 8, 3\)", problems[1])
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        mask = np.asarray(Image.open(archive.open("masks/a.png")))
    np.testing.assert_array_equal(mask, predictor(IMAGE).mask)


def test_networks_of_other_images_are_not_shown_beside_each_other(bands):
    models = build_models(bands.onnx, network(2))
    assert [model.name for model in models.students] == ["student.onnx"]
    assert "takes images of 3 channels of 0 to 255, but student.onnx takes 4 channels of 0 to 4095" in (
        models.unavailable[0].reason
    )


def build_models(*sources):
    from bpkd_sdk.serve.networks import reorder_models

    return reorder_models(open_models(sources, device="cpu"))


def test_frames_of_a_video_are_refused(predictor):
    with pytest.raises(ValueError, match="an image of 4 channels of 0 to 4095"):
        next(predictor(iter([np.zeros((48, 48, 3), np.uint8)])))


def test_probabilities_come_from_the_checkpoint(bands):
    prediction = Predictor(bands.run.checkpoint, "cpu")(IMAGE, confidence=True)
    assert prediction.confidence.min() >= 0.5
    assert torch.from_numpy(prediction.confidence).isfinite().all()

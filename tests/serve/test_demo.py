"""The parts of the demo page. test_browser.py tests the page itself."""

import inspect
import io
import re
import struct
import zipfile
import zlib
from dataclasses import replace

import cv2
import gradio as gr
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image, PngImagePlugin

import bpkd_sdk
from bpkd_sdk.colors import overlay_colors
from bpkd_sdk.data import shapes
from bpkd_sdk.data.pairs import Pair
from bpkd_sdk.files import SHAPES_TEACHER
from bpkd_sdk.progress import format_si
from bpkd_sdk.serve import Predictor, Timings, build_demo, draw_overlay
from bpkd_sdk.serve.demo import headline, page_options, tables
from bpkd_sdk.serve.demo.confidence import ExampleCheck
from bpkd_sdk.serve.demo.examples import MAX_EXAMPLES, find_examples, generate_examples
from bpkd_sdk.serve.demo.file_tabs import write_zip
from bpkd_sdk.serve.demo.scene import PAGE_SIDE, Scene, draw_full_size, resize_to_page
from bpkd_sdk.serve.demo.uploads import STATE_MEMORY
from bpkd_sdk.serve.networks import ModelSet, ServedModel, UnavailableModel, open_models, reorder_models
from bpkd_sdk.serve.service.limits import Limits
from tests.serve import colors
from tests.serve.cases import CountingPredictor, encoded, scene

LIMITS = Limits(max_upload_bytes=200_000, max_pixels=1_000_000)


def bomb(side):
    """Return a small PNG file whose header states this side."""
    png = bytearray(encoded(Image.new("L", (1, 1))))
    struct.pack_into(">II", png, 16, side, side)
    struct.pack_into(">I", png, 29, zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.fixture
def networks():
    return [ServedModel(name, CountingPredictor(getattr(colors, name)(), "cpu")) for name in ("teacher", "student")]


def open_scene(folder, image, label=None):
    (folder / "street.png").write_bytes(encoded(image))
    if label is None:
        return Scene.open(folder / "street.png", LIMITS)
    (folder / "label.png").write_bytes(encoded(label))
    return Scene.open(folder / "street.png", LIMITS).with_label(folder / "label.png")


def numbers(html):
    """Return the texts of the cells of each row, by the name of the row."""
    rows = re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", html)
    return {
        re.sub("<.*?>", "", name): [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", cells)]
        for name, cells in rows
    }


class TestScene:
    def test_every_network_runs_once_per_image(self, tmp_path, networks):
        first = open_scene(tmp_path, scene(60, 80)).with_predictions(networks[:1])
        both = first.with_predictions(networks)
        for alpha, width in ((0.2, 0), (0.8, 3)):
            both.overlay("teacher", alpha, width)
            both.boundaries("student", width)
            both.full_size_overlay("student", alpha, width)
        both.difference("teacher", "student")
        assert [network.predictor.calls for network in networks] == [1, 1]

    def test_masks_are_those_of_the_predictor(self, tmp_path, networks):
        image = scene(60, 80)
        cached = open_scene(tmp_path, image).with_predictions(networks).predictions["student"]
        expected = networks[1].predictor(image)
        np.testing.assert_array_equal(cached.mask, expected.mask)
        download = Image.open(io.BytesIO(cached.png))
        assert download.mode == "P"
        assert tuple(download.getpalette()[3:6]) == expected.palette[1]

    def test_pictures_have_the_size_of_the_page(self, tmp_path, networks):
        both = open_scene(tmp_path, scene(60, 80)).with_predictions(networks)
        pictures = [
            both.overlay(None, 0.5, 1),
            both.overlay("teacher", 0.5, 1),
            both.boundaries("student", 1),
            both.difference("teacher", "student")[0],
        ]
        assert {picture.shape for picture in pictures} == {(16 * 60, 16 * 80, 3)}

    def test_overlays_are_those_of_draw_overlay(self, tmp_path, networks):
        image = scene(60, 80)
        both = open_scene(tmp_path, image).with_predictions(networks)
        mask = networks[0].predictor(image).mask
        full = both.full_size_overlay("teacher", 0.3, 0)
        np.testing.assert_array_equal(full, draw_overlay(image, mask, colors.PALETTE, alpha=0.3, boundaries=False))
        large = cv2.resize(mask, None, fx=16, fy=16, interpolation=cv2.INTER_NEAREST)
        on_page = both.overlay("teacher", 1, 0)
        np.testing.assert_array_equal(on_page, np.array(overlay_colors(colors.PALETTE), np.uint8)[large])

    @pytest.mark.parametrize(("side", "lines"), [(PAGE_SIDE // 8, 1), (PAGE_SIDE, 3), (2 * PAGE_SIDE, 6)])
    def test_lines_have_the_same_relative_width_as_on_the_page(self, side, lines):
        mask = np.repeat([0, 1], side // 2)[None].repeat(20, axis=0)
        picture = draw_full_size(np.zeros((20, side, 3), np.uint8), mask, ((0, 0, 0), (0, 0, 9)), 0.5, 3)
        assert (picture[10] == 255).all(1).sum() == lines

    def test_a_label_that_does_not_match_the_image_is_rejected(self, tmp_path):
        with pytest.raises(ValueError, match=r"The label is 50 x 80 pixels \(height x width\) and the image 60 x 80"):
            open_scene(tmp_path, scene(60, 80), np.zeros((50, 80), np.uint8))
        with pytest.raises(ValueError, match="^The label: contains colours"):
            open_scene(tmp_path, scene(60, 80), scene(60, 80))
        with pytest.raises(ValueError, match="ids of 0 to 255 in the label, but got 300"):
            open_scene(tmp_path, scene(60, 80), np.full((60, 80), 300, np.uint16))

    def test_format_and_size_of_a_label_are_checked_before_it_is_decoded(self, tmp_path, monkeypatch):
        street = open_scene(tmp_path, scene(60, 80))
        path = tmp_path / "label.png"
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("it was decoded"))
        for content, message in [
            (
                encoded(Image.new("L", (9000, 9000))),
                "The label is 9000 x 9000 pixels .height x width. and the image 60 x 80",
            ),
            (bomb(100_000), "The label cannot be read: Image size .* exceeds limit"),
            (encoded(Image.new("L", (80, 60)), "TIFF"), "^The label is not a PNG file.$"),
            (b"no image", "^The label is not a PNG file.$"),
            (encoded(scene(60, 80))[:20], "^The label "),
        ]:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message):
                street.with_label(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (encoded(Image.new("1", (1001, 1000))), "at most 1,000,000 pixels"),
            (encoded(Image.new("1", (10_000, 1))), "1 x 10000 is too long and thin"),
            (bytes(200_001), "at most 200,000 bytes, but got 200,001"),
            (encoded(Image.new("L", (8, 8)), "TIFF"), "formats JPEG, PNG, WEBP, BMP"),
        ],
        ids=["pixels", "thin", "bytes", "format"],
    )
    def test_the_limits_of_the_service_apply(self, tmp_path, content, message):
        (tmp_path / "image.png").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Scene.open(tmp_path / "image.png", LIMITS)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((48, 64), (960, 1280)), ((500, 700), (500, 700)), ((2000, 4000), (640, 1280)), ((1, 5000), (1, 1280))],
    )
    def test_small_images_are_enlarged_by_integers_and_large_images_reduced(self, size, expected):
        assert resize_to_page(np.zeros(size, np.uint8), cv2.INTER_NEAREST).shape == expected
        assert resize_to_page(np.zeros((*size, 3), np.uint8)).shape == (*expected, 3)


class TestTables:
    def test_the_legend_has_the_order_of_the_classes(self, tmp_path, networks):
        both = open_scene(tmp_path, scene(60, 80)).with_predictions(networks)
        names = re.findall(r"</span>(.*?)</li>", tables.caption(both.predictions, both.size))
        assert names == [name for name in colors.COLORS if name in names]
        masks = [prediction.mask for prediction in both.predictions.values()]
        assert len(names) == len(np.unique(masks))
        assert "60 x 80 pixels (height x width)" in tables.caption(both.predictions, both.size)
        # A class of the second mask alone has its place too.
        first = replace(both.predictions["teacher"], page_mask=np.full((4, 4), 3, np.uint8))
        second = replace(first, page_mask=np.array([[4, 0]], np.uint8))
        names = re.findall(r"</span>(.*?)</li>", tables.caption({"a": first, "b": second}, (4, 4)))
        assert names == ["shadow", "plants", "bricks"]

    def test_areas_and_agreement_are_counted_over_all_pixels(self, tmp_path, networks):
        both = open_scene(tmp_path, scene(60, 80)).with_predictions(networks)
        teacher, student = (both.predictions[name].mask for name in ("teacher", "student"))
        rows = numbers(tables.classes_table(both.predictions))
        assert rows
        for name, cells in rows.items():
            in_teacher, in_student = (
                teacher == list(colors.COLORS).index(name),
                student == list(colors.COLORS).index(name),
            )
            agreement = (in_teacher & in_student).sum() / (in_teacher | in_student).sum()
            assert cells == [f"{share:.1%}" for share in (in_teacher.mean(), in_student.mean(), agreement)]
        alone = numbers(tables.classes_table({"student": both.predictions["student"]}))
        assert all(len(cells) == 1 for cells in alone.values())

    def test_errors_are_the_scores_of_evaluate(self, tmp_path, networks):
        image, label = scene(60, 80), shapes.render(0, "val", 0, (60, 80))[1] % 5
        label[:10] = 255

        class OneImage(bpkd_sdk.SegmentationDataset):
            name, class_names, palette = "one", tuple(colors.COLORS), colors.PALETTE
            __len__ = lambda self: 1  # noqa: E731
            __getitem__ = lambda self, _: (torch.tensor(image).permute(2, 0, 1), torch.tensor(label))  # noqa: E731

        labelled = open_scene(tmp_path, image, label).with_predictions(networks)
        scores = bpkd_sdk.evaluate(colors.student(), OneImage(), boundary_width=3, device="cpu")
        assert numbers(tables.errors_table({"student": labelled.predictions["student"]}, label))["student"] == [
            f"{value:.1%}"
            for value in (
                scores.miou, scores.boundary_iou, scores.pixel_accuracy, scores.edge_accuracy, scores.body_accuracy
            )
        ]  # fmt: skip

    def test_undefined_scores_are_blank(self, tmp_path, networks):
        labelled = open_scene(tmp_path, scene(60, 80), np.zeros((60, 80), np.uint8)).with_predictions(networks)
        *_, pixels, edge, body = numbers(tables.errors_table(labelled.predictions, labelled.label))["teacher"]
        assert edge == "–"  # the label has no edge
        assert body != "–"
        assert pixels != "–"

    def test_costs_are_relative_to_the_teacher(self, tmp_path):
        small, large = torch.nn.Conv2d(3, 2, 1, bias=False).eval(), torch.nn.Conv2d(3, 20, 1, bias=False).eval()
        models = open_models([large, small, tmp_path / "none.onnx"], device="cpu")
        rows = numbers(tables.cost_table(models, (100, 200)))
        teacher, student, missing = rows.values()
        assert teacher[:2] == ["60", "1.20 M"]
        assert student[:2] == ["610.0× less", "120 k10.0× less"]
        assert teacher[2:] == ["–", "–", "CPU"]
        assert missing[0].startswith("Not available: There is no ONNX file")

    def test_names_and_reasons_are_escaped(self):
        html = tables.cost_table(ModelSet(None, (), (UnavailableModel("<script>", "<img src=x>"),)), (8, 8))
        assert "<script>" not in html
        assert "<img" not in html


class Bright(torch.nn.Module):
    """A network of two classes that is the more confident the brighter an image is."""

    spec = bpkd_sdk.NetworkSpec(None, 2, class_names=("a", "b"), mean=(0, 0, 0), std=(1, 1, 1))

    def forward(self, images):
        brightness = images.mean(1, keepdim=True)
        return torch.cat([4 * brightness, 0 * brightness], 1)


class MasksOnly(Predictor):
    """A predictor of a file that contains no probabilities."""

    has_probabilities = False


class TestExampleCheck:
    @pytest.fixture
    def examples(self, tmp_path):
        pairs = [Pair(tmp_path / f"{value}.png", None) for value in (160, 170, 180, 190)]
        for pair in pairs:
            pair.image.write_bytes(encoded(np.full((8, 8, 3), int(pair.image.stem), np.uint8)))
        return pairs

    @pytest.fixture
    def bright(self):
        return ServedModel("bright", Predictor(Bright().eval(), "cpu"))

    @pytest.mark.parametrize(("value", "is_unlike"), [(250, False), (175, False), (155, True), (60, True)])
    def test_an_image_with_less_confidence_than_the_examples_is_unlike_them(
        self, tmp_path, examples, bright, value, is_unlike
    ):
        image = open_scene(tmp_path, np.full((8, 8, 3), value, np.uint8))
        judgement = ExampleCheck(ModelSet(None, (bright,)), examples).judge(image, "bright")
        assert judgement.is_unlike is is_unlike
        assert judgement.confidence == pytest.approx(1 / (1 + np.exp(-4 * value / 255)), abs=1e-4)
        text = headline.judgement_text(judgement)
        assert ("seems to be unlike the examples" in text) is is_unlike
        assert f"{judgement.confidence:.0%} confident" in text
        assert "on the 4 examples" in text

    def test_noise_is_unlike_generated_scenes(self, tmp_path):
        teacher = open_models([], teacher=SHAPES_TEACHER, device="cpu").teacher
        check = ExampleCheck(ModelSet(None, (teacher,)), generate_examples(tmp_path))
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
        for image, is_unlike in ((noise, True), (shapes.render(0, "test", 0)[0], False)):
            assert check.judge(open_scene(tmp_path, image), teacher.name).is_unlike is is_unlike

    def test_a_file_of_masks_is_judged_by_another_network(self, tmp_path, examples, bright):
        masks = ServedModel("masks", MasksOnly(Bright().eval(), "cpu"))
        image = open_scene(tmp_path, np.full((8, 8, 3), 60, np.uint8))
        for models in (ModelSet(bright, (masks,)), ModelSet(None, (masks, bright))):
            assert ExampleCheck(models, examples).judge(image, "masks").network == "bright"
        alone = ExampleCheck(ModelSet(None, (masks,)), examples).judge(image, "masks")
        assert "masks without probabilities" in alone
        assert "is not known" in headline.judgement_text(alone)

    def test_a_few_examples_are_not_enough(self, tmp_path, examples, bright):
        image = open_scene(tmp_path, np.full((8, 8, 3), 60, np.uint8))
        assert "at least 4 examples" in ExampleCheck(ModelSet(None, (bright,)), examples[:3]).judge(image, "bright")


def figures(html):
    """Return the cards of a headline: name, number, and the text below it."""
    return re.findall(r"<li><span>(.*?)</span><b>(.*?)</b><span>(.*?)</span></li>", html)


class TestHeadline:
    def test_it_states_what_the_student_costs_and_keeps(self, tmp_path, networks):
        both = open_scene(tmp_path, scene(60, 80)).with_predictions(networks)
        models = ModelSet(networks[0], (networks[1],))
        macs, latency, whole, edge = figures(headline.headline(models, "student", both))
        assert latency == ("Latency on this server", "…", "being measured")
        for network, milliseconds in zip(networks, (42.0, 12.0), strict=True):
            network.latency[60, 80] = Timings(1, milliseconds - 2, 1)
        macs, latency, whole, edge = figures(headline.headline(models, "student", both))
        teacher_macs, student_macs = (network.cost((60, 80))[1] for network in networks)
        assert macs[:2] == ("MACs for this image", f"{teacher_macs / student_macs:.1f}× fewer")
        assert macs[2] == f"{format_si(student_macs)} instead of {format_si(teacher_macs)}"
        assert latency == ("Latency on this server", "3.5× faster", "12.0 ms instead of 42.0 ms")
        teacher, student = (both.predictions[name].mask for name in ("teacher", "student"))
        assert whole[1] == f"{(teacher == student).mean():.1%}"
        window = np.ones((7, 7), np.uint8)
        band = cv2.dilate(teacher, window) != cv2.erode(teacher, window)
        assert edge[1] == f"{(teacher == student)[band].mean():.1%}"

    def test_a_student_that_is_slower_is_called_slower(self, tmp_path, networks):
        both = open_scene(tmp_path, scene(60, 80)).with_predictions(networks)
        for network, milliseconds in zip(networks, (10.0, 20.0), strict=True):
            network.latency[60, 80] = Timings(1, milliseconds - 2, 1)
        _, latency, *_ = figures(headline.headline(ModelSet(networks[0], (networks[1],)), "student", both))
        assert latency[1:] == ("2.0× slower", "20.0 ms instead of 10.0 ms")

    def test_what_is_not_known_is_not_stated(self, tmp_path, networks, monkeypatch):
        monkeypatch.setattr(ServedModel, "cost", lambda *_: (None, None))
        both = open_scene(tmp_path, scene(60, 80)).with_predictions(networks)
        pair = ModelSet(networks[0], (networks[1],))
        macs, *_ = figures(headline.headline(pair, "student", both))
        assert macs == ("MACs for this image", "–", "unknown for student and teacher")
        networks[0].latency[60, 80] = Timings(1, 2, 1)
        _, latency, *_ = figures(headline.headline(pair, "student", both, is_measured=True))
        assert latency == ("Latency on this server", "–", "could not be measured for student")
        alone = headline.headline(ModelSet(None, (networks[1],)), "student", both)
        assert [figure[1:] for figure in figures(alone)] == [("–", "unknown for student"), ("…", "being measured")]
        assert "There is no teacher to compare with" in alone

    def test_windows_are_stated_where_their_costs_count(self, tmp_path, networks, files):
        one_size = open_models([files / "masks.onnx"], device="cpu").students[0]
        height, width = one_size.predictor.runtime.accepts.fixed_size
        models, size = ModelSet(networks[0], (one_size,)), (2 * height, width)
        image = open_scene(tmp_path, scene(*size)).with_predictions(models.available)
        sentence = f"{one_size.name} runs in 3 windows of {height} x {width}, all of which count."
        assert one_size.cost(size)[1] == 3 * one_size.cost((height, width))[1]
        for html in (headline.headline(models, one_size.name, image), tables.cost_table(models, size)):
            assert sentence in html
        assert "windows" not in tables.cost_table(models, (height, width))

    def test_title_and_description_are_those_of_the_networks(self, networks, model, files):
        teacher, student = networks
        assert headline.title(ModelSet(teacher, (student,))) == "student compared with teacher"
        assert headline.title(ModelSet(teacher, (student, student))) == "2 networks compared with teacher"
        page = build_demo(ModelSet(None, (ServedModel("<b>", student.predictor),)))
        (header,) = [block.value for block in page.blocks.values() if getattr(block, "elem_id", None) == "header"]
        assert header.startswith("<h1>&lt;b&gt;</h1>")
        assert "one of 5 classes: shadow, asphalt, sky, plants, bricks. Device: CPU." in header

    def test_the_exported_file_is_chosen_before_its_checkpoint(self, model, files):
        page = build_demo(open_models([model, files / "masks.onnx"], device="cpu"))
        (choice,) = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown)]
        assert choice.value == "masks.onnx"
        assert [name for name, _ in choice.choices] == ["masks.onnx", "Sequential"]


class TestModelSet:
    def test_a_student_with_other_classes_is_not_compared(self, networks, model):
        teacher, student = networks
        models = reorder_models(ModelSet(teacher, (student, ServedModel("other", Predictor(model, "cpu")))))
        assert models.students == (student,)
        assert [model.name for model in models.pair("student")] == ["teacher", "student"]
        (other,) = models.unavailable
        assert other.name == "other"
        assert "has 5 classes (a, b, c, ...), but the teacher has 5 classes (shadow" in other.reason

    @pytest.mark.parametrize("teacher", [None, "none.onnx"])
    def test_students_are_shown_alone_without_a_teacher(self, networks, model, teacher):
        students = [*(network.predictor for network in networks), Predictor(model, "cpu")]
        models = reorder_models(open_models(students, teacher=teacher, device="cpu"))
        assert models.teacher is None
        assert [student.predictor for student in models.students] == students
        assert models.pair(models.students[1].name) == (models.students[1],)

    def test_a_teacher_without_students_is_shown_alone(self, networks):
        page = build_demo(ModelSet(networks[0], (), (UnavailableModel("none.onnx", "no file"),)))
        (choice,) = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown)]
        assert choice.choices == [("teacher", "teacher")]

    def test_no_source_is_an_error(self):
        with pytest.raises(ValueError, match="got neither"):
            open_models([])


class TestExamples:
    def test_a_folder_of_images(self, tmp_path):
        for index in range(2 * MAX_EXAMPLES + 1):
            (tmp_path / f"{index:02}.png").write_bytes(encoded(scene(32, 32)))
        pairs = find_examples(tmp_path)
        assert [pair.image.stem for pair in pairs[:3]] == ["00", "03", "06"]
        assert len(pairs) <= MAX_EXAMPLES
        assert all(pair.label is None for pair in pairs)

    def test_a_folder_with_labels(self, tmp_path):
        for name in ("images", "labels"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.png").write_bytes(encoded(scene(32, 32)))
        (pair,) = find_examples(tmp_path)
        assert pair.label == tmp_path / "labels" / "a.png"

    def test_generated_scenes_have_labels(self, tmp_path):
        pairs = generate_examples(tmp_path)
        assert len(pairs) == MAX_EXAMPLES
        image, label = shapes.render(0, "val", 1)
        np.testing.assert_array_equal(np.asarray(Image.open(pairs[1].image)), image)
        np.testing.assert_array_equal(np.asarray(Image.open(pairs[1].label)), label)


def test_the_zip_file_contains_all_images_that_can_be_read(tmp_path, networks):
    names = ["a/x.png", "b/x.png", "b/x_1.png", "c/x.png", "b/text.png", "b/large.png"]
    paths = [tmp_path / name for name in names]
    for index, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(scene(40, 50, index)))
    paths[4].write_text("no image")
    paths[5].write_bytes(encoded(Image.new("1", (1001, 1000))))
    problems = list(write_zip(tmp_path / "all.zip", paths, networks[1].predictor, 0.5, 2, LIMITS))
    assert problems[:4] == [None] * 4
    assert "text.png was skipped: Expected a file of the formats" in problems[4]
    assert "large.png was skipped: Expected an image of at most 1,000,000 pixels" in problems[5]
    written = ["x", "x_1", "x_1_1", "x_2"]  # in the order of the images, with unique names
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        masks = {name: np.asarray(Image.open(archive.open(f"masks/{name}.png"))) for name in written}
        assert sorted(archive.namelist()) == sorted(
            ["classes.json", *(f"{folder}/{name}.png" for folder in ("masks", "overlays") for name in written)]
        )
    for index, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(mask, networks[1].predictor(scene(40, 50, index)).mask)


def test_the_page_shows_the_reasons_if_no_network_can_be_opened(tmp_path):
    page = build_demo(open_models([tmp_path / "student.engine"], teacher=tmp_path / "teacher.onnx"))
    texts = [block.value for block in page.blocks.values() if isinstance(block, gr.HTML)]
    assert "No network could be opened" in texts[0]
    assert "There is no ONNX file" in texts[-1]
    assert "There is no file or folder" in texts[-1]


def test_page_options_are_options_of_launch_and_mount():
    for start in (gr.Blocks.launch, gr.mount_gradio_app):
        assert page_options().keys() <= inspect.signature(start).parameters.keys()


def test_no_event_of_the_page_is_a_public_api(networks):
    page = build_demo(ModelSet(networks[0], (networks[1],)))
    assert all(function.api_visibility == "private" for function in page.fns.values())


def test_the_memory_for_sessions_is_bounded(networks):
    limits = Limits(max_requests=7)
    page = build_demo(ModelSet(networks[0], (networks[1],)), limits=limits)
    mounted = FastAPI()
    gr.mount_gradio_app(mounted, page, "/", **page_options())
    for app in (mounted.routes[-1].app, page.launch(prevent_thread_lock=True, quiet=True, **page_options())[0]):
        assert 2 <= app.state_holder.capacity <= STATE_MEMORY / (limits.max_upload_bytes + limits.max_pixels)
    page.close()
    assert page.max_file_size < limits.max_request_bytes
    assert page._queue.max_size == 7


@pytest.mark.parametrize(
    "side", [2 * PAGE_SIDE, 4 * PAGE_SIDE // 3, 1999, PAGE_SIDE + 1, PAGE_SIDE, PAGE_SIDE // 2, 301], ids=str
)
@pytest.mark.parametrize("axis", [0, 1], ids=["down", "right"])
def test_resized_masks_are_aligned_with_the_picture(side, axis):
    offsets = []
    for border in range(12, side - 12, 11):
        mask = np.zeros((side, 4) if axis == 0 else (4, side), np.uint8)
        (mask if axis == 0 else mask.T)[border:] = 1
        picture = resize_to_page(np.repeat(60 + 130 * mask[..., None], 3, 2))
        resized = resize_to_page(mask, cv2.INTER_NEAREST_EXACT)
        assert resized.shape == picture.shape[:2]
        offsets.append(((picture[..., 0] - 60.0) / 130 - resized).sum() / resized.shape[1 - axis])
    assert abs(np.mean(offsets)) < 0.05


def test_resized_masks_equal_opencv_where_the_nearest_pixel_is_unique():
    mask = np.random.default_rng(0).integers(0, 9, (5, 1999), np.uint8)
    resized = resize_to_page(mask, cv2.INTER_NEAREST_EXACT)
    expected = cv2.resize(mask, resized.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    np.testing.assert_array_equal(resized, expected)

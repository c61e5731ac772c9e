"""The teacher's cache: equal to the live teacher, shared by runs, resumed, and refused for anything else."""

import json
import shutil

import pytest
import torch

import bpkd_sdk
from bpkd_sdk.data import DatasetSubset
from bpkd_sdk.features import Capture
from bpkd_sdk.models import save_model, set_spec
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training import cache_writer, loop, prepare
from bpkd_sdk.training import teacher_cache as caches
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loader import training_loader
from bpkd_sdk.training.teacher_cache import CachedTeacher, TeacherCache
from tests.networks import tiny
from tests.scenes import Scenes, write_folder

OPTIONS = {"batch_size": 4, "crop_size": (32, 40), "device": "cpu", "check_data": False, "check_teacher": False}
DATA = Scenes(length=6, size=48)
LONG = {"log_every": 1, "steps": 6, "evaluate_every": 6}


def teacher(classes=3, seed=1, width=8):
    return tiny(classes, seed=seed, width=width).eval()


def teach(folder, **options):
    return bpkd_sdk.teach(teacher(), DATA, folder, **OPTIONS | {"views": 3} | options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return teach(tmp_path_factory.mktemp("cache") / "kept", features=True)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "kept")


def batches(folder, transform="light", steps=9, seed=0, **options):
    config = TrainingConfig.from_options(OPTIONS | {"steps": steps, "seed": seed})
    options = {"transform": transform, "cache": TeacherCache.find(folder), "with_features": True} | options
    return list(training_loader(DATA, config, (32, 40), first_step=0, on_gpu=False, **options))


def test_kept_outputs_equal_those_of_the_live_teacher_on_the_same_views(written):
    live, cache = teacher(), TeacherCache.find(written)
    path = cache.facts.feature
    views = set()
    for images, _, kept in batches(written):
        with torch.no_grad(), Capture(live, [path]) as capture:
            logits = live(live_input(images))
            features = capture.take()[path]
        output = CachedTeacher(cache, None)(images, kept)
        torch.testing.assert_close(output.logits, logits, rtol=2**-11, atol=1e-7)
        torch.testing.assert_close(output.features[path], features, rtol=2**-11, atol=1e-7)
        views.update(image.numpy().tobytes() for image in images)
    assert len(views) == 6 * 3  # 36 draws of 6 images show each of the 3 views twice


def live_input(images):
    return NetworkSpec(None, 3).normalize(images)


def test_each_seed_sees_every_view_and_colours_vary(written):
    first, again, other = (batches(written, seed=seed) for seed in (0, 0, 1))
    for (a, _, _), (b, _, _) in zip(first, again, strict=True):
        assert torch.equal(a, b)
    sets = [{image.numpy().tobytes() for images, _, _ in part for image in images} for part in (first, other)]
    assert sets[0] == sets[1]
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    coloured = batches(written, transform="paper")
    seen = {image.numpy().tobytes() for images, _, _ in coloured for image in images}
    assert len(seen) > 18  # more than the views: the same crop has other colours the second time
    for (_, labels, kept), (_, light_labels, light_kept) in zip(coloured, first, strict=True):
        assert torch.equal(labels, light_labels)
        assert torch.equal(kept["logits"], light_kept["logits"])


def test_distill_writes_the_cache_and_the_next_run_does_not_load_the_teacher(tmp_path, monkeypatch):
    file = tmp_path / "teacher.safetensors"
    network = bpkd_sdk.create_model("smp/FPN/tu-test_resnet", 3, backbone_weights="none").eval()
    save_model(network, file)
    options = OPTIONS | LONG | {"teacher_cache": tmp_path / "kept", "crop_size": (64, 64), "backbone_weights": "none"}
    student = "smp/Linknet/tu-test_resnet"
    first = bpkd_sdk.distill(file, student, (DATA, None), output_dir=tmp_path / "a", **options | {"views": 2})
    monkeypatch.setattr(prepare, "open_teacher", lambda *_: pytest.fail("the teacher is loaded"))
    monkeypatch.setattr(cache_writer, "Teacher", lambda *_: pytest.fail("the teacher runs"))
    second = bpkd_sdk.distill(file, student, (DATA, None), output_dir=tmp_path / "b", **options)
    # Equal inputs give equal weights, whether the cache was written in this call or before.
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    assert first.model.provenance["config"] == second.model.provenance["config"]
    third = bpkd_sdk.distill(
        network, tiny(3, seed=4), (DATA, None), method="cwd", output_dir=tmp_path / "c", **options | {"seed": 3}
    )
    assert third.history[-1]["terms"].keys() == {"ce", "logit"}
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["teacher"]["cache"] == TeacherCache.find(tmp_path / "kept").digest


def test_the_losses_are_those_of_the_kept_logits(written, tmp_path):
    """The first record of a run is compared with the loss of the same batch, written out with the live teacher."""
    options = OPTIONS | LONG | {"steps": 1, "evaluate_every": 1}
    result = bpkd_sdk.distill(
        teacher(), tiny(3, seed=2), (DATA, None), method="cwd", transform="light", teacher_cache=written,
        output_dir=tmp_path / "run", **options,
    )  # fmt: skip
    ((images, _, _),) = batches(written, steps=1)
    student = tiny(3, seed=2).train()
    logits, target = student(live_input(images)), teacher()(live_input(images))
    method = bpkd_sdk.CWDLoss()
    q, p = ((z.double() / method.temperature).flatten(2).log_softmax(2) for z in (logits, target))
    expected = method.weights["logit"] * method.temperature**2 * (p.exp() * (p - q)).sum(2).mean()
    assert result.history[0]["terms"]["logit"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("method", ["skds", "cirkd"])
def test_methods_on_features_read_them(written, tmp_path, method):
    result = bpkd_sdk.distill(
        teacher(), tiny(3), (DATA, None), method=method, teacher_cache=written, output_dir=tmp_path, **OPTIONS | LONG
    )
    assert all(torch.isfinite(torch.tensor(value)) for value in result.history[-1]["terms"].values())


def test_an_interrupted_run_resumes_with_the_cache_only(written, tmp_path, monkeypatch):
    options = OPTIONS | LONG | {"checkpoint_every": 3, "transform": "paper"}
    whole = bpkd_sdk.distill(
        teacher(), tiny(3), (DATA, None), teacher_cache=written, output_dir=tmp_path / "whole", **options
    )
    step, calls = loop._Trainer._step, []

    def stop(self, batches):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power failure")
        return step(self, batches)

    monkeypatch.setattr(loop._Trainer, "_step", stop)
    arguments = (teacher(), tiny(3), (DATA, None))
    with pytest.raises(RuntimeError, match="power"):
        bpkd_sdk.distill(*arguments, teacher_cache=written, output_dir=tmp_path / "cut", **options)
    with pytest.raises(ValueError, match=r"teacher\.cache: was"):
        bpkd_sdk.distill(*arguments, output_dir=tmp_path / "cut", resume=True, **options)
    moved = shutil.copytree(written, tmp_path / "moved")
    resumed = bpkd_sdk.distill(*arguments, teacher_cache=moved, output_dir=tmp_path / "cut", resume=True, **options)
    assert torch.equal(whole.model[0].weight, resumed.model[0].weight)


def test_writing_continues_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "SHARD_BYTES", 10_000)
    whole = teach(tmp_path / "whole")
    assert TeacherCache.find(whole).num_shards == 3
    write, written = TeacherCache.write_shard, []

    def stop(self, shard, *arguments):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(shard)
        write(self, shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "write_shard", stop)
        with pytest.raises(OSError, match="No space"):
            teach(tmp_path / "cut")
    assert TeacherCache.find(tmp_path / "cut").missing_shards() == [*range(2, TeacherCache.find(whole).num_shards)]
    with pytest.raises(ValueError, match=r"views: was 3, is 4"):
        teach(tmp_path / "cut", views=4)
    teach(tmp_path / "cut", views=None)
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in (tmp_path / "cut").iterdir()}
    assert all((whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes() for name in names)


def run(folder, model=None, data=DATA, **options):
    options = OPTIONS | {"steps": 2, "output_dir": folder.parent / "run"} | options
    return bpkd_sdk.distill(model or teacher(), tiny(3), (data, None), teacher_cache=folder, **options)


class Brighter(Scenes):
    """Scenes that change after the fingerprint was computed: only image 1 is darker, which is not compared there."""

    changed = False

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image // 2 if self.changed else image), label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": teacher(seed=7)}, r"teacher\.sha256: was"),
        ({"data": DatasetSubset(DATA, range(5))}, r"data\.images: was 6, is 5"),
        ({"data": Scenes(length=6, size=48, start=20)}, r"data\.fingerprint: was"),
        ({"crop_size": (32, 32)}, r"crops\.crop_size: was \[32, 40\], is \[32, 32\]"),
        ({"scale": (0.75, 1.5)}, r"crops\.scale"),
        ({"transform": "none"}, r"crops\.flip: was True, is False"),
        ({"views": 5}, r"views: was 3, is 5"),
        ({"teacher_augment": ("flip",)}, r"augment: was \[\], is \['flip'\]"),
        ({"teacher_top_k": 2}, r"top_k: was None, is 2"),
    ],
)
def test_a_cache_of_something_else_is_refused(written, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(written, **{"output_dir": tmp_path / "run"} | options)
    assert not (tmp_path / "run").exists()


def test_another_normalisation_of_the_teacher_is_refused(written, tmp_path):
    other = teacher()
    set_spec(other, NetworkSpec(None, 3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match=r"teacher\.mean: was \[0\.485, .*is \[0\.5, 0\.5, 0\.5\]"):
        run(written, other, output_dir=tmp_path / "run")


def test_images_that_change_during_the_run_are_refused(tmp_path):
    data = Brighter(length=6, size=48)
    folder = bpkd_sdk.teach(teacher(), data, tmp_path / "kept", views=3, **OPTIONS)
    data.changed = True
    with pytest.raises(ValueError, match=r"fingerprint|belong to other pixels: they differ by"):
        run(folder, data=data)
    data.changed = False
    cache, (image, _) = TeacherCache.find(folder), data[0]
    with pytest.raises(ValueError, match=r"view 2 of image 0 belong to other pixels: they differ by \d+"):
        cache.read(0, 2, image // 2, with_features=False)


def test_a_flipped_bit_is_found_before_it_is_trained_on(folder):
    path = TeacherCache.find(folder).shard_path(0)
    content = bytearray(path.read_bytes())
    content[-20_000] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: the (logits|features|pixels) of view \d of image \d.*shard-00000"):
        batches(folder)
    path.unlink()
    teach(folder, features=True)  # the advice of the message
    assert batches(folder)


@pytest.mark.parametrize("size", [-100, 1000, 0])
def test_a_shard_that_was_cut_short_is_named(folder, size):
    path = TeacherCache.find(folder).shard_path(0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors of the teacher's cache cannot be used"):
        run(folder)


def test_shards_of_another_cache_are_refused(folder, tmp_path):
    other = teach(tmp_path / "other", features=True, scale=(1.0, 1.0))
    shutil.copy(other / "shard-00000.safetensors", folder)
    with pytest.raises(ValueError, match="it belongs to another cache"):
        run(folder)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ('{"layout": "x"}', "teacher"), ("[]", "CacheFacts")]
)
def test_damaged_facts_are_named(folder, content, message):
    (folder / "cache.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(folder)


def test_folders_and_teachers_that_cannot_have_a_cache(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"full is not a teacher's cache: it has no cache\.json"):
        teach(tmp_path / "full")
    with pytest.raises(ValueError, match="is built by name with a random decoder"):
        bpkd_sdk.teach("pspnet_r18", DATA, tmp_path / "new", **OPTIONS)
    with pytest.raises(ValueError, match="views=3 needs a teacher's cache"):
        bpkd_sdk.distill(teacher(), tiny(3), DATA, views=3, **OPTIONS)
    with pytest.raises(ValueError, match="below the teacher's 3 classes, but got 3"):
        teach(tmp_path / "new", teacher_top_k=3)
    with pytest.raises(ValueError, match="has none. Write one with features"):
        run(teach(tmp_path / "plain"), method="skds")
    assert not (tmp_path / "new").exists()


def test_a_small_disk_is_found_before_the_teacher_runs(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs .* kB for 6 images x 3 views, but .* has 1\.0 kB free"):
        teach(tmp_path / "kept")


def test_logits_beyond_float16_are_refused(tmp_path):
    loud = teacher()
    with torch.no_grad():
        loud[-1].weight.mul_(1e6)
    with pytest.raises(ValueError, match="logits are not finite in float16"):
        bpkd_sdk.teach(loud, DATA, tmp_path / "kept", **OPTIONS)


def test_the_largest_logits_keep_their_probabilities(tmp_path, capsys):
    """All probabilities of the k largest logits, and the sum of the others, are those of the teacher."""
    live = teacher(classes=3, width=16)
    with torch.no_grad():
        live[-1].weight.mul_(6)
    folder = bpkd_sdk.teach(live, DATA, tmp_path / "kept", views=1, teacher_top_k=2, **OPTIONS)
    cache = TeacherCache.find(folder)
    for images, _, kept in batches(folder, steps=2, with_features=False):
        with torch.no_grad():
            expected = live(live_input(images)).double().softmax(1)
        kept_logits = CachedTeacher(cache, None)(images, kept).logits
        # One of three classes is left out, so that even its own probability remains.
        torch.testing.assert_close(kept_logits.double().softmax(1), expected, rtol=0, atol=2e-3)
    assert "Error of keeping 2 of 3 logits" in capsys.readouterr().err


def test_left_out_logits_share_their_probability():
    logits = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
    arrays = caches.kept_arrays(bpkd_sdk.SegmentationOutput(logits), 3)
    assert {name: array.dtype for name, array in arrays.items()} == {
        "values": torch.float16, "others": torch.float16, "classes": torch.uint8,
    }  # fmt: skip
    p = logits.double().softmax(1)
    largest, ids = p.topk(3, dim=1)
    restored = arrays["others"].double().repeat(1, 7, 1, 1).scatter_(
        1, arrays["classes"].long(), arrays["values"].double()
    )  # fmt: skip
    q = restored.softmax(1)
    torch.testing.assert_close(q.gather(1, ids), largest, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(q.sort(1).values[:, 0], (1 - largest.sum(1)) / 4, rtol=5e-2, atol=1e-5)
    error = caches.compression_error(logits, restored.float())
    kl = (p * (p.log() - q.log())).sum(1).mean()
    assert error["over classes"] == pytest.approx(kl.item(), rel=1e-3)
    assert error["largest"] == pytest.approx((p - q).abs().max().item(), rel=1e-3)


def test_views_of_a_transform_of_the_user(tmp_path):
    def mirror(image, mask):
        return (image.flip(2), mask.flip(1)) if torch.rand(()) < 0.5 else (image, mask)

    folder = bpkd_sdk.teach(teacher(), DATA, tmp_path / "kept", views=2, transform=mirror, **OPTIONS)
    live, cache = teacher(), TeacherCache.find(folder)
    for images, _, kept in batches(folder, transform=mirror, steps=3, with_features=False):
        with torch.no_grad():
            logits = live(live_input(images))
        torch.testing.assert_close(CachedTeacher(cache, None)(images, kept).logits, logits, rtol=2**-11, atol=1e-7)


def test_options_at_their_defaults_are_those_of_the_cache(tmp_path):
    """The record of a run states the options that its outputs were computed with."""
    chosen = {"views": 2, "scale": (1.0, 1.5), "teacher_scale": 1.5, "teacher_augment": ("flip",), "teacher_top_k": 2}
    folder = bpkd_sdk.teach(teacher(), DATA, tmp_path / "kept", **OPTIONS | chosen)
    result = run(folder, crop_size=None)
    config = result.model.provenance["config"]
    assert {name: config[name] for name in chosen} == json.loads(json.dumps(chosen))
    assert config["crop_size"] == [32, 40]
    with pytest.raises(ValueError, match=r"top_k: was 2, is 1"):
        run(folder, teacher_top_k=1, output_dir=tmp_path / "other")
    with pytest.raises(TypeError, match=r"optimizer, steps cannot be passed to teach\(\)"):
        bpkd_sdk.teach(teacher(), DATA, tmp_path / "new", steps=3, optimizer="sgd")


def test_float_images_are_padded_with_their_mean(tmp_path):
    """Images smaller than the crops, in the range 0..1, with four channels."""

    class Bands(Scenes):
        channels, value_range, bands = 4, (0.0, 1.0), (0, 1, 2)

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return torch.cat([image, image[:1]]) / 255, label

    spec = NetworkSpec(None, 3, in_channels=4, value_range=(0.0, 1.0), mean=(0.2,) * 4, std=(0.3,) * 4)
    live = torch.nn.Conv2d(4, 3, 8, stride=8).eval()
    set_spec(live, spec)
    data = Bands(length=6, size=24)
    folder = bpkd_sdk.teach(live, data, tmp_path / "kept", views=1, **OPTIONS)
    config = TrainingConfig.from_options(OPTIONS | {"steps": 2})
    loader = training_loader(
        data, config, (32, 40), first_step=0, on_gpu=False, cache=TeacherCache.find(folder), transform="light",
        network=spec,
    )  # fmt: skip
    for images, _, kept in loader:
        assert images.max() <= 1
        torch.testing.assert_close(
            kept["logits"].float(), live(spec.normalize(images)).detach(), rtol=2**-10, atol=1e-4
        )


def test_worker_processes_read_the_cache(written):
    config = TrainingConfig.from_options(OPTIONS | {"steps": 2, "workers": 2})
    loaders = [
        training_loader(DATA, part, (32, 40), first_step=0, on_gpu=False, cache=TeacherCache.find(written))
        for part in (config, TrainingConfig.from_options(OPTIONS | {"steps": 2}))
    ]
    for (a, _, kept), (b, _, alone) in zip(*loaders, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(kept["logits"], alone["logits"])


def test_the_command_writes_a_cache_that_distill_reads(tmp_path, bpkd):
    data = write_folder(tmp_path / "data", size=64)
    network = bpkd_sdk.create_model("smp/FPN/tu-test_resnet", 3, backbone_weights="none").eval()
    save_model(network, tmp_path / "teacher.safetensors")
    arguments = ["--data", str(data), "--crop-size", "64x64", "--device", "cpu"]
    file, folder = tmp_path / "teacher.safetensors", tmp_path / "kept"
    code, _, errors = bpkd("teach", file, folder, "--views", "2", "--batch-size", "4", *arguments)
    assert code == 0, errors
    assert "8 images x 2 views of 64x64, " in errors
    code, _, errors = bpkd(
        "distill", file, "smp/FPN/tu-test_resnet", "--teacher-cache", folder, "--steps", "1", "--batch-size", "4",
        "--backbone-weights", "none", "--output", tmp_path / "run", *arguments,
    )  # fmt: skip
    assert code == 0, errors
    assert f"Teacher's cache: {folder}, 2 crops of each image" in errors
    code, _, errors = bpkd(
        "distill", file, "smp/FPN/tu-test_resnet", "--teacher-cache", folder, "--views", "3", "--backbone-weights", "none",
        "--batch-size", "4", *arguments,
    )  # fmt: skip
    assert code == 1
    assert "views: was 2, is 3" in errors


def test_labels_of_the_teacher_are_read_from_the_cache(written, tmp_path):
    options = OPTIONS | LONG | {"teacher_cache": written, "labels": "teacher", "steps": 1, "evaluate_every": 1}
    result = bpkd_sdk.distill(
        teacher(), tiny(3, seed=2), (DATA, DATA), transform="light", output_dir=tmp_path, **options
    )
    ((images, _, _),) = batches(written, steps=1)
    labels = torch.nn.functional.interpolate(teacher()(live_input(images)), (32, 40), mode="bilinear").argmax(1)
    logits = torch.nn.functional.interpolate(
        tiny(3, seed=2).train()(live_input(images)).double(), (32, 40), mode="bilinear"
    )
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert result.history[0]["terms"]["ce"] == pytest.approx(expected.item(), rel=2e-3)
    assert result.metrics.pixel_accuracy < 1  # agreement with the teacher, which is loaded for the validation


def test_a_class_map_is_applied_when_outputs_are_read(tmp_path):
    """A teacher with more classes keeps all of them in the cache, and teaches those of the data."""
    other = teacher(classes=4)
    set_spec(other, NetworkSpec(None, 4, class_names=("red", "sky", "background", "green")))
    own = {"background": "background", "red": "red", "green": "green"}
    merged = own | {"red": ["red", "sky"]}
    folder = bpkd_sdk.teach(other, DATA, tmp_path / "kept", views=2, class_map=own, **OPTIONS)
    assert TeacherCache.find(folder).facts.arrays["logits"][0] == 4
    terms = []
    for index, class_map in enumerate((own, merged)):
        result = run(folder, other, class_map=class_map, output_dir=tmp_path / str(index), log_every=1)
        terms.append(result.history[0]["terms"])
    assert terms[0]["ce"] == terms[1]["ce"]
    assert terms[0]["body"] != terms[1]["body"]


def test_runs_of_a_comparison_share_the_cache(tmp_path, monkeypatch):
    options = {"batch_size": 4, "crop_size": (32, 40), "device": "cpu", "check_teacher": False, "scale": (1.0, 1.5)}
    folder = tmp_path / "kept"
    comparison = bpkd_sdk.compare(
        teacher(), tiny(3), (DATA, DATA), methods=["cwd", "skds"], steps=2, seeds=1, teacher_cache=folder, views=2,
        output_dir=tmp_path / "comparison", **options,
    )  # fmt: skip
    assert [run.error for run in comparison.runs] == [None] * 3
    assert TeacherCache.find(folder).facts.feature is not None  # skds compares feature maps

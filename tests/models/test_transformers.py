"""Tests of networks of transformers: instances, and names of folders."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import bpkd_sdk
from bpkd_sdk.classes import is_unnamed
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.models import get_spec, identify
from bpkd_sdk.models.library import build_from_spec
from bpkd_sdk.models.mask_classification import MaskClassificationNetwork
from bpkd_sdk.spec import NetworkSpec
from tests.families import (
    ALL_METHODS,
    DATA,
    OPTIONS,
    SIZE,
    learns_and_loads,
    teaches_by_every_method,
)
from tests.networks import tiny
from tests.transformers_networks import build

PER_PIXEL = ("segformer", "upernet", "beit", "dpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a SegFormer whose class names, normalisation and licence are those of its files."""
    path = tmp_path_factory.mktemp("hub") / "segformer-small"
    network = build("segformer")
    network.config.id2label = dict(enumerate(DATA.class_names))
    network.save_pretrained(path)
    hf.SegformerImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.25] * 3).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return path


@pytest.mark.parametrize("name", PER_PIXEL)
def test_they_teach_by_every_method(name, tmp_path):
    terms = teaches_by_every_method(build(name), tmp_path)
    assert {term.partition("/")[0] for term in terms} == {"ce", *ALL_METHODS}


@pytest.mark.parametrize("name", PER_PIXEL)
def test_they_learn_and_their_checkpoints_need_no_instance(name, tmp_path):
    loaded = learns_and_loads(build(name), tmp_path)
    assert type(loaded) is type(build(name))
    assert loaded.spec.name == f"transformers/{type(loaded).__name__}"


@pytest.mark.parametrize("name", PER_PIXEL)
def test_the_size_divisor_keeps_every_pixel(name):
    """A network must not cut off what is left of an image after its last patch."""
    spec = get_spec(build(name))
    assert spec.size_divisor == {"dpt": 64}.get(name, 32)
    assert spec.mean == ((0.5,) * 3 if name in ("beit", "dpt") else (0.485, 0.456, 0.406))


def test_a_folder_is_opened_with_its_facts(folder):
    network = bpkd_sdk.load_model(f"transformers/{folder}")
    spec = network.spec
    assert (spec.name, spec.class_names) == ("transformers/segformer-small", DATA.class_names)
    assert spec.mean == pytest.approx((0.4, 0.5, 0.6))
    assert spec.std == pytest.approx((0.25,) * 3)
    assert network.provenance["weights"] == {"source": str(folder), "license": "apache-2.0"}
    expected = build("segformer").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    assert not network.training
    assert bpkd_sdk.evaluate(f"transformers/{folder}", ShapesDataset("val", length=1, size=SIZE)).images == 1


def test_a_folder_teaches_and_a_student_starts_from_it(folder, tmp_path, capsys):
    name = f"transformers/{folder}"
    options = OPTIONS | {"backbone_weights": "imagenet", "output_dir": tmp_path / "run"}
    run = bpkd_sdk.distill(name, name, (DATA, None), check_teacher=False, **options)
    text = f"transformers/segformer-small with the weights {folder}, license apache-2.0"
    err = " ".join(capsys.readouterr().err.split())
    assert f"Student: {text}; " in err
    assert f"Teacher: {text}; " in err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["origin"]["teacher"]["weights"]["license"] == "apache-2.0"
    again = bpkd_sdk.load_model(run.checkpoint)
    assert again.spec == run.model.spec
    assert again.provenance["origin"]["student"]["weights"]["source"] == str(folder)


def test_an_instance_states_where_it_was_loaded_from(folder, tmp_path, capsys):
    teacher = hf.AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert get_spec(teacher).mean == pytest.approx((0.4, 0.5, 0.6))
    run = bpkd_sdk.distill(
        teacher.eval(), tiny(9), (DATA, None), check_teacher=False, output_dir=tmp_path / "run", **OPTIONS
    )
    text = f"Teacher: SegformerForSemanticSegmentation as given, loaded from {folder}, license apache-2.0; "
    assert text in " ".join(capsys.readouterr().err.split())
    assert run.model.provenance["origin"]["teacher"]["loaded"]["license"] == "apache-2.0"


def test_another_number_of_classes_gets_a_new_classifier_only(folder):
    torch.manual_seed(1)
    network = bpkd_sdk.create_model(f"transformers/{folder}", 4, backbone_weights="imagenet")
    assert network.spec.num_classes == 4
    assert network.provenance["weights"]["random"] == ["decode_head.classifier.bias", "decode_head.classifier.weight"]
    expected, state = build("segformer").state_dict(), network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items() if "decode_head.classifier" not in key)
    random = bpkd_sdk.create_model(f"transformers/{folder}", 4)
    assert not torch.equal(next(random.parameters()), next(network.parameters()))
    assert random.spec == network.spec
    assert is_unnamed(bpkd_sdk.create_model(f"transformers/{folder}", 9).spec.class_names)


def test_mask_classifiers_are_opened_by_folder(tmp_path):
    build("maskformer").save_pretrained(tmp_path / "maskformer")
    with pytest.warns(UserWarning, match="no preprocessor_config.json.*mean .0.48"):
        network = bpkd_sdk.load_model(f"transformers/{tmp_path / 'maskformer'}")
    assert isinstance(network, MaskClassificationNetwork)
    assert network.spec.size_divisor == 32


def test_oneformer_takes_the_tokens_of_its_task_from_the_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    build("oneformer").network.save_pretrained(tmp_path)
    words = {"<pad>": 0, "the": 3, "task": 4, "is": 5, "semantic": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        network = bpkd_sdk.load_model(f"transformers/{tmp_path}")
    assert network.task_inputs.tolist() == [[3, 4, 5, 6, 0, 0, 0, 0]]
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    assert torch.equal(bpkd_sdk.load_model(tmp_path / "a.safetensors").task_inputs, network.task_inputs)


def test_incomplete_weights_are_no_teacher(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    encoder = {key: value for key, value in state.items() if key.startswith("segformer.")}
    save_file(encoder, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for decode_head.batch_norm.*not trained for segmentation"):
        bpkd_sdk.load_model(f"transformers/{tmp_path}")
    network = bpkd_sdk.create_model(f"transformers/{tmp_path}", 9, backbone_weights="imagenet")
    assert "decode_head.classifier" in network.provenance["weights"]["random"]


def test_pickles_code_and_other_networks_are_refused(folder, tmp_path, monkeypatch):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(build("segformer").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"model.safetensors(.*\n)*.*pickles .* are not loaded"):
        bpkd_sdk.load_model(f"transformers/{tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "x"})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises((ValueError, RuntimeError)):
        bpkd_sdk.create_model(f"transformers/{tmp_path}", 3)
    assert not (tmp_path / "owned").exists()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="of the type 'bert', which does not segment images"):
        bpkd_sdk.train(f"transformers/{tmp_path}", "no_data")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("transformers//no/folder", {}, FileNotFoundError, "no folder /no/folder"),
        (
            "transformers/nobody/nothing",
            {},
            RuntimeError,
            r"'nobody/nothing', which is no local folder(.*\n)*.*connect",
        ),
        ("transformers/", {}, ValueError, "Expected a name like"),
        ("{folder}", {"aux_head": True}, ValueError, "no auxiliary segmentation head"),
        ("{folder}", {"in_channels": 4}, ValueError, "3 channels, but got in_channels=4"),
        ("{folder}", {"backbone_weights": "a.pth"}, FileNotFoundError, "no file a.pth"),
        ("{folder}", {"backbone_weights": "coco"}, ValueError, "'imagenet'"),
    ],
)
def test_bad_names_and_options_are_refused(folder, name, options, error, message):
    with pytest.raises(error, match=message):
        bpkd_sdk.create_model(name.format(folder=f"transformers/{folder}"), 3, **options)


def test_an_image_processor_that_expects_bgr_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    hf.MobileViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="turns RGB into BGR"):
        bpkd_sdk.load_model(f"transformers/{tmp_path}")


def test_a_changed_instance_is_not_mistaken_for_its_configuration(tmp_path):
    network = build("segformer")
    network.decode_head.classifier = torch.nn.Conv2d(16, 5, 1)
    assert identify(network).name is None
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"SegformerForSemanticSegmentation.*load_model\(path, model=\.\.\.\)"):
        bpkd_sdk.load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["backbone", "attn_implementation"])
def test_a_configuration_that_names_a_repository_is_refused(key):
    nested = {"model_type": "timm_backbone", "backbone": "resnet18", "use_pretrained_backbone": True}
    arguments = {"model_type": "upernet", "backbone_config": nested | {key: "hf-hub:nobody/nothing"}}
    spec = NetworkSpec("transformers/a", 2, config={"class": "UperNetForSemanticSegmentation", "arguments": arguments})
    with pytest.raises(ValueError, match=f"'{key}' is 'hf-hub:nobody/nothing', from which files or code"):
        build_from_spec(spec)
    with pytest.raises(ValueError, match="cannot build 'transformers/nobody/nothing' from its configuration"):
        build_from_spec(NetworkSpec("transformers/nobody/nothing", 2))

"""Tests of networks that classify masks: their logits per pixel are those of the library's own rule."""

import pytest
import torch
import transformers as hf

import bpkd_sdk
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.mask_classification import MaskClassificationNetwork, adapt_network
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import whole_logits
from tests.families import ALL_METHODS, learns_and_loads, teaches_by_every_method
from tests.transformers_networks import TASK, build

PROCESSORS = {
    "maskformer": hf.MaskFormerImageProcessor,
    "mask2former": hf.Mask2FormerImageProcessor,
    "oneformer": hf.OneFormerImageProcessor,
    "eomt": hf.EomtImageProcessor,
}
# The library scales the masks of Mask2Former to 384x384, the size that its processor makes of an image. The position
# embeddings of this EoMT are for 64x64.
SIZES = {"mask2former": (384, 384), "eomt": (64, 64)}


@pytest.mark.parametrize("name", PROCESSORS)
def test_masks_are_equal_to_the_librarys(name):
    network = adapt_network(build(name))
    torch.manual_seed(1)
    for key, parameter in network.named_parameters():  # larger weights, so that the classes of the pixels differ
        if "class_predictor" in key or "mask_emb" in key or "mask_head" in key:
            parameter.data *= 10 if name == "oneformer" else 5
    height, width = SIZES.get(name, (96, 64))
    images = torch.randint(0, 256, (2, 3, height, width))
    with torch.no_grad():
        mask = to_mask(whole_logits(network, images))
        inputs = get_spec(network).normalize(images)
        outputs = network.network(inputs, *([TASK.expand(2, -1)] if name == "oneformer" else []))
    processor = PROCESSORS[name]()
    if name == "oneformer":
        processor = PROCESSORS[name].__new__(PROCESSORS[name])  # its constructor downloads names of classes
    options = {"size": {"shortest_edge": 64, "longest_edge": None}} if name == "eomt" else {}
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)] * 2, **options)
    assert torch.equal(mask, torch.stack(expected))
    assert len(mask.unique()) > 1


def test_a_logit_is_the_logarithm_of_the_score_by_arithmetic_written_out():
    network = adapt_network(build("maskformer"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = network(images)
        output = network.network(images)
    classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    scores = torch.zeros(9)
    for query in range(5):
        shares = classes[query].exp() / classes[query].exp().sum()
        scores += shares[:9] / (1 + (-masks[query, 0, 0]).exp())
    # The corner pixel of the image has the value of the corner of the masks.
    torch.testing.assert_close(logits[0, :, 0, 0], scores.log())


@pytest.mark.parametrize("name", PROCESSORS)
def test_they_teach_by_every_method(name, tmp_path):
    network = build(name)
    terms = teaches_by_every_method(network, tmp_path)
    assert {term.partition("/")[0] for term in terms} == {"ce", *ALL_METHODS}


@pytest.mark.parametrize("name", PROCESSORS)
def test_they_learn_and_their_checkpoints_need_no_instance(name, tmp_path):
    network = build(name)
    loaded = learns_and_loads(network, tmp_path)
    assert isinstance(loaded, MaskClassificationNetwork)
    if name == "oneformer":
        assert torch.equal(loaded.task_inputs, TASK)


def test_an_instance_is_scored_and_profiled_like_any_network(tmp_path):
    data = bpkd_sdk.data.ShapesDataset("val", length=1, size=(64, 64))
    network = build("maskformer")
    assert bpkd_sdk.evaluate(network, data).images == 1
    assert bpkd_sdk.profile(network, (64, 64)).macs > 0
    bpkd_sdk.save_model(network, tmp_path / "a.safetensors")
    assert isinstance(bpkd_sdk.load_model(tmp_path / "a.safetensors"), MaskClassificationNetwork)


def test_errors_state_what_to_do():
    with pytest.raises(ValueError, match=r"needs the tokens of its task. Open its folder with load_model"):
        bpkd_sdk.profile(build("oneformer").network, (64, 64))
    with pytest.raises(ValueError, match="takes no `task_inputs`"):
        MaskClassificationNetwork(build("maskformer"), TASK)
    with pytest.raises(TypeError, match="Expected a network of MaskFormer.*but got Segformer"):
        MaskClassificationNetwork(build("segformer"))
    with pytest.raises(TypeError, match="classes of masks instead of logits per pixel"):
        bpkd_sdk.profile(torch.nn.Sequential(build("maskformer")), (64, 64))

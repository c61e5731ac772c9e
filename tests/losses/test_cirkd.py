"""Tests of cross-image relations against the reference and plain loops, of the memory, and of several processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bpkd_sdk.losses import CIRKDLoss, cirkd, similarity
from bpkd_sdk.losses.cirkd import (
    ClassQueue,
    class_means,
    memory_contrast,
    minibatch_pixel,
    rank_within,
    sample_positions,
)
from bpkd_sdk.losses.tensors import downsample_labels, gather_rows, mean_over_processes
from tests.losses.cases import assert_gradient, load, output, random_labels, random_output

OFF = {"kd_weight": 0, "minibatch_weight": 0, "pixel_weight": 0, "region_weight": 0}


@pytest.fixture(params=[1 << 20, 50], ids=["whole", "chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(similarity, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_minibatch_term_of_the_reference(reference):
    case = load(reference, "cirkd_minibatch")
    method = CIRKDLoss(19, **OFF | {"minibatch_weight": 1}, pool=1)
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    for compute in (
        minibatch_pixel,
        lambda s, t: method(output(feature=s), output(feature=t), labels)["minibatch_pixel"],
    ):
        student = case["student"].clone().requires_grad_()
        loss = compute(student, case["teacher"])
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-5)
        assert_gradient(student, case["grad"])


def known_rows(features, labels, ignore):
    known = downsample_labels(labels, features.shape[2:]).flatten() != ignore
    return features.permute(0, 2, 3, 1).flatten(0, 2)[known]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", ["pixel", "region"])
def test_memory_terms_of_the_reference(reference, name):
    case = load(reference, "cirkd_memory")
    student = case["student"].clone().requires_grad_()
    rows = [known_rows(x, case["labels"], 255) for x in (student, case["teacher"])]
    loss = memory_contrast(*rows, case[f"{name}_queue"].flatten(0, 1))
    loss.backward()
    assert loss.item() == pytest.approx(case[f"loss_{name}"].item(), rel=1e-5)
    assert_gradient(student, case[f"grad_{name}"])


@pytest.mark.usefixtures("chunk")
def test_memory_terms_of_the_reference_through_the_class(reference):
    """The memory of regions is updated from its state before. The memory of pixels, whose update is random, is not updated."""
    case = load(reference, "cirkd_memory")
    student, teacher = output(feature=case["student"].clone().requires_grad_()), output(feature=case["teacher"])
    method = CIRKDLoss(19, **OFF | {"pixel_weight": 1, "region_weight": 1}, pixel_queue=19 * 20, region_queue=19 * 5)
    method.prepare(student, teacher)
    method.projection = nn.Identity()
    method.pixels.entries.copy_(case["pixel_queue"])
    method.pixels.push = lambda vectors, classes: None
    method.regions.entries.copy_(case["region_queue_before"])
    method.regions.pointer.copy_(case["region_ptr_before"])
    terms = method(student, teacher, case["labels"])
    torch.testing.assert_close(method.regions.entries, case["region_queue"], rtol=1e-5, atol=1e-6)
    assert torch.equal(method.regions.pointer, case["region_ptr"])
    for name in ("pixel", "region"):
        assert terms[f"memory_{name}"].item() == pytest.approx(case[f"loss_{name}"].item(), rel=1e-5)
    sum(terms.values()).backward()
    assert_gradient(student.features["neck"], case["grad_pixel"] + case["grad_region"])


def plain_minibatch(student, teacher, temperature):
    """Compute the term one pair of images and one row at a time."""
    total, images = 0.0, len(student)
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    for i in range(images):
        for j in range(images):
            for row in range(s.shape[2]):
                p, q = ((x[i, :, row] @ x[j] / temperature).softmax(0) for x in (t, s))
                total = total + (p * (p / q).log()).sum() / s.shape[2]
    return total / images**2


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("images", [1, 3])
def test_minibatch_term_in_float64(images):
    student = random_output(images, 3, 4, (5, 6), dtype=torch.float64)
    teacher = random_output(images, 3, 7, (5, 6), seed=1, dtype=torch.float64)
    method = CIRKDLoss(3, **OFF | {"minibatch_weight": 2}, pool=1, contrast_temperature=0.2)
    loss = method(student, teacher, random_labels(images, 3, (20, 24)))["minibatch_pixel"]
    loss.backward()
    gradient, student.features["neck"].grad = student.features["neck"].grad, None
    expected = 2 * plain_minibatch(student.features["neck"], teacher.features["neck"].detach(), 0.2)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, student.features["neck"].grad)


def test_pooling_averages_the_features_first():
    student, teacher = (random_output(2, 3, width, (5, 8), seed=width) for width in (4, 7))
    pooled = (F.avg_pool2d(x.features["neck"], 2, ceil_mode=True) for x in (student, teacher))
    method = CIRKDLoss(3, **OFF | {"minibatch_weight": 1})
    assert method(student, teacher, random_labels(2, 3, (20, 32)))["minibatch_pixel"] == minibatch_pixel(*pooled)


@pytest.mark.usefixtures("chunk")
def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    rows, teacher, memory = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 4, 60))
    rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: similarity.contrast_kl(r, teacher, memory, temperature=0.7), rows)
    student, teacher = (torch.randn(3, 20, d, generator=generator, dtype=torch.float64) for d in (2, 4))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: similarity.relation_kl(s, teacher, temperature=2.0), student)


def test_the_lowest_temperature_is_exact():
    """The features of the two images are opposite, so that every similarity between the images is -1."""
    feature = torch.zeros(2, 2, 2, 3)
    feature[:, 0] = torch.tensor([1.0, -1.0]).view(2, 1, 1)
    feature.requires_grad_()
    loss = minibatch_pixel(feature, torch.randn(2, 4, 2, 3).abs(), temperature=similarity.MIN_TEMPERATURE)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize("fill", [pytest.param(255, id="void-only"), pytest.param(1, id="one-class")])
def test_batch_of_one_with_one_label(fill):
    student, teacher = random_output(1, 3, 4, (3, 5)), random_output(1, 3, 6, (3, 5), seed=1)
    method = CIRKDLoss(3)
    method.prepare(student, teacher)
    terms = method(student, teacher, torch.full((1, 12, 20), fill, dtype=torch.uint8))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(student.features["neck"].grad).all()
    for name in ("memory_pixel", "memory_region"):
        assert (terms[name].item() == 0) == (fill == 255)
    assert method.regions.pointer.tolist() == ([0, 0, 0] if fill == 255 else [0, 1, 0])
    assert method.pixels.pointer.tolist() == ([0, 0, 0] if fill == 255 else [0, 15, 0])


def plain_ring(entries, pointer, vectors, classes):
    size = entries.shape[1]
    for vector, label in zip(vectors, classes.tolist(), strict=True):
        entries[label, pointer[label]] = vector
        pointer[label] = (pointer[label] + 1) % size


def test_queue_is_a_ring_for_each_class():
    generator = torch.Generator().manual_seed(0)
    queue = ClassQueue(4, 5, 3)
    assert queue.entries.norm(dim=2).allclose(torch.ones(4, 5))
    entries, pointer = queue.entries.clone(), queue.pointer.clone()
    for count in (0, 1, 7, 3, 40):
        vectors = torch.randn(count, 3, generator=generator)
        classes = torch.randint(0, 3, (count,), generator=generator)
        queue.push(vectors, classes)
        plain_ring(entries, pointer, vectors, classes)
        assert torch.equal(queue.entries, entries)
        assert torch.equal(queue.pointer, pointer)


def test_queue_samples_the_same_slots_of_every_class():
    torch.manual_seed(0)
    queue = ClassQueue(3, 8, 1)
    queue.entries.copy_((torch.arange(8.0) + 10 * torch.arange(3.0).view(-1, 1)).unsqueeze(2))
    sample = queue.sample(5).view(3, 5)
    assert torch.equal(sample - sample[0], 10 * torch.arange(3.0).view(-1, 1).expand(3, 5))
    assert len(set(sample[0].tolist())) == 5
    assert sorted(queue.sample(100).flatten().tolist()) == sorted(queue.entries.flatten().tolist())


def test_ranks_means_and_samples_of_groups():
    generator = torch.Generator().manual_seed(0)
    group, vectors = torch.randint(0, 6, (50,), generator=generator), torch.randn(50, 4, generator=generator)
    group[group == 2] = 3
    rank, count = rank_within(group, 6)
    assert rank.tolist() == [group[:i].tolist().count(label) for i, label in enumerate(group.tolist())]
    assert count.tolist() == [group.tolist().count(label) for label in range(6)]
    means, present = class_means(vectors, group, 6)
    assert present.tolist() == [0, 1, 3, 4, 5]
    for mean, label in zip(means, present, strict=True):
        torch.testing.assert_close(mean, F.normalize(vectors[group == label].mean(0), dim=0))
    chosen = sample_positions(group, 4, 6)
    assert group[chosen].tolist() == sorted(group[chosen].tolist())
    assert len(set(chosen.tolist())) == len(chosen)
    assert torch.bincount(group[chosen], minlength=6).tolist() == count.clamp(max=4).tolist()


@pytest.mark.parametrize("whole_map", [False, True])
def test_positions_that_enter_the_memory(whole_map):
    """The features are one-hot in the position, so that an entry of the memory identifies its position."""
    labels = torch.tensor([[[1, 0, 1, 1], [255, 0, 1, 2]], [[0, 0, 0, 0], [0, 0, 0, 2]]])
    teacher = output(torch.zeros(2, 3, 2, 4), torch.eye(16).view(2, 2, 4, 16).permute(0, 3, 1, 2))
    student = output(torch.zeros(2, 3, 2, 4), torch.randn(2, 5, 2, 4))
    method = CIRKDLoss(3, **OFF | {"pixel_weight": 1}, whole_map=whole_map, pixel_queue=60)
    method.prepare(student, teacher)
    method(student, teacher, labels)
    for label in range(3):
        expected = []
        for image in range(2):
            own = (labels[image].flatten() == label).nonzero().flatten().tolist()
            expected += [image * 8 + position for position in (range(len(own)) if whole_map else own)]
        taken = method.pixels.entries[label, : len(expected)].argmax(1).tolist()
        assert sorted(taken) == expected
    assert method.pixels.pointer.tolist() == [9, 4, 2]


def test_at_most_sixteen_positions_of_a_class_enter_the_memory():
    student, teacher = random_output(2, 3, 4, (6, 6)), random_output(2, 3, 6, (6, 6), seed=1)
    method = CIRKDLoss(3, **OFF | {"pixel_weight": 1}, pixel_queue=300)
    method.prepare(student, teacher)
    method(student, teacher, torch.ones(2, 6, 6, dtype=torch.uint8))
    assert method.pixels.pointer.tolist() == [0, 2 * cirkd.PIXELS_PER_CLASS, 0]
    method.eval()(student, teacher, torch.ones(2, 6, 6, dtype=torch.uint8))
    assert method.pixels.pointer.tolist() == [0, 2 * cirkd.PIXELS_PER_CLASS, 0]


def test_the_size_of_the_memory_does_not_depend_on_the_number_of_classes():
    student, teacher = random_output(1, 150, 4, (2, 2)), random_output(1, 150, 6, (2, 2))
    method = CIRKDLoss(150)
    method.prepare(student, teacher)
    assert method.pixels.entries.shape == (150, 40_960 // 150, 6)
    assert method.regions.entries.shape == (150, 10_240 // 150, 6)
    paper = CIRKDLoss.paper(150)
    assert (paper.pixel_queue // 150, paper.region_queue // 150, paper.pool) == (20_000, 2_000, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: -1}, "weight of .*got -1") for name in OFF),
        ({"temperature": 0}, "`temperature`"),
        ({"contrast_temperature": 0}, "`contrast_temperature`"),
        ({"pool": 0}, "`pool`"),
        ({"pixel_queue": 2}, "`pixel_queue` to be at least 3, one entry for each class, but got 2"),
        ({"region_queue": 0}, "`region_queue`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CIRKDLoss(3, **arguments)


def _run_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = gather_rows(torch.full((2 - rank, 3), float(rank)))
    assert rows[:, 0].tolist() == [0.0, 0.0, 1.0]
    assert mean_over_processes(torch.tensor([float(rank)])).tolist() == [0.5]
    student, teacher = random_output(1, 3, 4, (3, 5)), random_output(1, 3, 6, (3, 5), seed=rank)
    method = CIRKDLoss(3)
    torch.manual_seed(0)
    method.prepare(student, teacher)
    method(student, teacher, torch.full((1, 6, 10), rank, dtype=torch.uint8))
    assert method.regions.pointer.tolist() == [1, 1, 0]
    assert method.pixels.pointer.tolist() == [15, 15, 0]
    state = torch.cat([method.pixels.entries.flatten(), method.regions.entries.flatten()])
    torch.testing.assert_close(mean_over_processes(state.clone()), state)
    dist.destroy_process_group()


def test_processes_share_their_memory(tmp_path):
    torch.multiprocessing.spawn(_run_process, (str(tmp_path),), nprocs=2)

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import tensor
from torch.nn.functional import interpolate
from torch.testing import assert_close

from zsq.core import Batch, RecipeError
from zsq.nets.graph import blocks, extract
from zsq.quant import PTQ_8BIT_ENDS, AdaRound, Calibrate, InsertFakeQuant, LpError, Nearest, ReconstructBlocks
from zsq.quant.placement import DEPLOYED
from zsq.quant.quantizers import activation_quantizers, float_mode, freeze, weight_quantizers
from zsq.quant.reconstruct import _squared_error
from zsq.synthesis import Noise, UniformPixels

NOISE = Noise(samples=32)
UNSEEN = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(11))


def insert(rounding):
    return InsertFakeQuant(protocol=PTQ_8BIT_ENDS, range=LpError(), rounding=rounding)


def quick(**settings):
    settings = {"samples": 32, "steps": 120, "batch_size": 16, "lr_rounding": 2e-2, **settings}
    return ReconstructBlocks(**settings)


def block_errors(student, images):
    """Mean squared error of every block on the teacher's input."""
    errors = {}
    with torch.no_grad():
        for block in blocks(student):
            part = extract(student, block)
            with float_mode(part):
                wanted = part(images)
            errors[block.name] = (part(images) - wanted).square().mean().item()
            images = wanted
    return errors


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_every_block_comes_closer_than_round_to_nearest(name, job_of, apply, request):
    network, errors = request.getfixturevalue(name), []
    for passes in (
        (insert(Nearest()), Calibrate(range=LpError(), samples=32)),
        (insert(AdaRound()), quick()),
    ):
        job = job_of(network, "w2a8")
        apply(job, *passes, synthesizer=NOISE)
        errors.append(block_errors(job.student, UNSEEN))
    nearest, learned = errors
    assert nearest.keys() == learned.keys()
    low = [block for block in nearest if block.startswith(("stages", "blocks"))]  # the ends have 8 bits
    assert len(low) == 2
    assert all(learned[block] < 0.7 * nearest[block] for block in low)


def test_the_range_of_images_is_not_fitted_to_those_that_are_seen(resnet, job_of, apply):
    job = job_of(resnet, "w4a4")
    dull = Noise(pixels=UniformPixels(low=0.0, high=0.5), samples=32)
    apply(job, InsertFakeQuant(protocol=DEPLOYED["ort-x86"], rounding=AdaRound()), quick(), synthesizer=dull)
    images = activation_quantizers(job.student)["activation_quantizers.images"]
    assert_close(images.rounded(tensor([-9.0, 9.0])), tensor([-2.5, 2.5]), atol=5 / 255, rtol=0)


def test_what_is_left_out_of_an_image_is_not_fitted_to(job_of, apply):
    network, rng = tiny.vit(), torch.Generator().manual_seed(2)
    tokens = torch.stack([torch.randperm(16, generator=rng)[:6] + 1 for _ in range(20)])
    tokens = torch.cat([torch.zeros(20, 1, dtype=torch.int64), tokens], 1)  # the class token stays
    kept = torch.zeros(20, 17).scatter_(1, tokens, 1)[:, 1:].reshape(20, 1, 4, 4)
    images = torch.randn(2, 20, 3, 8, 8, generator=rng)
    images[1] = torch.where(interpolate(kept, scale_factor=2) > 0, images[0], images[1])
    fitted = {}
    for name, pixels, seen in (("a", images[0], tokens), ("b", images[1], tokens), ("whole", images[0], None)):
        job = job_of(network)
        apply(job, insert(AdaRound()))
        source = SimpleNamespace(take=lambda samples, pixels=pixels, seen=seen: Batch(pixels, tokens=seen))
        quick(samples=20, steps=5, batch_size=8).apply(job, source)
        fitted[name] = job.student.state_dict()
    assert all(torch.equal(value, fitted["b"][name]) for name, value in fitted["a"].items())
    assert not all(torch.equal(value, fitted["whole"][name]) for name, value in fitted["a"].items())


def test_squared_error_by_hand():
    # (1, 2, 1, 2): 1 + 4 in the one position, 9 + 0 in the other; their mean is 7
    found = tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
    assert _squared_error(found, torch.zeros_like(found)).item() == 7
    # (2, 2) logits: 1 + 4 and 9 + 0
    assert _squared_error(tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 2)).item() == 7
    # (1, 2, 3) tokens: three features, summed; 1 + 1 + 1 and 4 + 0 + 0
    tokens = tensor([[[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]])
    assert _squared_error(tokens, torch.zeros_like(tokens)).item() == 3.5


def test_a_block_without_activation_quantizers_starts_at_the_teacher(resnet, images, job_of, apply):
    job = job_of(resnet, "w8a32")  # wide enough that a rounded zero point clips next to nothing
    apply(job, InsertFakeQuant(rounding=AdaRound()))
    assert max(block_errors(job.student, images).values()) < 1e-4


def test_the_convolution_and_the_shortcut_of_a_block_read_one_node(resnet, job_of, apply):
    job = job_of(resnet)
    apply(job, insert(AdaRound()))
    for block, shortcut in (("stages.0.0", "stages_0_0_shortcut"), ("stages.1.0", "stages_1_0_shortcut_0")):
        part = extract(job.student, block)
        nodes = {node.name: node for node in part.graph.nodes}
        source = nodes[f"{block.replace('.', '_')}_conv1_0"].all_input_nodes[0]
        assert nodes[shortcut].all_input_nodes == [source]
        quantizer = part.get_submodule(source.target)
        assert quantizer is job.student.get_submodule(source.target)  # learned in the block, used by the network
        assert sum(each is quantizer for each in activation_quantizers(part).values()) == 1


def test_afterwards_rounding_is_hard_and_nothing_is_dropped(resnet, images, job_of, apply):
    job = job_of(resnet, "w3a4")
    apply(job, insert(AdaRound()), quick(steps=5), synthesizer=NOISE)
    student = job.student
    assert torch.equal(student(images), student(images))
    assert all(q.ready and q.drop == 0 and q.rng is None for q in activation_quantizers(student).values())
    assert not any(parameter.requires_grad for parameter in student.parameters())
    before = student(images)
    freeze(student)
    assert torch.equal(student(images), before)
    for layer, quantizer in weight_quantizers(student).values():
        assert all(len(row.unique()) <= 2**quantizer.bits for row in layer.weight.flatten(1))


def test_scales_and_roundings_are_learned_and_zero_points_stay(resnet, job_of, apply):
    job = job_of(resnet, "w3a4")
    apply(job, insert(AdaRound()))
    quantizers = {name: quantizer for name, (_, quantizer) in weight_quantizers(job.student).items()}
    before = {name: copy.deepcopy(quantizer.state_dict()) for name, quantizer in quantizers.items()}
    apply(job, quick(steps=10), synthesizer=NOISE)
    for name, quantizer in quantizers.items():
        now = quantizer.state_dict()
        assert torch.equal(now["zero_point"], before[name]["zero_point"])
        assert torch.equal(now["rounding.base"], before[name]["rounding.base"])
        assert not torch.equal(now["scale"], before[name]["scale"])
        assert not torch.equal(now["rounding.logits"], before[name]["rounding.logits"])
        assert (now["scale"] > 0).all()


def test_a_finished_run_installs_the_same_without_learning(resnet, images, job_of, apply, tmp_path, monkeypatch):
    first = job_of(resnet, "w3a4", folder=tmp_path)
    apply(first, insert(AdaRound()), quick(steps=6), synthesizer=NOISE)
    pieces = sorted((tmp_path / "pieces" / "reconstruct").iterdir())
    assert len(pieces) == len(blocks(first.student)) == 4
    pieces[2].unlink()
    pieces[3].unlink()
    fitted = []
    fit = ReconstructBlocks._fit
    monkeypatch.setattr(ReconstructBlocks, "_fit", lambda *args: fitted.append(args[-1]) or fit(*args))
    again = job_of(resnet, "w3a4", folder=tmp_path)
    apply(again, insert(AdaRound()), quick(steps=6), synthesizer=NOISE)
    assert fitted == ["stages.1.0", "head"]
    states = [job.student.state_dict() for job in (first, again)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for job in (first, again):
        freeze(job.student)
    assert torch.equal(again.student(images), first.student(images))


def test_the_seed_decides(resnet, images, job_of, apply):
    outputs = []
    for seed in (0, 0, 1):
        job = job_of(resnet, "w2a4", seed=seed)
        apply(job, insert(AdaRound()), quick(steps=10), synthesizer=NOISE)
        outputs.append(job.student(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_blocks_without_quantizers_are_left_alone(resnet, images, job_of, apply):
    job = job_of(resnet)
    apply(job, quick(steps=2), synthesizer=NOISE)
    assert_close(job.student(images), resnet(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"drop": 1.0}, {"warm_up": 1.0}, {"steps": 0}, {"batch_size": 0}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(RecipeError):
        ReconstructBlocks(**wrong)

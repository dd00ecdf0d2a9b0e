import copy
import math

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.methods import METHODS
from zsq.nets.chains import equalizable_chains, make_equivariant, scale_channels
from zsq.nets.clip import ChannelClip
from zsq.nets.graph import capture
from zsq.quant import (
    SIMULATE_ALL,
    AbsorbBiases,
    BNRanges,
    CorrectBiases,
    EqualizeLayers,
    FoldBatchNorm,
    InsertFakeQuant,
)
from zsq.quant.layers import fold
from zsq.quant.quantizers import activation_quantizers, float_weight, weight_quantizers
from zsq.quant.transfer import clip_target, equalizing_factors

PER_TENSOR = METHODS["dfq"].quantizer[2].protocol


def row(*layers):
    return nn.Sequential(*layers).eval()


def with_ranges(layer, ranges):
    """``layer`` with the largest weight of each of its channels set: outputs, or inputs where it has one output."""
    weight = torch.zeros_like(layer.weight)
    for index, value in enumerate(ranges):
        (weight if len(weight) == len(ranges) else weight.transpose(0, 1))[index].flatten()[0] = value
    layer.weight.data = weight
    return layer


def random_factors(count, seed):
    return 10 ** (3 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 1.5)


def output_ranges(layer):
    return layer.weight.detach().flatten(1).abs().amax(1)


def input_ranges(layer):
    return layer.weight.detach().transpose(0, 1).flatten(1).abs().amax(1)


# --- equalization ----------------------------------------------------------------------------------------------------


def test_folding_and_equalizing_change_no_logits(resnet, mobilenet, images, job_of, apply):
    for network in (resnet, mobilenet):
        job = job_of(network)
        apply(job, FoldBatchNorm(), EqualizeLayers())
        assert (job.student(images) - network(images)).abs().max() < 1e-4
        assert job.student.get_submodule("head").weight is not network.head.weight


def test_equalizing_with_exact_limits_holds_where_values_are_clipped(mobilenet, images, job_of, apply):
    wild = 20 * images  # most channels reach 6
    exact, loose = job_of(mobilenet), job_of(mobilenet)
    apply(exact, EqualizeLayers(exact_clip=True))
    apply(loose, EqualizeLayers(exact_clip=False))
    wanted = mobilenet(wild)
    assert_close(exact.student(wild), wanted, atol=1e-4, rtol=1e-4)
    assert (loose.student(wild) - wanted).abs().max() > 1e-2
    assert any(isinstance(module, ChannelClip) for module in exact.student.modules())
    assert not any(isinstance(module, ChannelClip) for module in loose.student.modules())


def test_a_pair_by_hand(job_of, apply):
    # ranges (8, 0.5) and (2, 2): s = (2, 0.5), both become (4, 1)
    assert equalizing_factors(tensor([8.0, 0.5]), tensor([2.0, 2.0])).tolist() == [2.0, 0.5]
    network = row(with_ranges(nn.Conv2d(3, 2, 1), [8.0, 0.5]), nn.ReLU(), with_ranges(nn.Conv2d(2, 1, 1), [2.0, 2.0]))
    network[0].bias.data = tensor([1.0, 1.0])
    job = job_of(network)
    apply(job, EqualizeLayers())
    first, second = job.student.get_submodule("0"), job.student.get_submodule("2")
    assert_close(output_ranges(first), tensor([4.0, 1.0]))
    assert_close(input_ranges(second), tensor([4.0, 1.0]))
    assert_close(first.bias.detach(), tensor([0.5, 2.0]))


def test_a_triple_converges_to_the_cube_root(job_of, apply):
    # (8, 1, 1): g = 2, s12 = 4, s23 = 2, so that b1 is divided by 4 and b2 by 2; and (27, 1, 8): g = 6, 4.5, 3/4
    network = row(
        with_ranges(nn.Conv2d(3, 2, 1), [8.0, 27.0]),
        nn.ReLU6(),
        with_ranges(nn.Conv2d(2, 2, 1, groups=2), [1.0, 1.0]),
        nn.ReLU6(),
        with_ranges(nn.Conv2d(2, 1, 1), [1.0, 8.0]),
    )
    for index in (0, 2):
        network[index].bias.data = torch.ones(2)
    job = job_of(network)
    apply(job, EqualizeLayers())
    layers = [job.student.get_submodule(name) for name in ("0", "2", "4")]
    for ranges in (output_ranges(layers[0]), output_ranges(layers[1]), input_ranges(layers[2])):
        assert_close(ranges, tensor([2.0, 6.0]), rtol=1e-5, atol=0)
    assert_close(layers[0].bias.detach(), tensor([1 / 4, 1 / 4.5]), rtol=1e-5, atol=0)
    assert_close(layers[1].bias.detach(), tensor([1 / 2, 4 / 3]), rtol=1e-5, atol=0)
    limits = [module.limit for module in job.student.modules() if isinstance(module, ChannelClip)]
    assert_close(limits, [tensor([6 / 4, 6 / 4.5]), tensor([3.0, 8.0])], rtol=1e-5, atol=0)


def test_a_second_equalization_changes_nothing(resnet, mobilenet, job_of, apply):
    for network in (resnet, mobilenet):
        job = job_of(network)
        apply(job, EqualizeLayers())
        before = copy.deepcopy(job.student.state_dict())
        apply(job, EqualizeLayers(sweeps=1))
        for name, value in job.student.state_dict().items():
            assert_close(value, before[name], rtol=1e-6, atol=1e-7)


def test_only_the_inside_of_a_residual_block_is_scaled(resnet, job_of):
    graph = job_of(resnet).student
    fold(graph)
    chains = [chain.layers for chain in equalizable_chains(graph)]
    assert chains == [(f"stages.{n}.0.conv1.0", f"stages.{n}.0.conv2.0") for n in (0, 1)]


def sabotaged(resnet):
    """The same function, with the hidden channels of every block scaled by 10^U(-1.5, 1.5)."""
    network = copy.deepcopy(resnet)
    for index, stage in enumerate(network.stages):
        block = stage[0]
        norm, second = block.conv1[1], block.conv2[0]
        factors = random_factors(norm.num_features, index)
        norm.weight.data /= factors
        norm.bias.data /= factors
        second.weight.data *= factors.view(1, -1, 1, 1)
    return network


def test_equalization_undoes_sabotage_to_the_same_weights(resnet, images, job_of, apply):
    ruined = sabotaged(resnet)
    assert (ruined(images) - resnet(images)).abs().max() < 1e-4
    jobs = [job_of(network) for network in (resnet, ruined)]
    folded = [copy.deepcopy(job) for job in jobs]
    for job in folded:
        fold(job.student)
    name = "stages.0.0.conv1.0"
    assert (folded[0].student.get_submodule(name).weight / folded[1].student.get_submodule(name).weight).max() > 2
    for job in jobs:
        apply(job, EqualizeLayers())
    healthy, repaired = (job.student for job in jobs)
    for key, value in healthy.state_dict().items():
        assert_close(repaired.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    for key, kept in healthy.meta["moments"].items():
        assert_close(repaired.meta["moments"][key].mean, kept.mean, rtol=1e-4, atol=1e-6)
        assert_close(repaired.meta["moments"][key].std, kept.std, rtol=1e-4, atol=1e-6)


def test_equalization_undoes_sabotage_through_clips(mobilenet, images, job_of, apply):
    jobs = [job_of(mobilenet) for _ in range(2)]
    graph = jobs[1].student
    fold(graph)
    make_equivariant(graph)
    for index, link in enumerate(link for chain in equalizable_chains(graph) for link in chain.links):
        first, second = graph.get_submodule(link.first), graph.get_submodule(link.second)
        clip = graph.get_submodule(clip_target(graph, link)) if link.clip else None
        scale_channels(first, second, clip, random_factors(len(first.weight), index))
    assert_close(graph(images), mobilenet(images), atol=1e-4, rtol=1e-4)
    for job in jobs:
        apply(job, EqualizeLayers())
    for key, value in jobs[0].student.state_dict().items():
        assert_close(graph.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_kept_moments_are_scaled_along(mobilenet, job_of, apply):
    job = job_of(mobilenet)
    graph = job.student
    fold(graph)
    before = {name: (copy.deepcopy(kept), graph.get_submodule(name).bias.clone()) for name, kept in _moments(graph)}
    apply(job, EqualizeLayers())
    scaled = 0
    for name, (kept, bias) in before.items():
        factors = bias / graph.get_submodule(name).bias
        scaled += bool((factors - 1).abs().max() > 0.01)
        now = graph.meta["moments"][name]
        assert_close(now.mean * factors, kept.mean, rtol=1e-4, atol=1e-5)
        assert_close(now.std * factors, kept.std, rtol=1e-4, atol=1e-5)
    assert scaled == 5  # the stem, and the expansions and depthwise layers of both blocks
    assert len(before) == 7


def _moments(graph):
    return graph.meta["moments"].items()


def test_dead_channels_have_factor_one():
    first, second = tensor([0.0, 1.0, 1e-20, 4.0, math.inf]), tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    assert equalizing_factors(first, second).tolist() == [1.0, 1.0, 1.0, 2.0, 1.0]


def test_dead_channels_pass_through_every_pass(mobilenet, images, job_of, apply):
    body = mobilenet.blocks[1].body
    body[0].weight.data[3] = 0
    body[3].weight.data[5] = 1e-20
    body[1].weight.data[7] = 0  # constant after BatchNorm
    job = job_of(mobilenet, "w8a8")
    apply(job, *METHODS["dfq"].quantizer)
    state = job.student.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert (job.student(images) - mobilenet(images)).abs().max() < 0.5


@pytest.mark.parametrize("middle", [nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 2, groups=4)], ids=str)
def test_equalization_holds_for_other_layers(middle, job_of, apply):
    torch.manual_seed(0)
    network = row(nn.ConvTranspose2d(3, 4, 2), nn.PReLU(), copy.deepcopy(middle), nn.LeakyReLU(), nn.Conv2d(4, 2, 2))
    network[0].weight.data *= 10 ** torch.linspace(-1, 1, 4).view(1, 4, 1, 1)
    job = job_of(network)
    before = capture(network, torch.zeros(2, 3, 8, 8)).state_dict()
    apply(job, EqualizeLayers())
    x = torch.randn(4, 3, 8, 8)
    assert_close(job.student(x), network(x), atol=1e-4, rtol=1e-4)
    assert len([name for name, value in job.student.state_dict().items() if not torch.equal(value, before[name])]) >= 5
    assert len(equalizable_chains(job.student)[0].layers) == 3


# --- absorption ------------------------------------------------------------------------------------------------------


def always_on(activation, padding=0):
    """A layer whose channel 0 is far above zero and whose channel 1 is not, and the layer that reads them."""
    torch.manual_seed(0)
    network = row(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), activation, nn.Conv2d(2, 3, 3, padding=padding))
    norm = network[1]
    norm.bias.data, norm.weight.data = tensor([9.0, 0.5]), tensor([-0.5, 1.0])
    norm.running_mean.data, norm.running_var.data = tensor([0.2, -0.1]), tensor([3.0, 3.0])
    return network.eval()


def test_absorption_by_hand(job_of, apply):
    network = always_on(nn.ReLU())
    job = job_of(network)
    apply(job, FoldBatchNorm())
    first, second = job.student.get_submodule("0"), job.student.get_submodule("3")
    biases = first.bias.clone(), second.bias.clone()
    apply(job, AbsorbBiases(sigmas=3.0))
    # c = max(0, 9 - 3 * |-0.5|) = 7.5 and max(0, 0.5 - 3) = 0
    assert_close(biases[0] - first.bias, tensor([7.5, 0.0]))
    assert_close(second.bias - biases[1], 7.5 * network[3].weight[:, 0].sum((1, 2)))
    assert_close(job.student.meta["moments"]["0"].mean, tensor([1.5, 0.5]))
    assert_close(job.student.meta["moments"]["0"].std, tensor([0.5, 1.0]))


@pytest.mark.parametrize("padding", [0, 1])
def test_absorption_leaves_interior_outputs_unchanged(padding, images, job_of, apply):
    network = always_on(nn.ReLU(), padding)
    job = job_of(network)
    apply(job, FoldBatchNorm(), AbsorbBiases())
    found, wanted = job.student(images), network(images)
    inside = slice(padding, found.shape[2] - padding)
    assert_close(found[:, :, inside, inside], wanted[:, :, inside, inside], atol=1e-4, rtol=1e-4)
    if padding:  # where a border position reads 0 instead of c
        assert (found - wanted).abs().max() > 0.1


def test_between_two_layers_without_activation_all_is_absorbed(images, job_of, apply):
    network = always_on(nn.Identity())
    job = job_of(network)
    apply(job, FoldBatchNorm(), AbsorbBiases())
    assert_close(job.student.meta["moments"]["0"].mean, torch.zeros(2))
    assert_close(job.student(images), network(images), atol=1e-4, rtol=1e-4)


def test_clipped_channels_are_left_alone(images, job_of, apply):
    network = always_on(nn.ReLU6())
    job = job_of(network)
    apply(job, EqualizeLayers())
    before = copy.deepcopy(job.student.state_dict())
    apply(job, AbsorbBiases())
    assert all(torch.equal(value, before[name]) for name, value in job.student.state_dict().items())


def test_no_negative_number_of_deviations():
    with pytest.raises(RecipeError):
        AbsorbBiases(sigmas=-1.0)


# --- bias correction -------------------------------------------------------------------------------------------------


def corrected(job_of, apply, relu=None, bits="w2a32"):
    """A job whose second layer reads a rectified normal, before and after correction, and what it reads."""
    torch.manual_seed(0)
    network = row(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), relu or nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten())
    network[1].bias.data = torch.linspace(-1, 2, 6)
    network[1].weight.data = torch.linspace(-1.5, 2, 6)
    job = job_of(network, bits)
    apply(job, InsertFakeQuant(protocol=SIMULATE_ALL))
    kept = job.student.meta["moments"]["0"]
    noise = torch.randn(100_000, 6, generator=torch.Generator().manual_seed(1))
    x = network[2](kept.mean + kept.std * noise)[:, :, None, None]
    return job, job.student.get_submodule("3"), x


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU6()], ids=str)
def test_correction_takes_the_mean_error_out(relu, job_of, apply):
    job, layer, x = corrected(job_of, apply, relu)
    wanted = nn.functional.conv2d(x, float_weight(layer), layer.bias)
    shift = ((layer.weight - float_weight(layer)).flatten(1) @ x.flatten(1).mean(0)).detach()
    before = (layer(x) - wanted).detach().flatten(1)
    bound = 4 * before.std(0) / math.sqrt(len(x))
    assert_close(before.mean(0), shift, atol=1e-4, rtol=0)
    assert (before.mean(0).abs() > bound).all()  # there is something to correct
    apply(job, CorrectBiases())
    after = (layer(x) - wanted).detach().flatten(1)
    assert (after.mean(0).abs() <= bound).all()


def test_correction_leaves_the_first_layer_and_float_layers_alone(job_of, apply):
    for bits, changed in (("w2a32", True), ("w32a32", False)):
        job, layer, _ = corrected(job_of, apply, bits=bits)
        first, second = job.student.get_submodule("0").bias.clone(), layer.bias.clone()
        apply(job, CorrectBiases())
        assert torch.equal(job.student.get_submodule("0").bias, first)  # images have mean 0
        assert torch.equal(layer.bias, second) is not changed


def test_correction_at_8_bits_is_small_and_keeps_the_moments(resnet, images, job_of, apply):
    job = job_of(resnet, "w8a32")
    apply(job, InsertFakeQuant(protocol=SIMULATE_ALL))
    moments = copy.deepcopy(job.student.meta["moments"])
    before = job.student(images)
    apply(job, CorrectBiases())
    assert (job.student(images) - before).abs().max() < 0.05
    for name, kept in job.student.meta["moments"].items():
        assert torch.equal(kept.mean, moments[name].mean)


def test_a_layer_without_bias_gets_one(job_of, apply):
    network = row(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten())
    job = job_of(network, "w2a32")
    apply(job, InsertFakeQuant(protocol=SIMULATE_ALL), CorrectBiases())
    assert job.student.get_submodule("3").bias.shape == (2,)


# --- together --------------------------------------------------------------------------------------------------------


def test_equalization_saves_a_sabotaged_network_per_tensor(resnet, images, job_of, apply):
    wanted = resnet(images)
    errors = []
    for passes in ((FoldBatchNorm(),), (EqualizeLayers(),)):
        job = job_of(sabotaged(resnet), "w8a32")
        apply(job, *passes, InsertFakeQuant(protocol=PER_TENSOR))
        errors.append((job.student(images) - wanted).square().mean().item())
    assert errors[1] < errors[0] / 5


def test_the_whole_method_sets_every_quantizer_without_an_image(mobilenet, images, job_of, apply):
    job = job_of(mobilenet, "w8a8")
    apply(job, *METHODS["dfq"].quantizer)
    assert isinstance(METHODS["dfq"].quantizer[-1], BNRanges)
    assert all(quantizer.ready for quantizer in activation_quantizers(job.student).values())
    assert all(quantizer.scale.numel() == 1 for _, quantizer in weight_quantizers(job.student).values())
    wanted = mobilenet(images)
    assert (job.student(images) - wanted).abs().max() < 0.3 * wanted.abs().max()

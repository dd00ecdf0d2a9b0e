from importlib import resources

import pytest
import torch

from zsq import zoo
from zsq.core.errors import CheckpointError, RunError, UnsupportedModel
from zsq.evaluate import Images, evaluate, read_images
from zsq.zoo.networks import MobileNetV2, ResNet, vision_transformer
from zsq.zoo.pytorchcv import from_pytorchcv, to_pytorchcv
from zsq.zoo.train import (
    RECIPES,
    TrainingRecipe,
    augmented,
    build_optimizers,
    half_of_the_patches,
    train,
    training_loss,
)


@pytest.fixture(params=zoo.MODELS)
def model(request):
    """Every entry of the zoo; the transformer is timm's."""
    if request.param == "vit-cifar10":
        request.getfixturevalue("vision")
    return zoo.entry(request.param)


def test_every_network_fits_its_entry_and_has_a_recipe_and_a_card(model):
    network = model.build().eval()
    with torch.no_grad():
        assert network(torch.zeros(2, *model.input_shape)).shape == (2, model.classes)
    assert len(model.mean) == len(model.std) == model.input_shape[0]
    assert model.name in RECIPES
    card = (resources.files("zsq.zoo") / "cards" / f"{model.name}.md").read_text()
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in card


def test_shipped_weights_load_in_eval_mode_and_are_finite(model):
    network = zoo.load_weights(model.name)
    assert not any(module.training for module in network.modules())
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_the_digits_network_has_the_accuracy_of_its_card():
    pytest.importorskip("sklearn")
    model = zoo.entry("digits-resnet")
    accuracy = evaluate(zoo.load_weights(model.name), read_images("digits"), mean=model.mean, std=model.std)
    assert accuracy.top1 == pytest.approx(98.52, abs=0.4)  # two images, for other processors


def test_an_unknown_name_lists_what_is_close():
    with pytest.raises(UnsupportedModel, match="no network 'resnet-cifar10' in the zoo: it has resnet20-cifar10"):
        zoo.load_weights("resnet-cifar10")
    with pytest.raises(UnsupportedModel, match="digits-resnet, resnet20-cifar10, mobilenetv2-cifar10, vit-cifar10"):
        zoo.entry("x")


def test_weights_that_are_not_installed_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="weights of digits-resnet are not part of this installation"):
        zoo.load_weights("digits-resnet")


def test_resnet20_and_mobilenetv2_have_the_strides_of_their_papers():
    resnet, mobilenet = ResNet(3, (16, 32, 64), 10).eval(), MobileNetV2(10).eval()
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert resnet.stages(resnet.stem(x)).shape == (1, 64, 8, 8)
        assert mobilenet.blocks(mobilenet.stem(x)).shape == (1, 80, 4, 4)


def test_pytorchcv_names_go_there_and_back():
    state = zoo.MODELS["resnet20-cifar10"].build().state_dict()
    theirs = to_pytorchcv(state)
    assert from_pytorchcv(theirs).keys() == state.keys()
    assert len(theirs) == len(state)
    assert all(key.startswith(("features.init_block.", "features.stage", "output.")) for key in theirs)
    assert theirs["features.stage3.unit1.identity_conv.conv.weight"].shape == (64, 32, 1, 1)
    assert theirs["features.stage1.unit3.body.conv2.bn.running_var"].shape == (16,)


# -- training -----------------------------------------------------------------------------------------------------


def test_augmented_images_are_crops_of_the_padded_image():
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1)
    recipe = TrainingRecipe(epochs=1, lr=0.1, shift=1, padding="constant", flip=False)
    padded = torch.zeros(6, 6, dtype=torch.uint8)
    padded[1:5, 1:5] = image[0, :, :, 0]
    crops = {padded[top : top + 4, left : left + 4].numpy().tobytes() for top in range(3) for left in range(3)}
    seen = augmented(image.expand(200, -1, -1, -1), recipe, torch.Generator().manual_seed(0))
    assert seen.shape == (200, 1, 4, 4)
    assert {x[0].numpy().tobytes() for x in seen} == crops


def test_half_of_the_augmented_images_are_mirrored():
    image = torch.arange(1, 4, dtype=torch.uint8).view(1, 1, 3, 1)
    recipe = TrainingRecipe(epochs=1, lr=0.1, shift=0)
    seen = augmented(image.expand(200, 3, -1, -1), recipe, torch.Generator().manual_seed(0))[:, 0, 0].tolist()
    assert 70 < seen.count([3, 2, 1]) < 130
    assert seen.count([3, 2, 1]) + seen.count([1, 2, 3]) == 200


def test_training_loss_by_hand():
    # logits (0, 0) give ln 2 of cross entropy; a teacher that agrees adds nothing, so half of it is left
    logits, labels = torch.zeros(1, 2), torch.tensor([0])
    assert training_loss(logits, labels, None, 4.0).item() == pytest.approx(0.693147, abs=1e-6)
    assert training_loss(logits, labels, torch.zeros(1, 2), 4.0).item() == pytest.approx(0.346574, abs=1e-6)
    # softmax((4 ln 3, 0) / 4) = (3/4, 1/4): KL to (1/2, 1/2) is 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812, times 16 / 2
    target = torch.tensor([[4 * 1.0986123, 0.0]])
    assert training_loss(logits, labels, target, 4.0).item() == pytest.approx(0.346574 + 8 * 0.130812, abs=1e-4)


def test_muon_steps_the_matrices_of_blocks_and_adamw_all_others_once(vision):
    vit = vision_transformer(size=8, patch=4, width=8, depth=2, heads=2, classes=3)
    muon, adamw = build_optimizers(vit, TrainingRecipe(epochs=1, lr=0.1, optimizer="muon"))
    stepped = [[p for group in each.param_groups for p in group["params"]] for each in (muon, adamw)]
    assert len(stepped[0]) == 2 * 4  # qkv, proj, fc1 and fc2 of two blocks
    assert {id(p) for part in stepped for p in part} == {id(p) for p in vit.parameters()}
    assert sum(map(len, stepped)) == len(list(vit.parameters()))
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)


def test_half_of_the_patches_and_the_class_token_reach_the_blocks(vision):
    vit = vision_transformer(size=16, patch=4, width=8, depth=1, heads=2, classes=3)
    whole, seen = [], []
    vit.pos_drop.register_forward_hook(lambda _, __, tokens: whole.append(tokens))
    vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images, rng = torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(0)
    with torch.no_grad(), half_of_the_patches(vit, rng):
        vit(images)
        vit(images)
    with torch.no_grad():
        vit(images)
    first, second, after = seen
    assert [tokens.shape for tokens in seen] == [(2, 9, 8), (2, 9, 8), (2, 17, 8)]
    assert torch.equal(first[:, 0], whole[0][:, 0])
    patches = {row.numpy().tobytes() for row in whole[0][0, 1:]}
    kept = {row.numpy().tobytes() for row in first[0, 1:]}
    assert len(kept) == 8
    assert kept < patches
    assert not torch.equal(first, second)
    assert torch.equal(after, whole[2])


def test_training_goes_on_bit_for_bit_and_refuses_another_recipe(tmp_path, monkeypatch):
    model = zoo.entry("digits-resnet")
    rng = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(256, (32, 8, 8, 1), generator=rng, dtype=torch.uint8), torch.randint(10, (32,), generator=rng)
    )
    recipe = TrainingRecipe(epochs=3, lr=0.1, batch_size=16, shift=1, teacher="digits-resnet")
    whole, _ = train(model, recipe, images, images, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_two(line, **_):
        if line.startswith("epoch   2"):
            raise Stop

    monkeypatch.setattr("builtins.print", stop_after_two)
    with pytest.raises(Stop):
        train(model, recipe, images, images, tmp_path / "parts")
    resumed, _ = train(model, recipe, images, images, tmp_path / "parts")
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in whole.state_dict().items())
    with pytest.raises(RunError, match="choose another --out"):
        train(model, TrainingRecipe(epochs=4, lr=0.1), images, images, tmp_path / "parts")

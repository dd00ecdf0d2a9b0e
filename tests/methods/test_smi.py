from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from zsq.core import Batch, Recipe, RecipeError, Run, Source, View
from zsq.core.attention import Attention
from zsq.core.teacher import look
from zsq.losses import CrossEntropy
from zsq.methods import METHODS
from zsq.nets.graph import capture
from zsq.quant import SIMULATE_ALL, Calibrate, InsertFakeQuant
from zsq.quant.quantizers import activation_quantizers
from zsq.synthesis import CropAndFlip, InTurn, OptimizeImages, ShiftAndFlip, UniformLabels
from zsq.synthesis.patches import FinalAttention, StopPatches, attention_of_class_token, most_attended, moved, shown
from zsq.synthesis.sampling import Shift

SMI = METHODS["smi"]
SMALL = SMI.synthesizer.override(
    {"samples": 4, "batch_size": 4, "steps": 12, "patches.stops": (2, 4, 5), "patches.share": 0.3}
)
GRID, PATCH = (14, 14), (16, 16)
COUNTS = {14: (137, 95, 66, 46), 7: (34, 23, 16, 11)}
"""Patches a side: how many are left after each stop, by the card."""


def made(recipe, job):
    return Source(recipe, job).take()


def counted(recipe, job):
    """The batch; of each step how many tokens it looked at and whether unmoved; and when attention was read."""
    seen, read, view = [], [], job.teacher.view

    def watched(images, needs=frozenset(), *, tokens=None, pixels=None, **more):
        count = None if tokens is None else tokens.shape[1]
        if pixels is not None:
            seen.append((count, torch.equal(images, pixels)))
        elif "attention" in needs:
            read.append((len(seen), count))
        return view(images, needs, tokens=tokens, pixels=pixels, **more)

    job.teacher.view = watched
    return made(recipe, job), seen, read


# --- the card: "How to check", 1: token counts ------------------------------------------------------------------


class Geometry(nn.Module):
    """What a patch stop needs of a network: patches of 16 or 32 pixels, a class token, and one attention."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 224 // side, 224 // side)
        self.token = nn.Parameter(torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0)))
        self.drop = nn.Dropout()
        self.block, self.head = tiny.TransformerBlock(4, 1, fused=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        return self.head(self.block(x)[:, 0])


@pytest.mark.parametrize("side", [14, 7])
def test_the_counts_of_the_card(side, job_for):
    network = tiny.lively(Geometry(side))
    job = job_for(tiny.vit())
    job.teacher.module, job.input_shape = network, (3, 224, 224)
    job.teacher.landmarks = capture(network, torch.zeros(2, 3, 224, 224)).meta["landmarks"]
    assert (job.teacher.landmarks.prefix, job.teacher.landmarks.grid) == (1, (side, side))
    recipe = SMI.synthesizer.override({"samples": 2, "batch_size": 2, "steps": 6, "patches.stops": (1, 2, 3, 4)})
    batch, seen, _ = counted(recipe, job)
    assert [count for count, _ in seen] == [None, *(1 + left for left in COUNTS[side]), 1 + COUNTS[side][-1]]
    assert batch.tokens.shape == (2, 1 + COUNTS[side][-1])
    released = made(recipe.override({"patches.mask": FinalAttention()}), job)
    assert released.tokens.shape[1] - 1 == {14: 47, 7: 12}[side]


# --- 2: tokens that are left out --------------------------------------------------------------------------------


def test_all_tokens_in_any_order_give_the_logits_of_the_network(job_for, photos):
    job = job_for(tiny.vit())
    wanted = job.teacher.view(photos).logits
    every = torch.arange(17).expand(16, -1)
    assert_close(job.teacher.view(photos, tokens=every).logits, wanted, atol=1e-5, rtol=0)
    rng = torch.Generator().manual_seed(0)
    mixed = torch.stack(
        [torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(16, generator=rng)]) for _ in range(16)]
    )
    assert_close(job.teacher.view(photos, tokens=mixed).logits, wanted, atol=1e-4, rtol=0)


# --- 3: where patches are after a move --------------------------------------------------------------------------


def place(token, down=0, right=0, mirrored=False):
    return moved(torch.tensor([[token]]), Shift(down, right, mirrored), 1, GRID, PATCH).item()


@pytest.mark.parametrize(
    ("down", "one", "last"),
    [(16, 15, 14), (7, 1, 196), (9, 15, 14), (-5, 1, 196), (-9, 183, 182), (8, 15, 14), (-8, 1, 196)],
)
def test_moves_of_the_card(down, one, last):
    assert (place(1, down), place(196, down)) == (one, last)


def test_a_mirrored_row_is_reversed_after_it_was_moved():
    assert place(1, mirrored=True) == 14
    assert place(1, right=16, mirrored=True) == 13  # to 2, then mirrored


@pytest.mark.parametrize("down", [-28, -8, 0, 13, 28])
@pytest.mark.parametrize("mirrored", [True, False])
def test_every_move_is_a_bijection_that_leaves_the_class_token(down, mirrored):
    every = torch.arange(197)[None]
    there = moved(every, Shift(down, 11, mirrored), 1, GRID, PATCH)
    assert there[0, 0] == 0
    assert there.sort().values.tolist() == every.tolist()
    assert torch.equal(moved(every, Shift(0, 0, False), 1, GRID, PATCH), every)


def test_a_move_by_whole_patches_finds_the_same_pixels():
    images = torch.arange(3.0 * 8 * 8).view(1, 3, 8, 8)
    shift = Shift(4, -2, True)
    there = moved(torch.arange(17)[None], shift, 1, (4, 4), (2, 2))[0]

    def patch(x, token):
        row, column = divmod(token - 1, 4)
        return x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]

    for token in range(1, 17):
        assert torch.equal(patch(shift.move(images), there[token].item()), patch(images, token).flip(2))


# --- importance -------------------------------------------------------------------------------------------------


def test_the_patches_that_stay_are_those_of_most_attention():
    tokens = torch.tensor([[0, 5, 2, 9], [0, 1, 7, 3]])
    importance = torch.tensor([[0.1, 0.3, 0.2], [0.6, 0.1, 0.3]])
    assert most_attended(tokens, importance, 1, 2).tolist() == [[0, 2, 9], [0, 1, 3]]


def test_importance_is_the_row_of_the_class_token_in_the_last_attention():
    # two heads; the class token reads itself 0.5 and 0.2, the patches 0.3 + 0.2 and 0.4 + 0.4
    last = torch.zeros(1, 2, 3, 3)
    last[0, :, 0] = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]])
    layers = [Attention(torch.rand(1, 2, 3, 3), torch.empty(0), 1), Attention(last, torch.empty(0), 1)]
    view = View(torch.empty(1, 3, 2, 2), torch.empty(1, 2), attention=layers)
    assert_close(attention_of_class_token(view, 1), torch.tensor([[0.35, 0.3]]))


def test_attention_is_read_before_a_stop_and_both_looks_are_still(job_for):
    batch, seen, read = counted(SMALL, job_for(tiny.vit()))
    # 16 patches: int(16 * 0.7) = 11, then 7, then 4; the stops are steps 2, 4 and 5
    assert [count for count, _ in seen] == [None, None, 12, 12, 8, *[5] * 7]
    assert read == [(1, 17), (3, 12), (4, 8)]
    still = [step for step, (_, same) in enumerate(seen) if same]
    assert {1, 2, 3, 4, 5} <= set(still)
    assert len(still) < 12
    assert batch.tokens.shape == (4, 5)
    assert (batch.tokens[:, 0] == 0).all()
    assert all(len(set(row)) == 5 for row in batch.tokens.tolist())


def test_the_last_patch_stays(job_for):
    recipe = SMALL.override({"patches.stops": (1, 2, 3, 4), "patches.share": 0.9})
    assert made(recipe, job_for(tiny.vit())).tokens.shape == (4, 2)


# --- 4 and 5: what is not changed -------------------------------------------------------------------------------


def test_without_stops_it_is_a_plain_inversion(job_for):
    dense = SMI.preset("dense").synthesizer.override({"samples": 4, "batch_size": 4, "steps": 12})
    never = SMALL.override({"patches.stops": ()})
    late = SMALL.override({"patches.stops": (99,)})
    batches = [made(recipe, job_for(tiny.vit())) for recipe in (dense, never, late)]
    assert all(torch.equal(batch.images, batches[0].images) and batch.tokens is None for batch in batches)
    assert not torch.equal(made(SMALL, job_for(tiny.vit())).images, batches[0].images)


@dataclass(frozen=True, kw_only=True)
class Nothing(Recipe):
    """A mask that blanks nothing."""

    def keep(self, job, pixels, tokens, share):
        return Batch(pixels, tokens=tokens)


def test_pixels_of_patches_that_are_left_out_do_not_change(job_for):
    still = OptimizeImages(
        loss=CrossEntropy(),
        labels=UniformLabels(),
        patches=StopPatches(stops=(3, 6), mask=Nothing()),
        samples=4,
        batch_size=4,
        lr=0.25,
        betas=(0.0, 0.99),
        schedule=None,
    )
    job = job_for(tiny.vit())
    early, late = (made(still.override({"steps": steps}), job_for(tiny.vit())) for steps in (7, 20))
    assert torch.equal(early.tokens, late.tokens)
    looked_at = shown(job, late.tokens).bool().expand_as(late.images)
    assert torch.equal(early.images[~looked_at], late.images[~looked_at])
    assert not torch.isclose(early.images[looked_at], late.images[looked_at]).any()


def test_what_is_not_looked_at_is_blank_in_the_end(job_for):
    job = job_for(tiny.vit())
    batch = made(SMALL, job)
    blank = (batch.images == 0).all(1, keepdim=True)
    assert torch.equal(blank, shown(job, batch.tokens) == 0)
    assert blank.float().mean() == 12 / 16


# --- the released code's end ------------------------------------------------------------------------------------


def test_the_released_mask_stores_8_bits_and_greys_black(job_for):
    job = job_for(tiny.vit())
    job.pixel_box = ((-2.0, 2.0), (-1.0, 3.0), (-1.5, 1.5))
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1
    pixels = pixels.clamp(min=-1.0)
    pixels[:, 1, :2] = -1.0  # black in the second channel
    batch = FinalAttention().keep(job, pixels, torch.arange(17).expand(2, -1), 0.7**4)
    assert batch.tokens.shape == (2, 1 + int(17 * 0.7**4))
    low, high = torch.tensor(job.pixel_box).T[:, None, :, None, None]
    steps = (batch.images - low) / (high - low) * 255
    grey = batch.images == 0
    assert_close(steps[~grey], steps[~grey].round(), atol=1e-3, rtol=0)
    assert grey[(shown(job, batch.tokens) == 0).expand_as(grey)].all()
    kept = ~grey
    lost = (pixels - batch.images)[kept] / (high - low).expand_as(pixels)[kept]
    assert lost.min() >= -1e-6
    assert lost.max() <= 1 / 255 + 1e-6  # rounded downwards


# --- 6: the time saved ------------------------------------------------------------------------------------------


def test_the_work_of_4000_steps_is_a_third_of_what_it_would_be():
    """In multiplications of the forward and backward pass on the geometry of DeiT-Tiny, one block of its twelve."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.drop = nn.Conv2d(3, 192, 16, 16), nn.Dropout()
            self.token, self.head = nn.Parameter(torch.zeros(1, 1, 192)), nn.Linear(192, 10)
            self.blocks = nn.Sequential(*(tiny.TransformerBlock(192, 3, fused=False) for _ in range(12)))

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = self.blocks(self.drop(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)))
            return self.head(x[:, 0])

    network = Block().eval().requires_grad_(False)
    marks = capture(network, torch.zeros(2, 3, 224, 224)).meta["landmarks"]

    def cost(count):
        images = torch.zeros(1, 3, 224, 224, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            look(network, images, frozenset(), marks, torch.arange(count)[None])[0].sum().backward()
        return counter.get_total_flops()

    spans = zip((50, 50, 100, 100, 3700), (197, *(1 + count for count in COUNTS[14])), strict=True)
    assert 4000 * cost(197) / sum(steps * cost(count) for steps, count in spans) >= 3


# --- 7: ranges --------------------------------------------------------------------------------------------------


def test_ranges_of_the_tokens_that_are_left_lie_within_those_of_all(job_for):
    """Up to the first attention: behind it the tokens that are left have read less, and are others."""
    batch, widths = made(SMALL, job_for(tiny.unfused_vit())), []
    for tokens in (batch.tokens, None):
        job = job_for(tiny.unfused_vit(), bits="w32a8")
        source = Source(SMALL, job)
        source.take = lambda samples, tokens=tokens: Batch(batch.images, tokens=tokens)
        InsertFakeQuant(protocol=SIMULATE_ALL).apply(job, source)
        Calibrate(samples=4, batch_size=4).apply(job, source)
        names = [
            str(node.target) for node in job.student.graph.nodes if node.op == "call_module" or "softmax" in node.name
        ]
        quantizers = activation_quantizers(job.student)
        widths.append(
            {name: quantizers[name].scale.item() for name in names[: names.index("softmax")] if name in quantizers}
        )
    some, every = widths
    assert some.keys() == every.keys()
    assert all(some[name] <= every[name] * (1 + 1e-6) for name in some)
    narrower = [name.rpartition(".")[2] for name in some if some[name] < 0.999 * every[name]]
    assert "blocks_0_qkv" in narrower
    assert len(narrower) >= 2


# --- settings ---------------------------------------------------------------------------------------------------


def test_the_settings_are_those_of_the_card():
    makes = SMI.synthesizer
    assert {name: term.weight for name, term in makes.loss.parts().items()} == {
        "cross_entropy": 1,
        "total_variation": 1e-4,
    }
    assert makes.loss.parts()["total_variation"].target is None
    assert makes.loss.parts()["total_variation"].still
    assert (makes.samples, makes.batch_size, makes.steps, makes.lr, makes.betas) == (32, 32, 4000, 0.25, (0.5, 0.99))
    assert (makes.schedule, makes.clamp) == (None, True)
    assert (makes.patches.stops, makes.patches.share) == ((50, 100, 200, 300), 0.3)
    assert (round(224 * makes.jitter.limit), makes.jitter.diagonal) == (28, False)


@pytest.mark.parametrize("stops", [(0, 1), (5, 5), (7, 3)])
def test_stops_out_of_order_are_refused(stops):
    with pytest.raises(RecipeError, match="stops must be steps in ascending order, from 1 up"):
        StopPatches(stops=stops)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_all_or_nothing_is_refused(share):
    with pytest.raises(RecipeError, match="share must lie between 0 and 1"):
        StopPatches(share=share)


@pytest.mark.parametrize("jitter", [CropAndFlip(), InTurn(first=ShiftAndFlip(), second=CropAndFlip())])
def test_patches_cannot_be_followed_through_every_jitter(jitter):
    with pytest.raises(RecipeError, match="patches can be followed through a ShiftAndFlip alone"):
        SMI.synthesizer.override({"jitter": jitter})


def test_other_objectives_can_leave_patches_out_too(job_for):
    recipe = METHODS["psaq-vit"].synthesizer.override(
        {"patches": StopPatches(stops=(2,)), "samples": 4, "batch_size": 4}
    )
    assert made(recipe.override({"steps": 4}), job_for(tiny.vit())).tokens.shape == (4, 12)


def test_a_kept_batch_comes_back_with_its_tokens(job_for, tmp_path):
    first, again = (made(SMALL, job_for(tiny.vit(), Run(tmp_path, device="cpu"))) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.images, again.images)

"""Sources, and the traps that lazily made images set."""

import gc
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from zsq.core import Batch, Recipe, RecipeError, Run, Source, View


@dataclass(frozen=True, kw_only=True)
class Counted(Recipe):
    """Batches whose pixels are their number in the set; each needs a gradient to be made."""

    sizes: tuple[int, ...] = (4, 4, 2)
    labelled: bool = True
    live: ClassVar[bool] = False

    def stream(self, job):
        first = 0
        for size in self.sizes:
            x = torch.arange(first, first + size, dtype=torch.float32)[:, None, None, None].requires_grad_()
            (x.square().sum() / 2).backward()  # d/dx = x
            yield Batch(x.grad.clone(), x.grad[:, 0, 0, 0].long() if self.labelled else None)
            first += size


@dataclass(frozen=True, kw_only=True)
class Endless(Counted):
    live: ClassVar[bool] = True

    def stream(self, job):
        for number in range(1000):
            yield Batch(torch.full((2, 1, 1, 1), float(number)))


@dataclass
class FakeJob:
    run: Run


@pytest.fixture
def job():
    return FakeJob(Run(device="cpu"))


def pixels(batch: Batch) -> list[int]:
    return batch.images.flatten().int().tolist()


def test_images_are_made_with_gradients_under_no_grad(job):
    with torch.no_grad():
        assert pixels(Source(Counted(), job).take(3)) == [0, 1, 2]
        assert pixels(Source(Counted(), job).batch(0, 10)) != []


def test_a_finite_set_serves_every_pass(job):
    source = Source(Counted(), job)
    assert pixels(source.take()) == pixels(source.take()) == list(range(10))
    assert pixels(source.take(3)) == [0, 1, 2]
    assert [pixels(each) for each in source.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [pixels(each) for each in source.batches(4, samples=6)] == [[0, 1, 2, 3], [4, 5]]


def test_a_consumer_that_leaves_early_closes_nothing(job):
    source = Source(Counted(), job)
    reader = source.batches(4)
    next(reader)
    del reader
    gc.collect()
    assert pixels(source.take()) == list(range(10))


def test_no_more_is_made_than_asked_for(job):
    made = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Counted):
        def stream(self, job):
            for batch in super().stream(job):
                made.append(len(batch))
                yield batch

    source = Source(Watched(), job)
    assert made == []
    source.take(3)
    assert made == [4]
    source.take(5)
    assert made == [4, 4]


def test_the_batch_of_a_step_is_a_function_of_the_seed_and_the_step():
    first = Source(Counted(), FakeJob(Run(device="cpu", seed=5)))
    there = [pixels(first.batch(step, 3)) for step in range(9)]
    second = Source(Counted(), FakeJob(Run(device="cpu", seed=5)))
    assert [pixels(second.batch(step, 3)) for step in (7, 4, 8)] == [there[7], there[4], there[8]]  # resumed midway
    other = Source(Counted(), FakeJob(Run(device="cpu", seed=6)))
    assert [pixels(other.batch(step, 3)) for step in range(9)] != there
    for start in (0, 3, 6):  # 10 images make rounds of three batches of 3, no image twice
        assert len({image for batch in there[start : start + 3] for image in batch}) == 9
    assert there[:3] != there[3:6]


def test_a_batch_larger_than_the_set_is_refused(job):
    assert sorted(pixels(Source(Counted(), job).batch(7, 10))) == list(range(10))
    with pytest.raises(RecipeError, match="a batch of 11 is larger than the set of 10 images"):
        Source(Counted(), job).batch(0, 11)


def test_labels_stay_with_their_images(job):
    batch = Source(Counted(), job).batch(4, 5)
    assert batch.labels.tolist() == pixels(batch)
    assert Source(Counted(labelled=False), job).take().labels is None


def test_joining_keeps_labels_only_if_all_have_them():
    with_labels, without = Batch(torch.zeros(2, 1, 1, 1), torch.tensor([1, 2])), Batch(torch.ones(1, 1, 1, 1))
    assert Batch.join([with_labels, with_labels]).labels.tolist() == [1, 2, 1, 2]
    assert Batch.join([with_labels, without]).labels is None
    assert len(Batch.join([with_labels, without])) == 3


def test_a_live_stream_moves_on_at_each_step(job):
    source = Source(Endless(), job)
    assert [pixels(source.batch(step, 8)) for step in range(3)] == [[0, 0], [1, 1], [2, 2]]
    assert pixels(source.take(3)) == [3, 3, 4]
    assert pixels(source.take(3)) == [3, 3, 4]
    with pytest.raises(RecipeError, match="without end: say how many"):
        source.take()


def test_asking_for_more_gives_all_there_is(job):
    assert len(Source(Counted(), job).take(99)) == 10


def test_a_set_without_images_is_a_mistake(job):
    with pytest.raises(RecipeError, match="made no images"):
        Source(Counted(sizes=()), job).take()


# --- labels and logits ------------------------------------------------------------------------------------------


def test_joining_keeps_labels_only_of_one_kind():
    images = torch.zeros(2, 1, 1, 1)
    indices, shares = Batch(images, torch.tensor([1, 2])), Batch(images, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert Batch.join([indices, shares]).labels is None
    assert Batch.join([shares, shares]).labels.tolist() == [[0.5, 0.5], [1.0, 0.0]] * 2


def test_joining_keeps_logits_only_if_all_have_them():
    images, logits = torch.zeros(2, 1, 1, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    known, unknown = Batch(images, logits=logits), Batch(images, torch.tensor([1, 2]))
    assert torch.equal(Batch.join([known, known]).logits, torch.cat([logits, logits]))
    assert Batch.join([known, unknown]).logits is None
    assert Batch.join([unknown, unknown]).logits is None


def test_a_part_of_a_batch_keeps_labels_and_logits():
    images = torch.arange(3.0)[:, None, None, None]
    batch = Batch(images, torch.tensor([5, 6, 7]), torch.tensor([[1.0], [2.0], [3.0]]))
    part = batch[torch.tensor([2, 0])]
    assert (pixels(part), part.labels.tolist(), part.logits.tolist()) == ([2, 0], [7, 5], [[3.0], [1.0]])
    assert len(batch[1:]) == 2
    assert Batch(images)[:1] == Batch(images[:1])


def test_tokens_stay_with_their_images():
    images, tokens = torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4]])
    batch = Batch(images, tokens=tokens)
    assert batch[torch.tensor([2, 0])].tokens.tolist() == [[0, 3], [0, 1]]
    assert Batch.join([batch[:1], batch[1:]]).tokens.tolist() == tokens.tolist()
    assert Batch.join([Batch(images), Batch(images)]).tokens is None
    for other in (Batch(images), Batch(images, tokens=tokens[:, :1])):
        with pytest.raises(RecipeError, match="each image keeps another number of tokens cannot be joined"):
            Batch.join([batch, other])


@dataclass
class Watching:
    """A teacher whose logits are the pixel and its double, and who counts."""

    seen: list[int]

    def view(self, images, needs=frozenset(), tokens=None):
        self.seen.append(len(images))
        assert not torch.is_grad_enabled()
        return View(images, images.flatten(1) * torch.tensor([[1.0, 2.0]]))


@dataclass
class JudgedJob(FakeJob):
    teacher: Watching


def test_the_teacher_judges_every_image_once():
    job = JudgedJob(Run(device="cpu"), Watching([]))
    source = Source(Counted(), job)
    assert source.batch(0, 4).logits is None
    source.tell_logits(size=4)
    source.tell_logits(size=4)
    assert job.teacher.seen == [4, 4, 2]
    for step in range(5):
        batch = source.batch(step, 4)
        assert batch.logits[:, 0].tolist() == batch.labels.tolist() == pixels(batch)
    assert source.take(3).logits.tolist() == [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    assert [each.logits.shape for each in source.batches(8)] == [(8, 2), (2, 2)]


def test_telling_logits_changes_no_batch():
    plain, told = (Source(Counted(), JudgedJob(Run(device="cpu"), Watching([]))) for _ in range(2))
    told.tell_logits()
    for step in range(4):
        assert pixels(plain.batch(step, 3)) == pixels(told.batch(step, 3))


def test_a_live_stream_cannot_be_judged_once(job):
    with pytest.raises(RecipeError, match="without end: say how many"):
        Source(Endless(), job).tell_logits()

"""RandAugment: torchvision's to the bit, and a function of (seed, epoch, image) alone."""

import pytest
import torch
from torchvision import transforms
from torchvision.transforms import autoaugment

from cxv.data.augment import _OPS, NUM_BINS, RandAugment
from cxv.data.loader import ImageSet, batches, normalize


def uint8_images(n, channels=3, size=24):
    return torch.randint(30, 220, (n, channels, size, size + 8), dtype=torch.uint8)


def torchvisions(images, num_ops, magnitude, draws, monkeypatch):
    """torchvision's RandAugment, image by image, made to draw what ours drew."""
    augment, out = transforms.RandAugment(num_ops, magnitude), []
    signed = [s for _, s in augment._augmentation_space(NUM_BINS, (8, 8)).values()]
    for image, row in zip(images, draws.tolist(), strict=True):
        script = [v for draw in row for v in ([draw // 2] + [draw % 2] * signed[draw // 2])]
        values = iter(script)
        monkeypatch.setattr(autoaugment.torch, "randint", lambda *a, values=values, **k: torch.tensor([next(values)]))
        out.append(augment(image))
        monkeypatch.undo()
        assert next(values, None) is None
    return torch.stack(out)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 1, 3, 9, 30])
def test_every_operation_is_torchvisions_to_the_bit(channels, magnitude, monkeypatch):
    augment = RandAugment(1, magnitude)
    draws = torch.arange(2 * len(_OPS))[:, None]
    draws = draws[[draw % 2 == 0 or _OPS[draw // 2][1] for draw in draws.flatten().tolist()]]
    images = uint8_images(len(draws), channels)
    expected = torchvisions(images, 1, magnitude, draws, monkeypatch)
    assert torch.equal(augment(images, draws), expected)
    if magnitude == 9 and channels == 3:  # only the identity leaves an image as it was
        assert [torch.equal(a, b) for a, b in zip(images, expected, strict=True)] == [True] + [False] * (len(draws) - 1)


def test_a_batch_of_mixed_operations_in_turn_is_torchvisions(monkeypatch):
    augment, images = RandAugment(3, 9, seed=4), uint8_images(40)
    draws, before = augment.draws(40, epoch=2), images.clone()
    assert torch.equal(augment(images, draws), torchvisions(images, 3, 9, draws, monkeypatch))
    assert torch.equal(images, before)  # the set in memory is not written to


def test_draws_are_uniform_and_differ_by_seed_and_epoch():
    draws = RandAugment(2, 1).draws(28_000, epoch=1)
    counts = (draws // 2).flatten().bincount(minlength=14)
    assert (counts / 4000 - 1).abs().max() < 0.1  # six standard deviations
    signed = torch.tensor([s for _, s, _ in _OPS])
    negative = draws % 2 == 1
    assert not negative[~signed[draws // 2]].any()
    assert abs(negative[signed[draws // 2]].float().mean() - 0.5) < 0.02
    assert torch.equal(draws, RandAugment(2, 1).draws(28_000, epoch=1))
    for other in (RandAugment(2, 1).draws(28_000, 2), RandAugment(2, 1, seed=1).draws(28_000, 1)):
        assert (draws == other).float().mean() < 0.2


def test_an_image_is_augmented_the_same_whatever_the_batches_and_the_order():
    data = ImageSet(uint8_images(30), torch.arange(30))
    augment = RandAugment(2, 9)

    def images(batch_size, generator):
        found = {}
        for x, y in batches(data, batch_size, generator=generator, augment=augment, epoch=3):
            found |= dict(zip(y.tolist(), x, strict=True))
        return torch.stack([found[i] for i in range(30)])

    one = images(7, None)
    assert torch.equal(one, images(30, torch.Generator().manual_seed(1)))
    assert torch.equal(one, normalize(augment(data.images, augment.draws(30, 3))))
    assert not torch.equal(one, normalize(data.images))

"""The losses of pretraining, and what they are computed of, against float64 and timm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvrpipe.pipeline.pretrain_contrastive import Atc, Curl, info_nce, random_crops, random_shifts
from pvrpipe.pipeline.pretrain_mae import MaskedAutoencoder, masked_loss, patches_of

SIZE = 32


def test_info_nce_is_the_cross_entropy_of_the_partner_in_float64() -> None:
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) * 30
    values = logits.numpy().astype(np.float64)
    expected = np.log(np.exp(values).sum(1)) - np.diag(values)
    loss, accuracy = info_nce(logits)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)
    assert accuracy.item() == pytest.approx((values.argmax(1) == np.arange(7)).mean())


def test_masked_loss_is_the_error_of_normalised_hidden_patches_in_float64() -> None:
    random = torch.Generator().manual_seed(0)
    predicted, target = (torch.rand(3, 16, 12, generator=random) for _ in range(2))
    hidden = torch.rand(3, 16, generator=random).argsort(1)[:, 4:]
    errors = []
    for image in range(3):
        for patch in hidden[image].tolist():
            t, p = (x[image, patch].numpy().astype(np.float64) for x in (target, predicted))
            errors.append(np.square(p - (t - t.mean()) / np.sqrt(t.var(ddof=1) + 1e-6)).mean())
    assert masked_loss(predicted, target, hidden).item() == pytest.approx(np.mean(errors), rel=1e-5)
    mean = masked_loss(torch.zeros(3, 16, 12), target, hidden).item()
    assert mean == pytest.approx(11 / 12, rel=1e-4)  # what predicting the mean costs: almost 1


def test_patches_are_the_pixels_in_the_order_of_the_patch_embedding() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patches_of(images, 2)
    assert patches.shape == (2, 6, 12)
    block = images[1, :, 2:4, 2:4]  # second row of patches, second column
    assert patches[1, 4].tolist() == block.permute(1, 2, 0).reshape(-1).tolist()


def test_an_encoder_that_sees_every_patch_is_timms_and_no_hidden_pixel_reaches_it() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(SIZE, 4, 64, 2).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    every = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(model.encode(images, every), model.encoder.forward_features(images))
    visible = every[:, 10:20]
    other = images.clone()
    other[:, :, 16:] += 1  # patches 32 and on
    torch.testing.assert_close(model.encode(images, visible), model.encode(other, visible), rtol=0, atol=0)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    seen = model.encode(images, order[:, :16])
    with torch.no_grad():  # a decoder that only copies shows whether the tokens are put back in their places
        model.positions.zero_()
        model.mask_token.fill_(7)
        model.decoder, model.norm, model.leave = (torch.nn.Identity() for _ in range(3))
    back = model.decode(seen, order)
    torch.testing.assert_close(
        back.gather(1, order[:, :16, None].expand(-1, -1, 32)), model.enter(seen)[:, 1:]
    )
    assert (back.gather(1, order[:, 16:, None].expand(-1, -1, 32)) == 7).all()


def test_logits_are_bilinear_and_the_follower_moves_by_its_momentum() -> None:
    torch.manual_seed(0)
    anchors, partners = torch.randn(2, 5, 3, SIZE, SIZE)
    for kind, momentum in ((Curl, 0.05), (Atc, 0.01)):
        model = kind(SIZE, 4, 8)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(1.0)
            code, partner = model.encoder(anchors), model.follower(partners)
            code = code + model.residual(code) if isinstance(model, Atc) else code
            expected = np.einsum(
                "id,ed,je->ij", *(x.double().numpy() for x in (code, model.product.weight, partner))
            )
            np.testing.assert_allclose(
                model.logits(anchors, partners).numpy(), expected, rtol=1e-4, atol=1e-4
            )
        before = [p.clone() for p in model.follower.parameters()]
        model.follow()
        for old, new in zip(before, model.follower.parameters(), strict=True):
            torch.testing.assert_close(new, old + momentum, rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in model.follower.parameters())


def test_crops_and_shifts_are_windows_of_the_frame() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.arange(64 * 3 * 12 * 12, dtype=torch.float32).reshape(64, 3, 12, 12)
    corners = set()
    for image, crop in zip(images, random_crops(images, 9, draw), strict=True):
        at = int((crop[0, 0, 0] - image[0, 0, 0]).item())
        y, x = divmod(at, 12)
        torch.testing.assert_close(crop, image[:, y : y + 9, x : x + 9])
        corners.add((y, x))
    assert len(corners) > 10  # of 16
    assert {c for pair in corners for c in pair} <= {0, 1, 2, 3}
    shifted, moves = random_shifts(images, draw), set()
    assert shifted.shape == images.shape
    for image, other in zip(images, shifted, strict=True):
        at = int((other[0, 4, 4] - image[0, 0, 0]).item())
        down, right = at // 12 - 4, at % 12 - 4
        moves.add((down, right))
        y, x = ((torch.arange(12) + move).clamp(0, 11) for move in (down, right))
        torch.testing.assert_close(other, image[:, y][:, :, x], rtol=0, atol=0)  # its border repeated
    assert len(moves) > 30  # of 81

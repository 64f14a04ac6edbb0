"""Every loss term against its formula written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from textok_fast import InputError, TexTok
from textok_fast.config import LossConfig, TokenizerTrainConfig, load_config
from textok_fast.modeling.bottlenecks import BottleneckOutput, FSQBottleneck, VQBottleneck
from textok_fast.modeling.tokenizer import TexTokOutput
from textok_fast.training.losses import (
    LogitAverages,
    balanced,
    discriminator_loss,
    entropy_loss,
    generator_loss,
    gradient_loss,
    lecam_loss,
    r1_penalty,
    tokenizer_loss,
)


def test_gan_losses() -> None:
    real, fake = 2 * torch.randn(5, 7), 2 * torch.randn(5, 7)
    x, y = real.double().numpy(), fake.double().numpy()
    hinge = np.maximum(0, 1 - x).mean() + np.maximum(0, 1 + y).mean()
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(hinge, rel=1e-5)
    assert generator_loss(fake, "hinge").item() == pytest.approx(-y.mean(), rel=1e-5)

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    logistic = -np.log(sigmoid(x)).mean() - np.log(1 - sigmoid(y)).mean()
    assert discriminator_loss(real, fake, "non-saturating").item() == pytest.approx(logistic, rel=1e-5)
    assert generator_loss(fake, "non-saturating").item() == pytest.approx(-np.log(sigmoid(y)).mean(), rel=1e-5)


def test_lecam_and_its_anchors() -> None:
    averages = LogitAverages(0.9)
    sums, weights = np.zeros(2), 0.0
    for step in range(6):
        means = torch.tensor([1.5 + step, -0.5 * step])
        averages.update(means)
        sums, weights = 0.9 * sums + 0.1 * means.numpy(), 0.9 * weights + 0.1
        np.testing.assert_allclose(averages.anchors().numpy(), sums / weights, rtol=1e-5)
    real, fake = torch.randn(4, 3), torch.randn(4, 3)
    wanted = np.mean(np.maximum(0, real.numpy() - 0.2) ** 2) + np.mean(np.maximum(0, 0.4 - fake.numpy()) ** 2)
    assert lecam_loss(real, fake, torch.tensor(0.4), torch.tensor(0.2)).item() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(LogitAverages(0.9).anchors(), torch.zeros(2))


def test_r1_is_the_squared_gradient_and_has_one_itself() -> None:
    """D's logits for x of 12 numbers: x A x / 2 and b x; their mean has the gradient (A x + b) / 2 for a symmetric A."""
    matrix = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(12, dtype=torch.float64, requires_grad=True)
    pixels = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    symmetric = matrix + matrix.T
    x = pixels.flatten(1)
    logits = torch.stack([torch.einsum("bi,ij,bj->b", x, symmetric, x) / 2, x @ vector], dim=1)
    penalty = r1_penalty(logits, pixels)
    slopes = (x @ symmetric + vector) / 2  # (4, 12)
    wanted = slopes.square().sum(1).mean()
    assert penalty.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = torch.autograd.grad(penalty, (matrix, vector), retain_graph=True)
    for mine, other in zip(found, torch.autograd.grad(wanted, (matrix, vector)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


# -- entropy -----------------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def entropy(q: np.ndarray) -> np.ndarray:
    return -(q * np.log(np.maximum(q, 1e-300))).sum(axis=-1)


def test_entropy_of_one_choice() -> None:
    affinity = torch.randn(2, 5, 7, dtype=torch.float64)
    q = softmax(affinity.numpy() / 0.3).reshape(-1, 7)
    wanted = entropy(q).mean() - 0.4 * entropy(q.mean(axis=0))
    assert entropy_loss((affinity,), 0.3, 0.4).item() == pytest.approx(wanted, rel=1e-5)


def test_entropy_of_several_choices_is_that_of_their_product() -> None:
    affinities = torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 4, 5, dtype=torch.float64)
    p, q = (softmax(a.numpy()).reshape(4, -1) for a in affinities)
    joint = (p[:, :, None] * q[:, None, :]).reshape(4, 15)
    assert entropy_loss(affinities, 1.0, 0.0).item() == pytest.approx(entropy(joint).mean(), rel=1e-5)
    of_all = entropy_loss(affinities, 1.0, 0.0) - entropy_loss(affinities, 1.0, 1.0)
    assert of_all.item() == pytest.approx(entropy(p.mean(axis=0)) + entropy(q.mean(axis=0)), rel=1e-5)
    assert of_all.item() >= entropy(joint.mean(axis=0))  # the bound


def test_entropy_is_least_where_every_code_is_taken_surely_and_as_often() -> None:
    assert entropy_loss((100.0 * torch.eye(8),), 1.0).item() == pytest.approx(-math.log(8), rel=1e-5)
    assert entropy_loss((torch.zeros(8, 8),), 1.0).item() == pytest.approx(0, abs=1e-6)
    one_code = 100.0 * torch.eye(8)[[0] * 8]
    assert entropy_loss((one_code,), 1.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_affinities_of_vq(normalize: bool) -> None:
    bottleneck = VQBottleneck(4, 16, normalize).train()
    nn.init.normal_(bottleneck.codebook)
    z = torch.randn(2, 6, 4, requires_grad=True)
    assert bottleneck(z).affinities == ()
    bottleneck.with_affinities = True
    output = bottleneck(z)
    (affinity,) = output.affinities
    points = nn.functional.normalize(z, dim=-1) if normalize else z
    torch.testing.assert_close(affinity, -torch.cdist(points, bottleneck.codes()).square(), atol=1e-4, rtol=1e-4)
    assert torch.equal(affinity.argmax(-1), output.indices)
    for gradient in torch.autograd.grad(entropy_loss(output.affinities, 0.5), (z, bottleneck.codebook)):
        assert gradient.abs().sum() > 0
    assert bottleneck.eval()(z).affinities == ()


def test_affinities_of_fsq() -> None:
    bottleneck = FSQBottleneck((8, 5, 2)).train()
    bottleneck.with_affinities = True
    z = (2 * torch.randn(3, 7, 3)).requires_grad_()
    output = bottleneck(z)
    assert [a.shape for a in output.affinities] == [(3, 7, 8), (3, 7, 5), (3, 7, 2)]
    assert output.indices is not None
    nearest = [affinity.argmax(-1) for affinity in output.affinities]
    assert torch.equal(nearest[0] + 8 * nearest[1] + 40 * nearest[2], output.indices)
    # The distances are to the values that the decoder is given for the levels.
    for channel, (affinity, levels) in enumerate(zip(output.affinities, (8, 5, 2), strict=True)):
        base = [1, 8, 40][channel]
        codes = bottleneck.latents_from_indices(torch.arange(levels)[None] * base)[0, :, channel]  # (L,)
        near = codes[nearest[channel]] - output.latents[..., channel]
        assert near.abs().max() < 1e-6
        gaps = (codes[:, None] - codes).square()
        inside = affinity[..., :, None] - affinity[..., None, :]  # -(v - a)^2 + (v - b)^2 = 2 v (a - b) - a^2 + b^2
        value = (inside + codes[:, None] ** 2 - codes**2)[..., 1, 0] / (2 * (codes[1] - codes[0]))
        torch.testing.assert_close(affinity, -(value[..., None] - codes).square(), atol=1e-4, rtol=1e-4)
        assert gaps.max() > 0
    (gradient,) = torch.autograd.grad(entropy_loss(output.affinities, 0.1), z)
    assert gradient.abs().sum() > 0


# -- the adaptive weight and the sum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1e4, 0.25])
def test_the_adaptive_weight_and_its_gradients(make_tokenizer: Callable[..., TexTok], largest: float) -> None:
    model = make_tokenizer(text="none").train()
    judge = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1))
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1

    def losses() -> tuple[Tensor, Tensor, Tensor]:
        reconstruction = model(pixels).reconstruction
        return reconstruction, (reconstruction - pixels).square().mean(), -judge(reconstruction).mean()

    # taming-transformers, modules/losses/vqperceptual.py
    _, rebuilt, opposed = losses()
    last = model.decoder.to_pixels.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rebuilt, opposed)]
    weight = 0.8 * min(float(norms[0] / (norms[1] + 1e-4)), largest)
    wanted = torch.autograd.grad(rebuilt + weight * opposed, list(model.parameters()), allow_unused=True)

    reconstruction, rebuilt, opposed = losses()
    found_weight, total = balanced(reconstruction, rebuilt, opposed, model.last_layer, 0.8, largest)
    assert found_weight.item() == pytest.approx(weight, rel=1e-5)
    assert not found_weight.requires_grad
    assert total.item() == pytest.approx(float((rebuilt + weight * opposed).detach()), rel=1e-5)
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    for mine, other in zip(found, wanted, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-4)


def test_the_last_layer_is_the_convolution_of_a_model_that_has_one(make_tokenizer: Callable[..., TexTok]) -> None:
    plain, convolved = make_tokenizer(), make_tokenizer(pixel_conv=True)
    assert plain.last_layer is plain.decoder.to_pixels.weight
    assert convolved.last_layer is convolved.decoder.conv_out.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("adaptive", [False, True])
def test_all_terms_and_their_sum(adaptive: bool) -> None:
    layer = torch.randn(5, 3 * 16 * 16, requires_grad=True)
    pixels, hidden = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 5)
    reconstruction = (hidden @ layer).view(2, 3, 16, 16)
    affinities = (torch.randn(2, 3, 4),)
    bottleneck = BottleneckOutput(torch.zeros(1), {"codebook": torch.tensor(2.0)}, affinities=affinities)
    opposition = reconstruction.mean()
    sizes = {"l2": 2.0, "gradient": 0.5, "lpips": 0.7, "codebook": 0.1, "entropy": 0.3, "gan": 0.6}
    weights = LossConfig(**sizes, entropy_temperature=0.5, gan_adaptive=adaptive)  # type: ignore[arg-type]

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))

    output = TexTokOutput((hidden @ layer).view(2, 3, 16, 16), bottleneck)
    opposed = output.reconstruction.mean()  # each network is passed backward once, in here
    found = tokenizer_loss(output, pixels, weights, perceptual, opposed, layer)  # type: ignore[arg-type]
    terms = {
        "l2": (reconstruction - pixels).square().mean(),
        "gradient": gradient_loss(reconstruction, pixels),
        "lpips": (reconstruction - pixels).abs().mean(),
        "codebook": torch.tensor(2.0),
        "entropy": entropy_loss(affinities, 0.5),
        "gan": opposition,
    }
    rebuilt = sum(sizes[name] * terms[name] for name in ("l2", "gradient", "lpips"))
    assert set(found) == {"loss", *terms} | ({"gan_weight"} if adaptive else set())
    for name, value in terms.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)
    if adaptive:
        sizes["gan"] = found["gan_weight"].item()
        ratio = [torch.autograd.grad(x, layer, retain_graph=True)[0].norm() for x in (rebuilt, opposition)]
        assert sizes["gan"] == pytest.approx(0.6 * float(ratio[0] / (ratio[1] + 1e-4)), rel=1e-4)
    wanted = sum(sizes[name] * value.item() for name, value in terms.items())
    assert found["loss"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.lecam=0.1"], r"set loss\.gan above 0"),
        (["loss.gan=0.1", "loss.gan_loss=wasserstein"], r"gan_loss.*hinge.*non-saturating"),
        (["loss.entropy=0.1"], r"model\.bottleneck=none has none"),
        (["loss.gan=0.1", "loss.r1=1", "discriminator.kind=frozen"], r"loss\.r1 is for a discriminator that learns"),
        (["loss.gan=0.1", "run.batch_size=6"], r"batch_size 6 is not a multiple of discriminator\.stddev_group 4"),
        (["loss.gan=0.1", "loss.lecam_decay=1"], r"lecam_decay must be below 1"),
        (["discriminator.head_kernel=4"], r"head_kernel must be odd, got 4"),
        (["loss.entropy_temperature=0"], r"entropy_temperature must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TokenizerTrainConfig, overrides=settings)


def test_the_discriminator_and_its_optimizer_are_set_like_everything_else() -> None:
    settings = ["loss.gan=0.1", "discriminator.kind=patchgan", "discriminator.optim.lr=3e-4", "discriminator.layers=2"]
    config = load_config(TokenizerTrainConfig, overrides=settings)
    assert (config.discriminator.optim.lr, config.discriminator.optim.betas) == (3e-4, (0.0, 0.99))
    assert (config.discriminator.kind, config.discriminator.layers, config.optim.lr) == ("patchgan", 2, 1e-3)

"""What CL-MAE guarantees, and what its two scripts promise: a minute. No network, no GPU, no data set is needed."""

import argparse
import itertools
import json
import math
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import clmae
import train
import visualize
from clmae import CLMAE, Config, curriculum_factor, gumbel_top_k, patchify, sincos_positions, unpatchify

ROOT = Path(__file__).parent
SMALL = {"dim": 32, "depth": 2, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "masker_dim": 16}
train.MODELS["nano"] = SMALL  # a run takes a second


def small(**changes) -> Config:
    return Config(**{"image_size": 16, **SMALL, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> CLMAE:
    torch.manual_seed(0)
    return CLMAE(small())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, generator=generator())


# ==== I. What the method guarantees: read it as the specification of clmae.py =========================================
# ---- The sampler -----------------------------------------------------------------------------------------------------
def inclusion_probabilities(scores: list[float], k: int) -> torch.Tensor:
    """The exact chance of each token to be among k drawn without replacement, by summing over all ordered draws."""
    weights, chance = [math.exp(s) for s in scores], torch.zeros(len(scores), dtype=torch.float64)
    for draw in itertools.permutations(range(len(scores)), k):
        p, left = 1.0, sum(weights)
        for i in draw:
            p, left = p * weights[i] / left, left - weights[i]
        chance[list(draw)] += p
    return chance


def test_gumbel_top_k_samples_the_plackett_luce_distribution():
    scores, n = [1.5, 0.3, 0.0, -0.7, -2.0], 200_000
    _, keep, _ = gumbel_top_k(torch.tensor(scores).expand(n, -1), 2, generator=generator())
    exact = inclusion_probabilities(scores, 2)
    error = (exact * (1 - exact) / n).sqrt()
    assert ((keep.double().mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("scores", [torch.zeros(50, 9), torch.randn(50, 9) * 1e4, torch.full((50, 9), -1e30)])
def test_exactly_k_tokens_are_visible_whatever_the_scores(scores):
    for k in (1, 4, 8):
        ids, keep, soft = gumbel_top_k(scores, k, generator=generator())
        assert (keep.sum(1) == k).all() and torch.equal(keep, torch.zeros_like(keep).scatter(1, ids, 1.0))
        last, first = soft.masked_fill(keep == 0, 2).amin(1), soft.masked_fill(keep == 1, -1).amax(1)
        assert soft.isfinite().all() and (last >= 0.5).all() and (first <= 0.5).all()  # on the side of keep
        torch.testing.assert_close(last + first, torch.ones(50), atol=0.01, rtol=0)  # theta is midway between them


def test_noise_is_finite_where_uniform_draws_0(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda u, generator=None: u.zero_())
    assert clmae.gumbel_noise(torch.zeros(2, 3)).isfinite().all()


# ---- The curriculum --------------------------------------------------------------------------------------------------
def gradients(model: CLMAE, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a loss with respect to the MAE and to the masker (zeros where there is none)."""
    result = []
    for part in (torch.nn.ModuleList([model.encoder, model.decoder]), model.masker or torch.nn.Linear(1, 1)):
        weights = list(part.parameters())
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        result.append(torch.cat([g.flatten() for g in found]))
    return tuple(result)


@pytest.mark.parametrize("lam", [1.0, 0.3, -0.3, -1.0])
def test_the_maskers_gradient_is_the_formula(lam, images):
    """dL/ds = -lam soft (1 - soft) / tau (loss of the patch - mean) / (L - K) / B if masked, 0 if visible."""
    tau, kappa = 0.5, 3.0
    model = CLMAE(small(tau=tau, kappa=kappa))
    out = model(images, lam, generator())
    raw = model.masker(model.encoder.embed(images))
    torch.testing.assert_close(out.scores, kappa * abs(lam) * torch.minimum(raw, torch.zeros(())))
    assert raw.mean(1).abs().max() < 1e-5 and (raw.std(1, unbiased=False) - 1).abs().max() < 1e-3

    _, keep, soft = gumbel_top_k(out.scores.detach(), 4, tau, generator())
    mean = (out.patch_loss * out.mask).sum(1, keepdim=True) / 12
    cost = ((out.patch_loss - mean) * (1 - keep)).detach()
    torch.testing.assert_close(out.masker_loss, (cost * (1 - soft)).sum() / 12 / 6)
    torch.testing.assert_close(out.loss, out.mae_loss + lam * out.masker_loss)

    expected = -lam * soft * (1 - soft) / tau * cost / 12 / 6
    (grad,) = torch.autograd.grad(out.loss, out.scores, retain_graph=True)
    torch.testing.assert_close(grad, expected, atol=1e-8, rtol=1e-4)
    assert expected.abs().max() > 1e-5
    _, masker = gradients(model, out.loss)
    _, through = gradients(model, (model.scores(images, lam) * expected).sum())
    torch.testing.assert_close(masker, through, atol=1e-8, rtol=1e-4)  # and it is all of the masker's gradient


@pytest.mark.parametrize("lam", [1.0, 0.5, 0.0, -0.5, -1.0])
def test_each_loss_trains_its_own_part(lam, model, images):
    """loss = mae_loss + lam masker_loss: the first reaches encoder and decoder alone, the second the masker alone.

    mae_loss is that of a plain MAE under the same mask. -lambda draws the same masks, and turns the masker around.
    """
    out = model(images, lam, generator())
    assert not out.mask.requires_grad and torch.equal(out.mask.unique(), torch.tensor([0.0, 1.0]))
    plain = ((model.predict(images, out.mask) - model.target(images)).square().mean(-1) * out.mask).sum() / 72
    torch.testing.assert_close(out.mae_loss, plain)

    expected, _ = gradients(model, plain)
    mae, none = gradients(model, out.mae_loss)
    nothing, masker = gradients(model, out.masker_loss)
    same, followed = gradients(model, out.loss)
    torch.testing.assert_close(mae, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(followed, lam * masker, atol=1e-8, rtol=1e-5)
    assert torch.equal(same, mae) and not none.any() and not nothing.any()
    assert mae.norm() > 0.1 and (masker.norm() > 1e-3) == (lam != 0)

    opposite = model(images, -lam, generator())
    mae, opposed = gradients(model, opposite.loss)
    assert torch.equal(opposite.mask, out.mask) and torch.equal(mae, same) and torch.equal(opposed, -followed)


def test_lambda_0_is_plain_mae_bit_for_bit(images):
    results = []
    for kappa in (2.0, 0.0):
        torch.manual_seed(0)
        model = CLMAE(small(kappa=kappa))
        out = model(images, 0.0)
        mae, masker = gradients(model, out.loss)
        results.append((out.mask, out.mae_loss, out.loss, mae))
        assert not masker.any() and not out.scores.any() and torch.equal(out.loss, out.mae_loss)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_maskers_gradient_points_the_way_of_the_exact_one():
    """Of 3 x 3 patches 3 are drawn: with 504 draws, 84 masks, the expected loss J and its gradient can be computed.

    The straight-through gradient is not that one: it leaves out what a shown patch does for its neighbours, and for
    some images it points the wrong way. On average it has to point the right way.
    """
    torch.manual_seed(0)
    images = train.shapes(1952, 12, seed=3)[0]
    widths = {"dim": 32, "depth": 1, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "masker_dim": 16}
    model = CLMAE(Config(12, mask_ratio=2 / 3, **widths))
    model.std[:], model.mean[:] = torch.std_mean(images.float(), dim=(0, 2, 3), keepdim=True)
    held_out, *batches = model.standardise(images).split([32] + 30 * [64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in 5 * batches:  # under random masks: the masker's scores stay as they came, different in every image
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # What each draw of visible patches costs each image.
    draws = torch.tensor(list(itertools.permutations(range(9), 3)))  # (504, 3), in the order of drawing
    mask = torch.ones(504, 9).scatter(1, draws, 0.0)
    with torch.no_grad():
        pred = model.predict(held_out.repeat_interleave(504, 0), mask.repeat(32, 1)).unflatten(0, (32, 504))
    patch_loss = (pred - model.target(held_out)[:, None]).square().mean(-1)  # (32, 504, 9)
    loss = (patch_loss * mask).sum(2) / 6  # (32, 504)

    # J: every draw's loss times its chance, drawn one after another, each by its e^s among those that are left.
    scores = model.scores(held_out, 1.0).detach().requires_grad_()  # (32, 9)
    drawn = scores.exp()[:, draws]  # (32, 504, 3)
    left = scores.exp().sum(1)[:, None, None] - drawn.cumsum(2) + drawn
    chance = (drawn / left).prod(2)  # (32, 504)
    expected = chance * loss
    (exact,) = torch.autograd.grad(expected.sum(), scores)

    # It is how much the loss falls when a patch is shown, times p (1 - p), p its chance of being hidden.
    p = chance @ mask  # (32, 9)
    hidden = expected @ mask / p  # E[loss | the patch is hidden]
    shown = expected @ (1 - mask) / (1 - p)
    assert (torch.cosine_similarity(exact, p * (1 - p) * (shown - hidden)) > 0.99).all()

    # What the masker follows, over 200 draws.
    out = model(held_out.repeat(200, 1, 1, 1), 1.0, generator())
    followed = torch.autograd.grad(out.masker_loss, out.scores)[0].unflatten(0, (200, 32)).sum(0)  # (32, 9)
    cosine = torch.cosine_similarity(exact, followed)  # (32,)
    assert cosine.mean() > 0.5 and (cosine > 0).float().mean() > 0.75


def test_the_masker_learns_to_help_at_plus_one_and_to_oppose_at_minus_one():
    """Images of flat and noisy patches: noise cannot be guessed, so a partner shows it and an adversary hides it."""
    torch.manual_seed(0)
    model = CLMAE(small(norm_pix=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)

    def batch(n):
        noisy = (torch.rand(n, 16, 1) < 0.25).float()
        patches = torch.randn(n, 1, 1) * 0.5 + noisy * torch.randn(n, 16, 48)
        return unpatchify(patches, 4, (4, 4)), noisy.squeeze(-1)

    held_out, noisy = batch(200)
    for lam, sign in ((1.0, -1), (-1.0, 1)):
        for _ in range(60):
            model(batch(32)[0], lam).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            random, learned = (model(held_out, x, generator()) for x in (0.0, lam))
        assert sign * (learned.mae_loss / random.mae_loss - 1) > 0.1
        difference = learned.scores[noisy == 1].mean() - learned.scores[noisy == 0].mean()
        assert sign * difference < -0.8  # it is the noise that it shows or hides


def test_curriculum_factor_falls_linearly_and_is_exactly_zero_half_way():
    assert [curriculum_factor(p) for p in (0, 0.25, 0.5, 1)] == [1, 0.5, 0, -1]
    assert curriculum_factor(0.5, start=0.8, end=0.4) == pytest.approx(0.6)
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"progress {progress}"):
            curriculum_factor(progress)


def test_mask_probability_is_the_chance_of_being_masked():
    scores = torch.tensor([[1.5, 0.3, 0.0, -0.7, -2.0], [-1.0, 0.0, 0.0, 0.0, 2.0]])
    exact = torch.stack([1 - inclusion_probabilities(s.tolist(), 2) for s in scores])
    model = CLMAE(small(image_size=(4, 20), mask_ratio=0.6))
    torch.testing.assert_close(model.mask_probability(scores), exact.float(), atol=0.06, rtol=0)


# ---- The masked autoencoder ------------------------------------------------------------------------------------------
def part(state: dict, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def plain_block(x: torch.Tensor, state: dict, name: str, heads: int) -> torch.Tensor:
    """A pre-norm transformer block on tokens (N, D), head by head."""
    q, k, v = F.linear(plain_norm(x, state, f"{name}.norm1"), *part(state, f"{name}.attn.qkv")).chunk(3, dim=1)
    each = zip(*(y.chunk(heads, dim=1) for y in (q, k, v)), strict=True)  # (N, D/heads) each
    out = [((q @ k.T) / math.sqrt(k.shape[1])).softmax(1) @ v for q, k, v in each]
    x = x + F.linear(torch.cat(out, dim=1), *part(state, f"{name}.attn.proj"))
    hidden = F.gelu(F.linear(plain_norm(x, state, f"{name}.norm2"), *part(state, f"{name}.mlp.fc1")))
    return x + F.linear(hidden, *part(state, f"{name}.mlp.fc2"))


def plain_norm(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[1:], *part(state, name), eps=1e-6)


def plain_mae(model: CLMAE, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction (L, p*p*C) and loss of a plain MAE on one image (C, H, W), written anew; names are timm's."""
    c, s = model.config, model.state_dict()
    p, rows, columns = c.patch_size, *c.grid
    tiles = [image[:, p * r : p * r + p, p * k : p * k + p] for r in range(rows) for k in range(columns)]
    weight, bias = part(s, "encoder.patch_embed.proj")
    x = torch.stack([weight.flatten(1) @ t.flatten() + bias for t in tiles]) + s["encoder.pos_embed"][0, 1:]
    cls = s["encoder.cls_token"][0] + s["encoder.pos_embed"][0, :1]
    z = torch.cat([cls, x[mask == 0]])  # masked pixels go no further
    for i in range(c.depth):
        z = plain_block(z, s, f"encoder.blocks.{i}", c.heads)

    z = F.linear(plain_norm(z, s, "encoder.norm"), *part(s, "decoder.embed"))
    features = iter(z[1:])
    y = torch.stack([z[0]] + [s["decoder.mask_token"][0, 0] if m else next(features) for m in mask.tolist()])
    y = y + s["decoder.pos_embed"][0]
    for i in range(c.decoder_depth):
        y = plain_block(y, s, f"decoder.blocks.{i}", c.decoder_heads)
    pred = F.linear(plain_norm(y, s, "decoder.norm")[1:], *part(s, "decoder.pred"))

    target = torch.stack([t.permute(1, 2, 0).flatten() for t in tiles])
    if c.norm_pix:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return pred, ((pred - target) ** 2).mean(1)[mask == 1].mean()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_the_forward_pass_equals_a_plain_mae_written_out(kappa, norm_pix):
    torch.manual_seed(0)
    model = CLMAE(small(image_size=(12, 20), channels=4, kappa=kappa, norm_pix=norm_pix))
    images = torch.randn(3, 4, 12, 20)
    out = model(images, 0.7)
    preds, losses = zip(*map(plain_mae, [model] * 3, images, out.mask), strict=True)
    torch.testing.assert_close(out.pred, torch.stack(preds), rtol=1e-4, atol=1e-5)
    assert out.mae_loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_masked_pixels_never_reach_the_prediction(model, images):
    mask = model(images, generator=generator()).mask
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, (4, 4))  # (6, 3, 16, 16)
    pred = model.predict(images, mask)
    torch.testing.assert_close(model.predict(images + 100 * hidden, mask), pred)
    assert not torch.allclose(model.predict(images + 1 - hidden, mask), pred)


def test_a_mask_of_ones_own(model, images):
    out = model(images, 1.0, generator())
    torch.testing.assert_close(model.predict(images, out.mask), out.pred)
    for wrong, message in (
        (torch.ones(6, 16), "mask must leave the same number of patches visible"),
        (torch.zeros(6, 16), "mask must leave the same number of patches visible"),
        ((torch.arange(96) % 5 > 0).reshape(6, 16), "mask must leave the same number of patches visible"),
        (out.mask[:1], r"mask \(1, 16\) must be \(6, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(images, wrong)
    for step in (model, model.encode):
        with pytest.raises(ValueError, match=r"images \(2, 3, 8, 32\) must be \(B, 3, 16, 16\)"):
            step(torch.zeros(2, 3, 8, 32))


def test_half_precision_keeps_scores_and_loss_in_float32(model, images):
    dtypes = []
    model.masker.score.register_forward_hook(lambda module, given, a: dtypes.append(a.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, torch.tensor(1.0), generator())
    assert dtypes == [torch.float32]  # not rounded into ties
    assert out.scores.dtype == out.loss.dtype == out.patch_loss.dtype == torch.float32
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model, out.loss))
    plain = (model.predict(images, out.mask) - model.target(images)).square().mean(-1) * out.mask
    assert out.mae_loss.item() == pytest.approx((plain.sum() / out.mask.sum()).item(), rel=0.02)


def test_encode_never_masks_and_repeats_itself(model, images):
    z = model.encode(images)
    assert z.shape == (6, 17, 32) and torch.equal(z, model.encode(images))
    assert torch.equal(model.features(images), z[:, 1:].mean(1))


def test_a_compiled_step_equals_a_plain_one_and_is_not_compiled_again_for_another_lambda(images):
    # One graph without breaks, the same noise, so the same masks, losses and gradients.
    model = CLMAE(small(depth=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # inductor's code takes a minute
    for lam in (1.0, 0.25, -1.0):
        with torch.compiler.set_stance("default" if lam == 1 else "fail_on_recompile"):
            results = []
            for step in (compiled, model):
                torch.manual_seed(0)
                out = step(images, torch.tensor(lam))
                results.append((out.mask, out.loss, *gradients(model, out.loss)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# ---- Patches, positions, weights -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("C", "H", "W", "p"), [(3, 16, 16, 4), (1, 8, 20, 4), (4, 6, 3, 3), (3, 5, 7, 1)])
def test_patches_run_row_by_row_pixels_as_row_column_channel_and_unpatchify_undoes_it(C, H, W, p):
    images = torch.randn(2, C, H, W)
    patches = patchify(images, p)
    for i, (row, column) in enumerate(itertools.product(range(0, H, p), range(0, W, p))):
        patch = images[:, :, row : row + p, column : column + p]
        assert torch.equal(patches[:, i], patch.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, p, (H // p, W // p)), images)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_undoes_the_target(images, norm_pix):
    model = CLMAE(small(norm_pix=norm_pix))
    torch.testing.assert_close(model.reconstruct(model.target(images), images), images)


def test_positions_follow_the_formula():
    table = sincos_positions((3, 5), 16)[0]
    assert (table[0] == 0).all()  # CLS
    for row, column, i in itertools.product(range(3), range(5), range(4)):
        x, y = (position / 10000 ** (i / 4) for position in (column, row))
        expected = [math.sin(x), math.cos(x), math.sin(y), math.cos(y)]
        assert table[1 + 5 * row + column, i::4].tolist() == pytest.approx(expected, abs=1e-6)


CANNOT_BE = [
    ({"patch_size": 5}, "patch_size 5 must divide the image size 16 x 16"),
    ({"patch_size": 0}, "patch_size 0"),
    ({"mask_ratio": 0.99}, "mask_ratio 0.99 leaves 0 of 16"),
    ({"mask_ratio": 0.01}, "mask_ratio 0.01 leaves 16 of 16"),
    ({"tau": 0.0}, "tau 0.0 must be"),
    ({"kappa": math.inf}, "kappa inf must be"),
    ({"mask_ratio": math.nan}, "mask_ratio nan must be"),
    ({"patch_size": 1, "channels": 1}, "norm_pix needs more than 1 value in a patch"),
]


@pytest.mark.parametrize(("change", "message"), CANNOT_BE)
def test_config_names_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**change)
    assert Config(image_size=32).image_size == (32, 32) and Config(image_size=[8, 12]).grid == (2, 3)


def test_weights_start_as_in_mae():
    torch.manual_seed(0)
    state = CLMAE(small()).state_dict()
    for name in ("encoder.patch_embed.proj", "encoder.blocks.0.attn.qkv", "decoder.pred", "masker.embed"):
        weight = state[f"{name}.weight"].flatten(1)
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=0.02)  # Xavier
        assert not state[f"{name}.bias"].any()
    assert all(0.01 < state[name].std() < 0.03 for name in ("encoder.cls_token", "decoder.mask_token"))


# ==== II. What the scripts promise ====================================================================================
# ---- What is measured ------------------------------------------------------------------------------------------------
def test_diversity_is_0_for_one_mask_and_near_1_for_unrelated_ones():
    one, other = torch.randn(1, 64, generator=generator(2)), torch.randn(100, 64, generator=generator())
    shifts = torch.randn(100, 1, generator=generator(3))  # the mean over tokens is not counted
    assert train.diversity(one.expand(100, -1) + shifts) == pytest.approx(0, abs=1e-5)
    assert 0.97 < train.diversity(other + 5) < 1
    half = other.clamp(max=0) + torch.randn(1, 64, generator=generator(1)).clamp(max=0)
    assert 0.4 < train.diversity(half) < 0.6  # half of the variance is common to all


def test_objects_is_the_area_under_the_roc_curve_and_contrast_within_channels_finds_them():
    where = torch.zeros(2, 8, 12, dtype=torch.bool)
    where[0, :4, :4] = where[0, 4:, 8:10] = True  # patches 0 and 5 of the first
    where[1, 0, :] = where[1, :4, 4] = True  # 4, 7 and 4 pixels of patches 0, 1 and 2 of the second
    scores = torch.tensor([[-1.0, 0, -3, 0, 0, 0], [-2, -3, 0, 0, 0, 0]])
    # first: -1 is below 0, 0, 0 and above -3: 3 of 4; 0 ties with three and is above -3: 1.5 of 4.
    # Second: 4 of 16 pixels are a fifth or more as well: 3 of 3, 3 of 3 and 1.5 of 3.
    assert train.objects(scores, where, 4) == pytest.approx((4.5 / 8 + 7.5 / 9) / 2)
    images, _, covered = train.shapes(2000, 32, seed=2)  # the first 500: those of the default run's figures
    contrast = patchify(images[:500].float(), 4).unflatten(-1, (16, 3)).std(2).mean(-1)
    assert f"hiding high contrast gets {train.objects(-contrast, covered[:500], 4):.2f}" in page("README.md")


def test_the_figures_are_of_held_out_images_under_the_same_noise(model):
    images, labels, where = train.shapes(60, 16, seed=1)
    data = train.Data(images[40:], labels[40:], ["one", "two"], 0, images[:40], labels[:40], where[:40])
    figures, scores = train.measure_masks(model, data, torch.tensor(-0.5))
    held_out = model.standardise(data.val_images)
    random, learned = (model(held_out, lam, generator()) for lam in (0.0, -0.5))
    expected = {"loss_random": random.mae_loss.item(), "hardness": (learned.mae_loss / random.mae_loss).item()}
    expected |= {"objects": train.objects(learned.scores, where[:40], 4), "diversity": train.diversity(learned.scores)}
    assert figures == pytest.approx(expected) and torch.equal(scores, learned.scores)
    floors, z, z_val = train.measure_floors(model, data), *(x.flatten(1).float() for x in (images[40:], images[:40]))
    assert floors["knn_pixels"] == train.evaluate(z, data.labels, z_val, data.val_labels)["knn"]
    trivial = (model.target(model.reconstruct(torch.zeros(40, 16, 48), held_out)) - model.target(held_out)).square()
    assert floors["loss_trivial"] == pytest.approx(trivial.mean().item(), rel=0.05)


def test_knn_and_probe_are_what_they_say_of_features_z_scored_on_the_training_images():
    z, labels = torch.randn(900, 5, generator=generator()), torch.arange(900) % 3
    z = (z + 1.2 * F.one_hot(labels, 5)) * torch.tensor([1.0, 9.0, 1.0, 1.0, 5.0]) + 7
    bank, query = ((x - z[:600].mean(0)) / (z[:600].std(0) + 1e-6) for x in z.split([600, 300]))
    right = 0
    for q, label in zip(query, labels[600:], strict=True):
        cosine, votes = F.cosine_similarity(q, bank), [0.0, 0.0, 0.0]
        for i in cosine.argsort(descending=True)[:20]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        right += votes.index(max(votes)) == label
    before, noise = torch.get_rng_state(), torch.randint(0, 3, (900,), generator=generator(1))
    z.requires_grad_()  # as model.features gives them
    figures, chance = (train.evaluate(z[:600], y[:600], z[600:], y[600:]) for y in (labels, noise))
    assert figures["knn"] == pytest.approx(right / 3) and 50 < figures["knn"] < 90
    assert figures["linear_probe"] == train.linear_probe(bank, labels[:600], query, labels[600:])
    assert figures["linear_probe"] > 60 and 23 < chance["linear_probe"] < 43
    assert torch.equal(torch.get_rng_state(), before)  # measuring draws nothing


# ---- Data ------------------------------------------------------------------------------------------------------------
def save_images(folder: Path, n: int, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> list[Path]:
    # n images of random blocks; CMYK only as JPEG
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{mode}-{i}.{'jpg' if mode == 'CMYK' else 'png'}" for i in range(n)]
    for i, file in enumerate(files):
        pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator(i))
        torchvision.transforms.functional.to_pil_image(pixels).resize(size).convert(mode).save(file)
    return files


def loaded(*words) -> train.Data:
    return train.load_data(train.build_parser().parse_args([str(w) for w in ("--batch-size", 1, *words)]))


def test_shapes_are_reproducible_and_tell_where_they_are():
    (images, kinds, where), again, other = (train.shapes(300, 32, seed) for seed in (5, 5, 6))
    assert torch.equal(images, again[0]) and not torch.equal(images, other[0])
    assert kinds.unique().tolist() == list(range(len(train.SHAPES))) and images.dtype == torch.uint8
    for mask, low, high in ((where, 60, 200), (where.flip(0), 0, 40)):  # the shapes have another colour than the ground
        inside, outside = ((images * m[:, None]).sum((2, 3)) / m.sum((1, 2))[:, None] for m in (mask, ~mask))
        assert low < (inside - outside).abs().mean() < high
    for words, held_out in (((), 2000), (("--holdout", 40), 40)):  # what is held out is not trained on
        data = loaded("--images", 60, *words)
        assert len(data.images) == 60 and len(data.val_images) == len(data.covered) == held_out
        assert not {x.numpy().tobytes() for x in data.images} & {x.numpy().tobytes() for x in data.val_images}


def test_the_learning_rate_warms_up_falls_as_a_cosine_and_scales_with_the_batch():
    args, short = (argparse.Namespace(epochs=n, warmup_epochs=2, lr=0.5, batch_size=512) for n in (10, 2))
    assert [train.learning_rate(args, epoch) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert train.learning_rate(short, 1) == pytest.approx(1)  # half of a short run warms up


def test_augment_crops_each_image_anywhere_inside_and_flips_half_of_them():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 12), torch.linspace(0, 1, 20), indexing="ij")
    images = torch.stack([rows, columns, rows]).expand(2000, -1, -1, -1)  # a pixel tells its place
    whole, crops = (train.augment(images, min_crop) for min_crop in (1.0, 0.2))
    flipped = whole[:, 1, 0, 0] > whole[:, 1, 0, -1]
    upright = torch.where(flipped[:, None, None, None], whole.flip(3), whole)
    torch.testing.assert_close(upright, images, atol=1e-4, rtol=0)
    assert 0.45 < flipped.float().mean() < 0.55
    top, bottom = crops[:, 0, [0, -1], 0].T
    left, right = crops[:, 1, 0, [0, -1]].sort(1).values.T
    height, width = bottom - top, right - left
    area, ratio = width * height, width / height
    assert crops.min() >= -1e-4 and crops.max() <= 1 + 1e-4  # nothing from beyond the border
    assert 0.19 < area.min() < 0.25 and area.max() > 0.9 and 0.5 < area.mean() < 0.7
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    places = torch.stack([top / (1 - height), left / (1 - width)])[:, area < 0.8]  # of the room that is left, uniform
    assert (places.std(1) - 12**-0.5).abs().max() < 0.02 and torch.corrcoef(places)[0, 1].abs() < 0.1


def test_pictures_stand_upright_on_white_cropped_to_their_middle(tmp_path):
    wide, glyph = Image.new("RGB", (30, 10), "red"), Image.new("RGBA", (16, 16))
    wide.paste("blue", (10, 0, 20, 5))
    glyph.paste((0, 0, 0, 255), (4, 4, 12, 12))  # black on what is transparent, and stored as black
    exif = wide.getexif()
    exif[0x0112] = 3  # turned by half a turn
    white, black, red, blue = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)
    glyphs = [(glyph.convert(mode), {}, white, black) for mode in ("RGBA", "LA", "P")]
    for image, more, corner, centre in [(wide, {}, blue, red), (wide, {"exif": exif}, red, blue), *glyphs]:
        image.save(tmp_path / "a.png", **more)
        pixels = train.read_images([(str(tmp_path / "a.png"), 0)], 10)[0][0]  # (3, 10, 10)
        assert (*pixels[:, 1, 1].tolist(),) == corner and (*pixels[:, 6, 5].tolist(),) == centre
    assert Image.MAX_IMAGE_PIXELS is None  # Pillow takes a telephone's picture for an attack


def test_folders_are_read_whole_without_what_programs_left_behind(tmp_path, capsys):
    flat, parts = tmp_path / "flat", tmp_path / "parts"
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA"):
        save_images(flat, 3, mode, (40, 24))
    (flat / "._thumb.png").write_text("not an image: hidden")
    for folder in (flat / ".small", flat / "@eaDir", flat / "__MACOSX/cat", parts / "Training" / "cat" / ".small"):
        save_images(folder, 5)
    for i, (part, name) in enumerate(itertools.product(("Training", "validation"), ("cat", "dog/images/deep"))):
        for file in save_images(parts / part / name, 10):
            Image.eval(Image.open(file), lambda value, i=i: value // 8 + 20 * i).save(file)  # no image is there twice
    data = loaded("--data", flat)
    assert (len(data.images), len(data.val_images)) == (19, 2) and data.images.float().flatten(1).std(1).min() > 5
    said = capsys.readouterr().out
    assert "19 training and 2 held-out images, no labels" in said and ".small, @eaDir, __MACOSX" in said
    both, alone = loaded("--data", parts), loaded("--data", parts / "Training")
    fewer, alike = loaded("--data", parts, "--images", 12, "--holdout", 3), loaded("--data", parts, "--images", 12)
    assert both.classes == ["cat", "dog"] and ".small" in capsys.readouterr().out
    assert both.labels.bincount().tolist() == both.val_labels.bincount().tolist() == [10, 10]
    assert both.val_labels[:8].unique().tolist() == [0, 1]  # shuffled: the figures show the first eight
    assert torch.equal(fewer.images, alike.images)  # the images trained on are the same with and without
    for x, N, M in ((both, 20, 20), (alone, 18, 2), (fewer, 12, 3)):  # what is held out is not trained on
        assert (len(x.images), len(x.val_images)) == (N, M)
        assert not (x.val_images[:, None] == x.images[None]).flatten(2).all(2).any()


def test_downloads_are_read_by_torchvisions_own_classes(tmp_path, monkeypatch, capsys):
    # Small trees laid out as the real ones; only the check that the files are the real ones is replaced.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda *args: True)
    pixels, names = torch.arange(61_440, dtype=torch.uint8).reshape(20, 3072).numpy(), [f"kind {i}" for i in range(100)]
    trees = {f"cifar-10-batches-py/data_batch_{i}": {"data": pixels, "labels": 2 * [*range(10)]} for i in range(1, 6)}
    trees["cifar-10-batches-py/test_batch"] = trees["cifar-10-batches-py/data_batch_1"]
    hundred = {"data": pixels, "fine_labels": [*range(80, 100)]}
    trees |= {"cifar-100-python/train": hundred, "cifar-100-python/test": hundred}
    trees["cifar-10-batches-py/batches.meta"] = {"label_names": names[:10]}
    trees["cifar-100-python/meta"] = {"fine_label_names": names}
    for name, content in trees.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(content))
    for part, name in itertools.product(("train", "val"), ("n01440764", "n02102040")):
        for file in save_images(tmp_path / "imagenette2-160" / part / name, 6, "CMYK", (200, 160)):
            file.rename(file.with_suffix(".JPEG"))
    for name, N, M, told in (
        ("cifar10", 100, 20, "10 classes: kind 0, kind 1, kind 2, ..."),
        ("cifar100", 20, 20, "100 classes: kind 0, kind 1, kind 2, ..."),
        ("imagenette", 12, 12, "2 classes: tench, English springer, ..."),
    ):
        data = loaded("--data", name, "--data-dir", tmp_path)
        assert int(data.labels.max()) == len(data.classes) - 1 and data.images.float().std() > 30
        assert f"{name}: {N} training and {M} held-out images, {told}\n" == capsys.readouterr().out


# ---- Runs ------------------------------------------------------------------------------------------------------------
def options(*words) -> list[str]:  # of a run of seconds
    tiny = ("--epochs", 2, "--batch-size", 32, "--images", 64, "--holdout", 64, "--device", "cpu")
    return [str(w) for w in (*tiny, *words)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "shapes"
    train.main(options("--out", path, "--evaluate-every", 1))
    return path


@pytest.fixture
def bare(monkeypatch):
    monkeypatch.setattr(visualize, "draw", lambda run: None)
    monkeypatch.setattr(train, "linear_probe", lambda *args: 0.0)


def trained(path: Path, *words) -> dict:
    train.main(options("--out", path, *words))
    return clmae.load_record(path)


def same(first: dict, second: dict) -> bool:
    logs = [[entry | {"images_per_s": 0} for entry in record["log"]] for record in (first, second)]
    return logs[0] == logs[1] and all(torch.equal(first["model"][k], second["model"][k]) for k in first["model"])


def test_a_run_leaves_a_log_a_checkpoint_and_pictures(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    every = set("epoch lambda loss lr images_per_s loss_random hardness diversity objects knn linear_probe".split())
    assert records[1].keys() == every and records[0].keys() - every == {"loss_trivial", "knn_pixels"}
    assert [r["lambda"] for r in records] == pytest.approx([1, 1 / 3, -1]) and clmae.load_record(run)["log"] == records
    for name in ("masks.png", "masks.gif", "reconstructions.png", "curves.png", "step.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) >= 200 and getattr(picture, "n_frames", 1) == (3 if name == "masks.gif" else 1)
            assert len(picture.convert("L").getcolors()) > 50  # not blank


def test_the_same_command_gives_the_same_run_and_another_seed_another(tmp_path, bare):
    first, again = (trained(tmp_path / name, "--evaluate-every", 2) for name in ("first", "again"))
    often = trained(tmp_path / "often", "--evaluate-every", 1)  # measuring changes nothing: it draws no random number
    assert same(first, again) and same(first | {"log": []}, often | {"log": []})
    assert not same(first, trained(tmp_path / "other", "--evaluate-every", 2, "--seed", 1))


def test_the_loop_is_the_bare_one_with_shuffled_crops_and_a_schedule(tmp_path, monkeypatch, bare):
    """Each step: its own lambda, learning rate and crops; the logged loss is the mean of mae_loss over the epoch."""
    steps, forward = [], CLMAE.forward

    def spy(model, images, lam, *generator):
        output = forward(model, images, lam, *generator)
        if not generator:
            steps.append((images.flatten(1), float(lam), output.mae_loss.item(), torch.is_autocast_enabled("cpu")))
        return output

    monkeypatch.setattr(CLMAE, "forward", spy)
    monkeypatch.setattr(train, "learning_rate", Mock(wraps=train.learning_rate))
    monkeypatch.setattr(train.time, "perf_counter", itertools.count().__next__)  # a second from one look to the next
    log = trained(tmp_path / "run")["log"]
    images, lams, losses, autocast = zip(*steps, strict=True)
    assert lams == pytest.approx([1, 1 / 3, -1 / 3, -1]) and not any(autocast)
    assert [call.args[1] for call in train.learning_rate.call_args_list[::2]] == [0, 0.5, 1, 1.5]  # of two groups
    assert [r["loss"] for r in log[1:]] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    assert [r["images_per_s"] for r in log[1:]] == [64, 64]
    assert log[2]["lr"] == train.learning_rate(train.build_parser().parse_args(options()), 1.5)
    model, _ = clmae.load(tmp_path / "run")
    whole = model.standardise(loaded("--images", 64, "--holdout", 64).images)
    assert torch.cdist(torch.cat(images), whole.flatten(1)).min() > 0.1  # each is another crop
    monkeypatch.setattr(train, "find_device", lambda name: (torch.device("cpu"), True))
    trained(tmp_path / "half", "--min-crop", 1)
    assert all(step[3] for step in steps[4:]) and len(steps) == 8
    alike = torch.cdist(torch.cat([step[0] for step in steps[4:]]), torch.cat([whole, whole.flip(3)]).flatten(1))
    first, second = (alike.argmin(1) % 64).split(64)
    assert alike.amin(1).max() < 0.1 and not torch.equal(first, second)  # no crop; another order in each epoch
    for order in (first, second):
        assert torch.equal(order.sort().values, torch.arange(64)) and not torch.equal(order, torch.arange(64))


def test_the_masks_find_the_objects(tmp_path, monkeypatch, bare):
    monkeypatch.setitem(train.MODELS, "nano", SMALL | {"depth": 1, "masker_dim": 32})
    words = ("--images", 800, "--holdout", 120, "--epochs", 6, "--batch-size", 8, "--lr", 0.2, "--min-crop", 1)
    found = [entry["objects"] for entry in trained(tmp_path, *words)["log"]]
    assert min(found) < 0.3 and found[-1] > 0.7  # the partner shows them first; with ten seeds 0.25 and 0.73 at worst


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("masking", ["curriculum", "random"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(masking, device, tmp_path, monkeypatch, bare):
    own = ("--masking", masking, "--epochs", 3, "--seed", 4, "--lr", 1e-2, "--batch-size", 16, "--device", device)
    whole, broken = trained(tmp_path / "whole", *own), tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"python train.py --resume {broken}"):
        patch.setattr(train, "save", Mock(wraps=train.save, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt]))
        train.main(options(*own, "--out", broken))
    moved = broken.rename(tmp_path / "moved")
    train.main(["--resume", str(moved)])
    resumed = clmae.load_record(moved)
    assert same(whole, resumed) and torch.equal(whole["rng"]["cpu"], resumed["rng"]["cpu"])
    assert {name for name, value in whole["options"].items() if resumed["options"][name] != value} == {"out", "resume"}
    assert masking == "curriculum" or {entry["lambda"] for entry in whole["log"]} == {0.0}  # nothing to steer


def test_a_run_is_made_longer_and_a_finished_one_only_drawn(run, tmp_path, bare):
    shutil.copytree(run, tmp_path / "run")
    for epochs in (2, 4):
        train.main(["--resume", str(tmp_path / "run"), "--epochs", str(epochs), "--evaluate-every", "3"])
    log = clmae.load_record(tmp_path / "run")["log"]
    assert [r["lambda"] for r in log] == pytest.approx([1, 1 / 3, -1, 1 - 2 * 5 / 7, -1])
    assert log[3]["lr"] == train.learning_rate(train.build_parser().parse_args(options("--epochs", 4)), 2.5)


def test_compile_and_bfloat16_are_honoured(run, tmp_path, monkeypatch, bare):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: lambda *args: calls.append(args) or f(*args))
    assert trained(tmp_path / "run", "--compile")["model"].keys() == clmae.load_record(run)["model"].keys()
    train.main(["--resume", str(tmp_path / "run"), "--no-compile", "--epochs", "3"])
    assert len(calls) == 4
    monkeypatch.setattr(torch, "zeros", lambda n, device: types.SimpleNamespace(device=torch.device(device)))
    for device, has, expected in (("cuda", True, True), ("cuda", False, False), ("cpu", True, False)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, x=has: x or including_emulation
        )
        assert train.find_device(device) == (torch.device(device), expected)  # an old GPU would emulate it, slowly


def test_options_reach_model_and_optimiser_and_only_matrices_decay():
    images = types.SimpleNamespace(images=torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8))
    words = "--image-size 16 --kappa 3 --tau 0.5 --mask-ratio 0.5 --no-norm-pix --patch-size 4".split()
    model, eighth = (train.build(train.build_parser().parse_args(typed), images) for typed in (words, words[:-2]))
    c, optimizer = model.config, train.build_optimizer(model, 0.3)
    assert (c.kappa, c.tau, c.mask_ratio, c.norm_pix, c.patch_size) == (3, 0.5, 0.5, False, 4)
    assert eighth.config.patch_size == 2
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.3 if name.endswith("weight") and "norm" not in name else 0), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_defaults_are_those_of_the_results():
    typed, tiny = train.build_parser().parse_args([]), Config()  # ViT-Tiny
    assert (typed.epochs, typed.batch_size, typed.lr, typed.warmup_epochs, typed.min_crop) == (10, 64, 4e-3, 2, 0.2)
    assert (typed.weight_decay, typed.lambda_start, typed.lambda_end, typed.masking) == (0.05, 1, -1, "curriculum")
    assert (tiny.dim, tiny.depth, tiny.heads, tiny.patch_size, typed.image_size) == (192, 12, 3, 4, 32)
    for given in (typed, tiny):
        assert (given.kappa, given.tau, given.mask_ratio, given.norm_pix) == (2, 1, 0.75, True)


def test_what_a_notebook_passes_can_be_read_back(tmp_path, monkeypatch, bare):
    args = train.build_parser().parse_args(options("--epochs", 1))
    args.out, args.seed = tmp_path / "run", torch.tensor(3).numpy()[()]
    args.kappa, args.lr, args.weight_decay = torch.tensor([2.0, 0.01, 0.1]).double().numpy()
    monkeypatch.setattr(train, "knn_accuracy", lambda *args: torch.tensor(0.5).numpy()[()])
    train.train(args)
    record = clmae.load_record(tmp_path / "run")
    assert record["options"]["seed"] == 3 and record["options"]["out"] == str(args.out)
    assert [entry["knn"] for entry in record["log"]] == [0.5, 0.5]


# ---- Pictures --------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(monkeypatch) -> list:
    figures = []
    monkeypatch.setattr(visualize.Figure, "savefig", lambda figure, file, **how: figures.append(figure))
    return figures


def pictures(ax) -> list[torch.Tensor]:  # nan where nothing is drawn
    return [torch.tensor(image.get_array().astype(float).filled(math.nan)).float() for image in ax.images]


def is_warm(image, value: float) -> bool:
    red, _, blue, _ = image.to_rgba([value])[0]
    return red > blue


def test_masks_are_drawn_epoch_by_epoch_each_on_its_image(run, tmp_path, saved, monkeypatch):
    model, record = clmae.load(run)
    record["log"][1] |= {"lambda": 0.05, "hardness": 0.5}  # the easiest masks
    frames = []
    monkeypatch.setattr(visualize.PillowWriter, "grab_frame", lambda gif: frames.append([*map(pictures, gif.fig.axes)]))
    monkeypatch.setattr(visualize.PillowWriter, "finish", lambda gif: None)
    visualize.draw_masks(record, model, tmp_path / "masks.png")
    visualize.draw_film(record, model, tmp_path / "masks.gif")
    chances = [model.mask_probability(scores).reshape(8, 8, 8) for scores in record["scores"]]
    assert not torch.equal(chances[0], chances[1]) and len(visualize.describe_masks(record, model, 2)) == 3
    for i, image in enumerate(record["images"][:6].float()):
        original, *row = saved[0].axes[4 * i : 4 * i + 4]
        assert torch.equal(pictures(original)[0], image.permute(1, 2, 0))
        for ax, frame, chance in zip(row, frames, chances, strict=True):
            assert torch.equal(pictures(ax)[0], image.mean(0)) and torch.equal(pictures(ax)[1], chance[i])
            assert i == 5 or all(map(torch.equal, frame[5 + i], pictures(ax)))  # the film has five
    assert is_warm(ax.images[1], 1.0) and not is_warm(ax.images[1], 0.5)  # red: more often than by a random mask
    roles = [ax.get_title().split("\n")[2] for ax in saved[0].axes[1:4]]
    assert roles == ["untrained", "neutral", "adversary"]


def test_a_step_is_drawn_with_the_numbers_of_the_step(run, tmp_path, saved):
    model, record = clmae.load(run)
    lam = record["log"][-1]["lambda"] = -0.7
    with torch.no_grad():  # as a notebook may have it
        visualize.draw_step(record, model, tmp_path / "step.png")
    image, raw, s, y, seen, pred, loss, cost, soft, push = saved[0].axes
    x, k = model.standardise(record["images"][:1]), model.config.visible
    out, a = model(x, lam, generator()), model.masker(model.encoder.embed(x))[0].detach()
    above = (out.scores + clmae.gumbel_noise(out.scores, generator())).detach()[0]
    above = above - above.topk(k + 1).values[-2:].mean()  # y less theta
    patch_loss = out.patch_loss[0].detach().masked_fill(above > 0, math.nan)  # of hidden patches
    costs, near = patch_loss - out.mae_loss.detach(), above.sigmoid()
    pushes = (1000 * lam * costs * near * (1 - near) / (model.config.patches - k)).masked_fill(a > 0, math.nan)

    # The frame is where the sum of |push| is largest; the other panels have what is in it.
    left, top = (corner // 4 for corner in image.patches[0].get_xy())
    sums = {(i, j): pushes.reshape(8, 8)[i : i + 4, j : j + 4].abs().nansum() for i in range(5) for j in range(5)}
    assert (top, left) == max(sums, key=sums.get)
    expected = (a, 1.4 * a.clamp(max=0), above, patch_loss, costs, near, pushes, (out.mask[0] == 1) & (a > 0))
    *framed, grey = (values.reshape(8, 8)[top : top + 4, left : left + 4] for values in expected)
    for ax, values in zip((raw, s, y, loss, cost, soft, push), framed, strict=True):
        written = {text.get_position()[::-1]: text.get_text() for text in ax.texts}
        assert written == {
            (i, j): f"{values[i, j] + 0:.{1 + (ax in (cost, soft, push))}f}"
            for i, j in values.isfinite().nonzero().tolist()
        }
    assert torch.equal(pictures(push)[0] == 1, grey)
    for ax, picture in zip((seen, pred), visualize.seen_and_filled(model, record["images"][:1], out), strict=True):
        shown = picture[0, :, 4 * top : 4 * top + 16, 4 * left : 4 * left + 16].clamp(0, 255).byte()
        assert torch.equal(pictures(ax)[0], shown.permute(1, 2, 0).float())
    assert is_warm(cost.images[1], 1) and not is_warm(push.images[1], 1)  # orange: above the mean; blue: up


def test_the_readmes_push_is_that_of_its_picture():  # which has its values as JSON
    step = json.loads(Image.open(ROOT / "assets" / "step.png").text["step"])
    formula = r"\*Epoch (\S+) of .*?`(\S+) · (\S+) · (\S+) · \(1 - (\S+)\) / 48 = (\S+)`"
    epoch, lam, cost, soft, again, push = map(float, re.search(formula, page("README.md"), re.DOTALL).groups())
    values = torch.tensor([step[name] for name in ("cost", "soft", "push")])  # (3, 4, 4)
    assert (values.movedim(0, 2).sub(torch.tensor([cost, soft, 1000 * push])).abs() < 0.005).all(2)[-1].any()
    worked = lam * cost * soft * (1 - again) / 48
    assert (epoch, lam, soft, push) == (step["epoch"], step["lambda"], again, round(worked, 5))


def test_masks_of_ones_own_are_drawn_without_a_push(tmp_path, saved, monkeypatch):
    model, images = CLMAE(small(image_size=(8, 24))), torch.randint(256, (8, 3, 8, 24), dtype=torch.uint8)
    own = Mock(side_effect=lambda x, lam: 2 * abs(lam) * torch.linspace(-1, 0, 12)[None])
    monkeypatch.setattr(CLMAE, "score_tokens", own)
    visualize.draw_step({"images": images, "log": [{"epoch": 0, "lambda": 1.0}]}, model, tmp_path)
    image, raw, s, *_, push = saved[0].axes
    assert image.patches[0].get_xy() == (4, 0) and image.patches[0].get_width() == 16  # in the middle
    assert pictures(s)[1].shape == (2, 4) and (pictures(s)[1].diff() >= 0).all()  # not transposed
    assert all(pictures(ax)[1].isnan().all() and not pictures(ax)[0].any() for ax in (raw, push))


def test_reconstructions_show_what_is_visible_and_fill_what_is_masked(run, tmp_path, saved):
    model, record = clmae.load(run)
    record["log"][-1]["lambda"] = -0.5  # at -1 the mask is that of +1, epoch 0's
    visualize.draw_reconstructions(record, model, tmp_path / "r.png")
    raw, drawn = record["images"][:4], torch.stack([pictures(ax)[0].permute(2, 0, 1) for ax in saved[0].axes])
    original, *columns = drawn.unflatten(0, (4, 5)).transpose(0, 1)
    assert torch.equal(original, raw.float())
    for lam, seen, filled in ((0.0, *columns[:2]), (-0.5, *columns[2:])):
        mask = model(model.standardise(raw), lam, generator()).mask
        masked = F.interpolate(mask.reshape(-1, 1, 8, 8), scale_factor=4) == 1  # (4, 1, 32, 32)
        away = (filled - raw).flatten(1)
        assert torch.equal(seen, raw * ~masked + 160 * masked) and torch.equal(filled * ~masked, raw * ~masked)
        assert away.mean(1).abs().max() < 20 and away.abs().mean(1).min() > 2  # of the same brightness, not the same


def test_curves_show_all_that_was_logged_each_by_its_name(run, saved, monkeypatch):
    record = clmae.load_record(run)
    for entry in record["log"]:
        entry["my_own_figure"] = 2.0 + entry["epoch"]
    monkeypatch.setattr(visualize, "load", lambda run: (CLMAE(small(kappa=0)), record))
    for name in ("draw_masks", "draw_film", "draw_reconstructions"):
        monkeypatch.setattr(visualize, name, lambda *args: None)
    visualize.draw(run)
    lines = [(ax.get_title(), line) for ax in saved[0].axes for line in ax.lines if line.get_color() != "0.8"]
    drawn = {f"{title}, {line.get_label()}": [*line.get_ydata()] for title, line in lines}
    for key, words in (
        ("lambda", "lambda"), ("hardness", "learned / random masks"), ("loss", "loss, training"), ("knn", ", features"),
        ("loss_random", "loss, held out"), ("loss_trivial", "predicting the patch mean"), ("knn_pixels", "raw pixels"),
        ("linear_probe", "linear probe"), ("objects", "objects"), ("my_own_figure", "my_own_figure"),
    ):  # fmt: skip
        (values,) = (values for said, values in drawn.items() if words in said)
        logged = [entry[key] for entry in record["log"] if key in entry and (entry["epoch"] or key != "loss_random")]
        assert values == pytest.approx(2 * logged if key in ("loss_trivial", "knn_pixels") else logged), key


def test_runs_are_compared_as_far_as_they_go(run, tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = {"a-0": [1.0, 0.9, 0.8], "a-1": [1.0, 0.7], "b": [1.0], "try-1": [0.5], "try-2": [0.5]}
    for seed, (name, log) in enumerate(logs.items()):
        record = clmae.load_record(run) | {"model": {}, "run": name}  # of a clmae.py that was changed since
        record["options"] |= {"seed": seed, "evaluate_every": seed, "out": name, "kappa": 2 + (name == "try-2")}
        record["log"] = [{"epoch": i, "hardness": value} for i, value in enumerate(log)]
        Path(name).mkdir()
        torch.save(record, Path(name, "checkpoint.pt"))
    settings = visualize.matplotlib.rcParams.copy()
    visualize.main([*logs])
    assert visualize.matplotlib.rcParams.copy() == settings and "pyplot" not in page("visualize.py")  # for a notebook
    ax, told = saved[0].axes[0], [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert told == ["a, 2 seeds: mean and range", "b", "try-1", "try-2"]  # try-2 has other options: no seed of try
    lines = [line for line in ax.lines if line.get_label() in told]
    assert ax.get_title().startswith("hardness") and len({line.get_color() for line in lines}) == 4
    values = [line.get_ydata().round(6).tolist() for line in lines]
    assert values == [[1, 0.8], [1], [0.5], [0.5]]  # the mean, of the epochs that both have
    band = {tuple(corner) for corner in ax.collections[0].get_paths()[0].vertices.round(6).tolist()}
    assert band == {(0, 1), (1, 0.7), (1, 0.9)}


# ---- Wrong input: one line that names it, an exit status that is not 0, nothing overwritten --------------------------
def run_fails(capsys, *words, main=train.main) -> str:
    # The line that a command says which must fail; argparse's own, below its usage, has been printed already.
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    if stop.value.code == 2:
        return capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*", stop.value.code) and len(stop.value.code) < 350
    assert main == visualize.main or re.search(r"\(.+:\d+\)$", stop.value.code)  # for who edits the code
    return stop.value.code


WRONG = [  # a tree of pictures in data/, what is typed, what is said, with ... for what was typed
    ("", "--mask-ratio 1.5, --mask-ratio nan", "... is not between 0 and 1"),
    ("", "--lr nan, --lr inf, --lr -0.001, --holdout -1, --warmup-epochs -1.0", "... is not between 0 and inf"),
    ("", "--batch-size 0, --epochs 0, --evaluate-every 0, --image-size 0", "... is not between 1 and inf"),
    ("", "--images 0", "... is not between 2 and inf"),
    ("", "--lambda-start 2.0, --lambda-end -1.5", "... is not between -1 and 1"),
    ("", "--min-crop 3.0", "... is not between 0.01 and 1"),
    ("", "--kappa 0.0, --tau -1.0, --tau inf", "... is not between 1e-06 and 1000000000.0"),
    ("", "--seed -1", "... is not between 0 and 9223372036854775808"),
    ("", "--patch-size 5", "patch_size 5 must divide the image size 32 x 32"),
    ("", "--mask-ratio 0", "mask_ratio 0.0 leaves 64 of 64"),
    ("", "--batch-size 65", "64 training, 64 held-out images: --batch-size is 65"),
    ("", "--epochs many", "argument --epochs: invalid int value: 'many'"),
    ("", "--model huge", "argument --model: invalid choice: 'huge' (choose from"),
    ("", "--nonsense", "unrecognized arguments: ..."),
    ("", "--device tpu", "...: Expected one of cpu, cuda"),
    ("", "--out a\0b, --data a\0b", "null"),
    ("", "--resume nowhere, --resume ''", "checkpoint.pt: [Errno 2] No such file"),
    ("", "--data cifar10", "no route to host"),
    ("", "--data cifar11, --data ''", "is neither shapes, cifar10"),
    ("", "--data data", "no images in data: expected .jpg"),
    ("__MACOSX=3", "--data data", "no images in data: expected .jpg"),  # three pictures in data/__MACOSX
    (".=5", "--data data --holdout 0", "4 training, 1 held-out images: --batch-size is 32"),
    (".=40 thumbs=3", "--data data", "data has images beside folders (thumbs)"),
    ("val/cat=3", "--data data", "data/val is no class: --data takes it alone, or a folder with train/ and val/"),
    ("bus=3 Train=3", "--data data", "data/Train is no class"),
    ("train/cat=3 train/Test=3 val/cat=3 val/Test=3", "--data data", "data/train/Test is no class"),
    ("train/cat=3 test/dog=3", "--data data", "data/test has other classes (cat): --data data/train reads the first"),
    ("cat=3 dog=0", "--data data", "no images in data/dog"),
    ("cat=12 dog=12 dog/up->..", "--data data", "times, by links: leave one"),  # dog/up is a link
    ("train/a=3 val/a=0 val/a/0.png->../../train/a/RGB-0.png", "--data data", "train/a/RGB-0.png is in data 2 times"),
    (".=20 cut.png<PNG", "--data data", "cannot read data/cut.png"),  # its content
    (".=20 I.tiff:I", "--data data", "cannot read data/I.tiff (mode I has more than 8 bits a channel: save it with 8)"),
    (".=20 I16.png:I;16", "--data data", "cannot read data/I16.png (mode I"),
]


@pytest.mark.parametrize(("tree", "several", "message"), WRONG)
def test_wrong_input_is_named(tree, several, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Mock(side_effect=OSError("no route to host")))
    save_images(Path("data"), 0)
    for place, sign, what in (re.split("(=|->|:|<)", item) for item in tree.split()):
        file = Path("data", place)
        if sign == "=":
            save_images(file, int(what))
        elif sign == "->":
            file.symlink_to(what)
        else:
            file.write_text(what) if sign == "<" else Image.new(what, (16, 16)).save(file)
    before = sorted(tmp_path.rglob("*"))
    for typed in several.split(", "):
        assert message.replace("...", typed) in run_fails(capsys, *options(), *shlex.split(typed))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_an_existing_run_is_not_touched_and_a_resumed_one_keeps_its_options_and_its_images(run, tmp_path, capsys, bare):
    before = (run / "checkpoint.pt").read_bytes()
    assert f"{run} has a run: go on with --resume {run}, or take another" in run_fails(capsys, *options("--out", run))
    assert f"--epochs 1: {run} has 2" in run_fails(capsys, "--resume", run, "--epochs", 1)
    others = "--patch-size 8, --lr 0.1, --batch-size 16, --seed 5, --images 32, --masking random, --tau 2.0"
    for typed in others.split(", "):
        assert f"{typed}: the run keeps" in run_fails(capsys, "--resume", run, *typed.split())
    assert (run / "checkpoint.pt").read_bytes() == before
    photos, moved, out = tmp_path / "photos", tmp_path / "moved", tmp_path / "run"
    files = save_images(photos / "cat", 120, size=(32, 32))
    trained(out, "--data", photos, "--images", 100, "--holdout", 20, "--epochs", 1)
    aside = files[7].rename(files[7].with_name("z.png"))  # another order: some trained on would be held out
    assert f"--data {photos} is not what {out} began with" in run_fails(capsys, "--resume", out, "--epochs", 2)
    aside.rename(files[7])
    photos.rename(moved)
    train.main(["--resume", str(out), "--epochs", "2", "--data", str(moved)])  # another place
    for resumed, data in ((run, moved), (out, "shapes")):
        error = run_fails(capsys, "--resume", resumed, "--data", data)
        assert f"--data {data} is not what {resumed} began with" in error


def test_a_damaged_checkpoint_is_named_and_runs_no_code(run, tmp_path, capsys):
    file, whole = tmp_path / "checkpoint.pt", (run / "checkpoint.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of some weight
    bomb = type("Bomb", (), {"__reduce__": lambda self: (Path.mkdir, (tmp_path / "exploded",))})
    for content in (b"", whole[:5000], flipped, [1, 2], {"options": bomb()}, {"model": {}}):
        torch.save(content, file) if isinstance(content, dict | list) else file.write_bytes(content)
        for main, *words in ((train.main, "--resume"), (visualize.main,), (visualize.main, run)):
            assert f"cannot read {file}: " in run_fails(capsys, *words, tmp_path, main=main)
    assert not (tmp_path / "exploded").exists()


def test_what_stops_a_run_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch, bare):
    for name, words in (("middle", ()), ("end", ("--batch-size", 64))):  # of an epoch
        broken = options("--out", tmp_path / name, "--lr", 1e30, "--warmup-epochs", 0, *words)
        assert "the loss of epoch 1 is not finite: try a lower --lr" in run_fails(capsys, *broken)
        assert clmae.load(tmp_path / name)[1]["epoch"] == 0

    def full(record, file):
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("the disk is full")

    trained(tmp_path / "full", "--epochs", 1)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="the disk is full"):  # what is no input's fault keeps its traceback
        train.main(["--resume", str(tmp_path / "full"), "--epochs", "2"])
    assert clmae.load(tmp_path / "full")[1]["epoch"] == 1


# ---- The README and its recipes --------------------------------------------------------------------------------------
def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PAGES = ("README.md", "assets/results.md", "assets/recipes.md")


def blocks(language: str, *names: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(map(page, names)), re.DOTALL)


def test_the_readmes_commands_run_on_a_tiny_budget(run, tmp_path, monkeypatch, bare):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "MODELS", {name: SMALL for name in train.MODELS})
    for folder in ("cifar10/train/a", "cifar10/train/b", "cifar10/test/a", "cifar10/test/b", "path/to/photos"):
        save_images(tmp_path / folder, 80, size=(40, 32))
    shutil.copytree(tmp_path / "cifar10", tmp_path / "imagenette")
    shutil.copytree(run, tmp_path / "runs" / "shapes")  # the command of the README's Start made it
    tiny = options("--images", 32, "--holdout", 32, "--image-size", 32, "--no-compile")
    for name in ("README.md", "assets/results.md"):
        code = "".join(blocks("bash", name))
        for script, typed in re.findall(r"^python (train|visualize)\.py (.*)", code, re.MULTILINE):
            words = [f"./{w}" if w in ("cifar10", "imagenette") else w for w in shlex.split(typed, comments=True)]
            if script == "train" and name == "assets/results.md":
                train.build_parser().parse_args(words)  # the README has such runs as well
            elif script == "train":
                train.main([*words, "--epochs", "2"] if "--resume" in words else [*words, *tiny])
            elif name == "README.md":
                visualize.main(words)
    assert {folder.name for folder in Path("runs").iterdir()} >= {"shapes-random", "cifar10", "imagenette", "photos"}


def test_the_readmes_notebook_lines_run(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "runs" / "shapes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", types.SimpleNamespace(figure=visualize.Figure))
    monkeypatch.setitem(train.DATASETS, "cifar100", lambda root, part: fashion(70))
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.jpg")
    code, scope = blocks("python", *PAGES), {}
    for words in ('x = model.standardise(record["images"])  # held-out', "photo.jpg", "train.evaluate"):
        exec(next(block for block in code if words in block), scope)
    model, record, x, z, p = (scope[name] for name in ("model", "record", "x", "z", "p"))
    assert scope["features"].shape == (8, 32) and z.shape == (70, 32)  # 96 of the README's model, which is not SMALL
    assert p.shape == (8, 8) and p.mean().item() == pytest.approx(0.75) and p.std() > 0.01
    data = train.load_data(argparse.Namespace(**record["options"]))
    std, mean = torch.std_mean(data.images.float(), (0, 2, 3))
    torch.testing.assert_close((model.mean.flatten(), model.std.flatten()), (mean, std), rtol=1e-4, atol=1e-3)
    z, z_val = (train.encode(model, images) for images in (data.images, data.val_images))
    assert train.evaluate(z, data.labels, z_val, data.val_labels).items() <= record["log"][-1].items()
    now = model.scores(model.standardise(data.val_images[:8]), record["log"][-1]["lambda"])
    torch.testing.assert_close(now, record["scores"][-1], rtol=1e-3, atol=1e-3)
    pytest.importorskip("timm")
    exec(next(block for block in code if "import timm" in block), scope)
    torch.testing.assert_close(scope["features"], model.features(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scope["vit"].forward_features(x), model.encode(x), rtol=1e-3, atol=1e-4)


def fashion(n: int) -> list[tuple[Image.Image, int]]:  # as a data set of torchvision that does not name its classes
    return [(Image.new("L", (40, 40), 6 * (i % 40)), i % 3) for i in range(n)]


def changed(monkeypatch, *words: str) -> types.ModuleType:
    """train.py, with the recipes' changes that have these words applied to it and to clmae.py."""
    sources = {name: page(f"{name}.py") for name in ("clmae", "train")}
    for word in words:
        (block,) = (block for block in blocks("diff", "assets/recipes.md") if word in block)
        _, *hunks = re.split(r"@@ (\w+)\.py.*\n", block)  # file, lines, file, lines, ...
        for name, hunk in zip(hunks[::2], hunks[1::2], strict=True):
            lines = hunk.rstrip("\n").splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-")
            assert sources[name].count(old) == 1
            sources[name] = sources[name].replace(old, new)
    for name, source in sources.items():
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, module.__dict__)
    monkeypatch.setitem(module.MODELS, "nano", SMALL)
    return module


CHANGES = ["progress**2", "Conv2d", "FashionMNIST", "score_std", "F.normalize"]  # all at once


@pytest.mark.parametrize("words", [CHANGES, ["torch.rand(", "2 * end"], ["advantage"]])
def test_the_recipes_changes_work(words, tmp_path, monkeypatch, bare):
    module = changed(monkeypatch, *words)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda root, train, download: fashion(140))
    module.main(options("--out", tmp_path, "--data", "fashion" if words == CHANGES else "shapes"))
    record = clmae.load_record(tmp_path)
    log, scores = record["log"], record["scores"][1].reshape(8, 4, 2, 4, 2)
    assert len(log) == 3 and all(math.isfinite(value) for entry in log for value in entry.values())
    if words == CHANGES:
        assert log[0]["score_std"] > 0 and log[1]["lambda"] == pytest.approx(1 - 2 * (1 / 3) ** 2 * (3 - 2 / 3))
        assert {"knn", "linear_probe"} <= log[2].keys() and record["model"]["masker.score.weight"].shape[2:] == (3, 3)
    if "2 * end" in words:
        assert torch.equal(scores, scores[:, :, :1, :, :1].expand_as(scores)) and scores.std() > 10
        assert [entry["lambda"] for entry in log] == pytest.approx([1, -1 / 3, 0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_recipe_of_cuda_graphs_trains_what_an_eager_run_trains(device, tmp_path, monkeypatch, bare):
    # On a CPU the capture is replaced; on a GPU rounding may differ.
    eager = trained(tmp_path / "eager", "--device", device)
    if device == "cpu":
        capture = Mock(side_effect=lambda step, sample, allow_unused_input: (step(*sample), step)[1])  # it draws, too
        for name in ("get_rng_state", "set_rng_state"):
            monkeypatch.setattr(torch.cuda, name, getattr(torch, name))
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    changed(monkeypatch, "make_graphed_callables").main(options("--out", tmp_path / "graph", "--device", device))
    graph = clmae.load_record(tmp_path / "graph")
    for name, value in eager["model"].items():
        torch.testing.assert_close(graph["model"][name], value, rtol=0, atol=0 if device == "cpu" else 0.02)


def spied(monkeypatch, place, name: str) -> list:
    calls, real = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **more: calls.append((real(*args, **more), more)) or calls[-1][0])
    return calls


def test_the_recipe_of_fine_tuning_learns_from_the_patch_tokens_and_moves_the_first_layers_least(monkeypatch, capsys):
    torch.manual_seed(0)
    images, labels = torch.zeros(256, 3, 16, 16, dtype=torch.uint8), torch.arange(256) % 2
    images[labels == 1, :, ::2] = 255
    data, model = train.Data(images, labels, ["plain", "striped"], 0, images[:64], labels[:64]), CLMAE(small())
    monkeypatch.setattr(clmae, "load", lambda run: (model, {"options": vars(train.build_parser().parse_args([]))}))
    monkeypatch.setattr(train, "load_data", lambda args, device: data)
    places = (torch.optim, "AdamW"), (F, "cross_entropy"), (train, "augment"), (CLMAE, "features")
    optimizers, losses, crops, features = (spied(monkeypatch, *place) for place in places)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    (recipe,) = (block for block in blocks("python", "assets/recipes.md") if "pretrained" in block)
    settings = '"epochs": 50, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 5.0, '
    assert settings + '"min_crop": 0.3' in recipe
    exec(recipe.replace(settings, '"epochs": 4, "batch_size": 32, "lr": 1e-2, "warmup_epochs": 1.0, '), {})
    told = re.findall(r"(.*): (.*) % after 4 epochs", capsys.readouterr().out)
    assert [name for name, _ in told] == ["pretrained", "from scratch"] and float(told[0][1]) == 100
    assert sum(z.requires_grad for z, _ in features) == len(crops) == 2 * 4 * 8  # through the patch tokens, not CLS
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(crops[:32], crops[32:], strict=True))  # the same for both
    assert all(more == {"label_smoothing": 0.1} for _, more in losses) and not torch.equal(crops[0][0], crops[1][0])
    groups = {id(p): group for group in optimizers[0][0].param_groups for p in group["params"]}
    blocks_above = {"norm": 0, "blocks.1": 1, "blocks.0": 2, "patch_embed": 3, "cls_token": 3}
    for name, p in model.encoder.named_parameters():
        group, scale = groups[id(p)], 0.75 ** blocks_above[re.match(r"[a-z_]+(\.\d)?", name)[0]]
        assert not torch.equal(before[name], p) and group["weight_decay"] == (0.05 if p.ndim in (2, 4) else 0), name
        assert group["scale"] == scale and group["lr"] == optimizers[0][0].param_groups[1]["lr"] * scale, name
    assert len(groups) == len(before) + 2  # and the head's


def test_the_recipe_of_timing_times_both_arms_in_turns(capsys, monkeypatch):
    steps = spied(monkeypatch, CLMAE, "forward")
    (recipe,) = (block for block in blocks("python", "assets/recipes.md") if "turn by turn" in block)
    exec(recipe.replace("range(21)", "range(3)").replace("256", "8").replace("--model tiny", "--image-size 16"), {})
    assert [bool(output.scores.any()) for output, _ in steps] == 3 * [False, True]
    assert re.search(r"random [\d.]+ ms, curriculum / random, turn by turn [\d.]+\n$", capsys.readouterr().out)


def test_the_recipe_of_more_than_one_gpu_keeps_two_processes_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes cannot share a GPU
    # Three steps, at lambda = 1, 0, -1; one more would fail, had any weight had no gradient in the last.
    (script,) = (block for block in blocks("python", "assets/recipes.md") if "DistributedDataParallel" in block)
    for old, new in (
        ("--data cifar10 --model tiny --epochs 100", "--images 24 --holdout 8 --epochs 1"),
        ("runs/ddp", str(tmp_path / "run")),
        ("share = 256", "share = 4"),
        ("output.loss.backward()", "print(f'<{lam}>'); output.loss.backward()"),
        ("    if rank == 0", "    ddp(images, lam)\n    if rank == 0"),
        ("dist.d", f"torch.save([*model.parameters(), order, torch.rand(3)], rf'{tmp_path}/{{rank}}')\ndist.d"),
    ):
        script = script.replace(old, new)
    (tmp_path / "ddp.py").write_text(f"import sys; sys.path.insert(0, '')\n{script}")  # as beside train.py
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    told = subprocess.run([*torchrun, tmp_path / "ddp.py"], capture_output=True, text=True, cwd=ROOT)
    assert sorted(map(float, re.findall("<(.*?)>", told.stdout))) == [-1, -1, 0, 0, 1, 1], told.stderr
    first, second = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
    weights = zip(first[:-2], second[:-2], clmae.load(tmp_path / "run")[0].parameters(), strict=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in weights)
    assert sorted(first[-2].tolist() + second[-2].tolist()) == [*range(24)] and not torch.equal(first[-1], second[-1])


def test_the_readmes_step_is_the_models_and_its_bare_loop_trains(model, images, monkeypatch, capsys):
    clmae.tour()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]  # a lambda each
    assert len({row[2] for row in rows}) == 2 and {row[3] for row in rows} == {row[5] for row in rows} == {"0.00000"}
    step, loop = (
        next(b for b in blocks("python", "README.md") if words in b) for words in ("theta", "curriculum_factor")
    )
    model.config.tau = 0.5
    scope = {
        "torch": torch, "gumbel_noise": clmae.gumbel_noise, "model": model, "images": images, "generator": generator(),
        "B": 6, "L": 16, "K": 4, "kappa": 2.0, "tau": 0.5, "lam": -0.7,
    }  # fmt: skip
    exec(step, scope, written := {})
    output = model(images, -0.7, generator())
    torch.testing.assert_close((written["mae_loss"], written["masker_loss"]), (output.mae_loss, output.masker_loss))
    torch.testing.assert_close(gradients(model, written["loss"]), gradients(model, output.loss))
    torch.testing.assert_close(-torch.autograd.grad(written["loss"], written["s"])[0], written["push"])
    data = train.shapes(200, 32, seed=1)[0].permute(0, 2, 3, 1).numpy()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: types.SimpleNamespace(data=data))
    exec(re.sub(r"epochs = \d+", "epochs = 2", loop), scope := {})
    assert scope["output"].mae_loss.isfinite() and scope["lam"] == -1


# ---- The tables ------------------------------------------------------------------------------------------------------
def summary(log: list[dict]) -> dict:
    """What a line of assets/runs.jsonl has of a run's log, beside data, row, options, seed, threads, torch."""
    first, last, ends = log[0], log[-1], ("hardness", "objects", "diversity")
    line = {name: last[name] for name in ("knn", "linear_probe", "loss_random") if name in last}
    line |= {name: [min(entry[name] for entry in log), last[name]] for name in ends if name in last}
    line["images_per_s"] = statistics.median(entry["images_per_s"] for entry in log[1:])
    floors = ("knn", "linear_probe", "knn_pixels", "loss_trivial")
    return line | {"floors": {name: first[name] for name in floors if name in first}}


def cell(head: str, runs: list[dict], random: list[dict]) -> str:
    """A cell below this head: mean ± standard deviation over seeds; minus random, by pairs, ± the 95 % interval."""
    name = {"kNN": "knn", "linear": "linear_probe", "probe": "linear_probe"}.get(head.split()[0], head.split(",")[0])
    if head == "seeds":
        return str(len(runs))
    if name not in runs[0] or ("minus" in head and (runs[0] in random or "hardness" not in runs[0])):
        return ""  # random masks, an untrained model
    if "lowest / last" in head:
        return " / ".join(f"{statistics.mean(ends):.2f}" for ends in zip(*(run[name] for run in runs), strict=True))
    values, sign, factor = [run[name] for run in runs], "", 1.0
    if "minus" in head:
        values = [value - pair[name] for value, pair in zip(values, random, strict=True)]
        sign, factor = "+", {2: 4.303, 3: 3.182, 4: 2.776}[len(values) - 1] / len(values) ** 0.5  # Student's t
    spread = f" ± {factor * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


EARLIER = {  # tables of runs whose logs are not kept, or not train.py's: so many rows, none with an interval
    "masks, of an earlier version, not recomputed": 2,
    "scores, of an earlier version, not recomputed": 5,
    "seed, of an earlier version, not recomputed": 3,
    "masks, on an H100": 11,
}


def test_tables_follow_from_the_runs(run):
    rows, used = {}, set()  # by data and row
    for line in map(json.loads, page("assets/runs.jsonl").splitlines()):
        rows.setdefault((line["data"], line["row"]), []).append(line)
    for table in re.findall(r"(?:^\|.*\n)+", "\n\n".join(map(page, PAGES)), re.MULTILINE):
        head, _, *lines = ([c.strip() for c in line.strip("|").split("|")] for line in table.splitlines())
        if not re.search("kNN|probe|hardness|objects", "".join(head[1:])):
            continue
        if head[0] in EARLIER:
            assert len(lines) == EARLIER[head[0]] and not re.search(r"[-+][\d.]+ ± ", table)
            continue
        data = head[0].partition(", on ")[2]
        for label, *cells in lines:
            label, _, other = label.partition("; ")
            runs = [x["floors"] for x in rows[data, "random"]] if label == "untrained" else rows[data, label]
            assert cells == [cell(title, runs, rows[data, other or "random"]) for title in head[1:]], label
            used.add((data, label))
    assert used >= {key for key in rows if key[1] != "random"}  # no run without its row
    assert summary(clmae.load_record(run)["log"]).keys() >= {"knn", "objects", "diversity", "floors"}
    short = {label: runs[0] for (data, label), runs in rows.items() if data == "4000 shapes"}
    for name, label in (("knn", "no noise"), ("linear_probe", "also shows, no clamp")):
        assert f"from {short['unchanged'][name]:.1f} to {short[label][name]:.1f}" in " ".join(page("README.md").split())
    for (data, label), runs in rows.items():
        name = f"log-{data}-{label.partition(',')[0]}.jsonl".replace(" ", "-")
        log = [json.loads(line) for line in page(f"assets/{name}").splitlines()]
        assert runs[0]["seed"] == 0 and summary(log).items() <= runs[0].items(), name
    for line in map(json.loads, page("assets/cifar10-vit-tiny-100-epochs.jsonl").splitlines()):
        ends = [f"{entry['knn']:.1f} / {entry['probe']:.1f}" for entry in line["log"][3:]]
        assert " | ".join([" / ".join(f"{entry['knn']:.1f}" for entry in line["log"][:3]), *ends]) in page(PAGES[1])

"""What CL-MAE guarantees, and what its two scripts promise. `pytest` runs everything in a minute or two.

No test needs a network, a GPU or a data set: the images are generated.
"""

import argparse
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
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


# ======================================================================================================================
# I. What the method guarantees: read it as the specification of clmae.py
# ----------------------------------------------------------------------------------------------------------------------
# The sampler


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
    _, hard, _ = gumbel_top_k(torch.tensor(scores).expand(n, -1), 2, generator=generator())
    exact = inclusion_probabilities(scores, 2)
    error = (exact * (1 - exact) / n).sqrt()
    assert ((hard.double().mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("scores", [torch.zeros(50, 9), torch.randn(50, 9) * 1e4, torch.full((50, 9), -1e30)])
def test_exactly_k_tokens_are_visible_whatever_the_scores(scores):
    for k in (1, 4, 8):
        ids, hard, soft = gumbel_top_k(scores, k, generator=generator())
        assert (hard.sum(1) == k).all() and torch.equal(hard, torch.zeros_like(hard).scatter(1, ids, 1.0))
        last, first = soft.masked_fill(hard == 0, 2).amin(1), soft.masked_fill(hard == 1, -1).amax(1)
        assert soft.isfinite().all() and (last >= 0.5).all() and (first <= 0.5).all()  # on the side of hard
        torch.testing.assert_close(last + first, torch.ones(50), atol=0.01, rtol=0)  # theta is midway between them


def test_noise_is_finite_where_uniform_draws_0(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda u, generator=None: u.zero_())
    assert clmae.gumbel_noise(torch.zeros(2, 3)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# The curriculum


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
    a = model.masker(model.encoder.embed(images))
    torch.testing.assert_close(out.scores, kappa * abs(lam) * torch.minimum(a, torch.zeros(())))

    _, hard, soft = gumbel_top_k(out.scores.detach(), 4, tau, generator())
    mean = (out.patch_loss * out.mask).sum(1, keepdim=True) / 12
    cost = ((out.patch_loss - mean) * (1 - hard)).detach()
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def batch(n):
        noisy = (torch.rand(n, 16, 1) < 0.25).float()
        patches = torch.randn(n, 1, 1) * 0.5 + noisy * torch.randn(n, 16, 48)
        return unpatchify(patches, 4, (4, 4)), noisy.squeeze(-1)

    held_out, noisy = batch(200)
    for lam, sign in ((1.0, -1), (-1.0, 1)):
        for _ in range(100):
            model(batch(64)[0], lam).loss.backward()
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


def test_raw_scores_have_mean_0_and_std_1(model, images):
    a = model.masker(model.encoder.embed(images))
    torch.testing.assert_close(a.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.std(1, unbiased=False), torch.ones(6), atol=1e-3, rtol=0)


def test_mask_probability_is_the_chance_of_being_masked():
    scores = torch.tensor([[1.5, 0.3, 0.0, -0.7, -2.0], [-1.0, 0.0, 0.0, 0.0, 2.0]])
    exact = torch.stack([1 - inclusion_probabilities(s.tolist(), 2) for s in scores])
    model = CLMAE(small(image_size=(4, 20), mask_ratio=0.6))
    torch.testing.assert_close(model.mask_probability(scores), exact.float(), atol=0.06, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The masked autoencoder


def plain_block(x: torch.Tensor, state: dict, prefix: str, heads: int) -> torch.Tensor:
    """A pre-norm transformer block of torch's own, with weights by name."""
    D = x.shape[-1]
    block = torch.nn.TransformerEncoderLayer(D, heads, 4 * D, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj"}
    names |= {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    for name, p in block.named_parameters():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        p.data = state[prefix + name]
    return block(x)


def plain_mae(model: CLMAE, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction (L, p*p*C) and loss of a plain MAE on one image (C, H, W), written without the module's code."""
    c, s = model.config, model.state_dict()
    p, rows, columns = c.patch_size, *c.grid
    tiles = [image[:, p * r : p * r + p, p * k : p * k + p] for r in range(rows) for k in range(columns)]
    weight = s["encoder.patch_embed.proj.weight"].flatten(1)
    x = torch.stack([weight @ t.flatten() + s["encoder.patch_embed.proj.bias"] for t in tiles])
    x = x + s["encoder.pos_embed"][0, 1:]
    seen = x[mask == 0]  # masked pixels go no further
    z = torch.cat([s["encoder.cls_token"][0] + s["encoder.pos_embed"][0, :1], seen])[None]
    for i in range(c.depth):
        z = plain_block(z, s, f"encoder.blocks.{i}.", c.heads)
    z = F.layer_norm(z, (c.dim,), s["encoder.norm.weight"], s["encoder.norm.bias"], 1e-6)[0]

    z = F.linear(z, s["decoder.embed.weight"], s["decoder.embed.bias"])
    features = iter(z[1:])
    y = torch.stack([z[0]] + [s["decoder.mask_token"][0, 0] if m else next(features) for m in mask.tolist()])
    y = (y + s["decoder.pos_embed"][0])[None]
    for i in range(c.decoder_depth):
        y = plain_block(y, s, f"decoder.blocks.{i}.", c.decoder_heads)
    y = F.layer_norm(y, (c.decoder_dim,), s["decoder.norm.weight"], s["decoder.norm.bias"], 1e-6)[0, 1:]
    pred = F.linear(y, s["decoder.pred.weight"], s["decoder.pred.bias"])

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
    for wrong in (torch.ones(6, 16), torch.zeros(6, 16), (torch.arange(96) % 5 > 0).reshape(6, 16)):
        with pytest.raises(ValueError, match="mask must leave the same number of patches visible"):
            model.predict(images, wrong)
    with pytest.raises(ValueError, match=r"mask \(1, 16\) must be \(6, 16\)"):
        model.predict(images, out.mask[:1])
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
    out.loss.backward()
    plain = (model.predict(images, out.mask) - model.target(images)).square().mean(-1) * out.mask
    assert out.mae_loss.item() == pytest.approx((plain.sum() / out.mask.sum()).item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_whole_model_can_be_of_another_precision(model, images, dtype):
    loss = model(images, 1.0, generator()).mae_loss.item()
    assert model.to(dtype)(images.to(dtype), 1.0, generator()).mae_loss.item() == pytest.approx(loss, rel=0.05)
    assert model.target(images.to(dtype)).dtype == torch.float32


def test_encode_never_masks_repeats_itself_and_can_be_exported_for_any_number_of_images(model, images):
    z = model.encode(images)
    assert z.shape == (6, 17, 32) and torch.equal(z, model.encode(images))
    assert torch.equal(model.features(images), z[:, 1:].mean(1))
    model.forward = model.encode
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    torch.testing.assert_close(exported(images[:3]), z[:3])


def test_a_compiled_step_equals_a_plain_one_and_is_not_compiled_again_for_another_lambda(images):
    """One graph without breaks, the same noise, so the same masks, losses and gradients."""
    model = CLMAE(small(depth=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # inductor's code takes a minute
    for lam in (1.0, 0.25, -1.0):
        with torch.compiler.set_stance("default" if lam == 1 else "fail_on_recompile"):
            results = []
            for step in (compiled, model):
                torch.manual_seed(0)
                out = step(images, torch.tensor(lam))
                results.append((out.mask, out.loss, *gradients(model, out.loss)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Patches, positions, weights


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


def test_the_encoder_carries_timms_names():
    state = CLMAE(small(depth=1)).encoder.state_dict()
    parts = itertools.product("norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split(), ("weight", "bias"))
    ends = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias", "cls_token", "pos_embed"]
    assert sorted(state) == sorted([f"blocks.0.{part}.{name}" for part, name in parts] + ends)
    assert state["pos_embed"].shape == (1, 17, 32) and state["cls_token"].shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 must divide the image size 16 x 16"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 leaves 0 of 16"),
        ({"mask_ratio": 0.01}, "mask_ratio 0.01 leaves 16 of 16"),
        ({"tau": 0.0}, "tau 0.0 must be"),
        ({"kappa": math.inf}, "kappa inf must be"),
        ({"mask_ratio": math.nan}, "mask_ratio nan must be"),
        ({"patch_size": 1, "channels": 1}, "norm_pix needs more than 1 value in a patch"),
    ],
)
def test_config_names_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**change)


def test_image_size_is_a_side_or_a_pair():
    assert Config(image_size=32).image_size == (32, 32) and Config(image_size=[8, 12]).grid == (2, 3)


def test_weights_start_as_in_mae():
    torch.manual_seed(0)
    state = CLMAE(small()).state_dict()
    for name in ("encoder.patch_embed.proj", "encoder.blocks.0.attn.qkv", "decoder.pred", "masker.embed"):
        weight = state[f"{name}.weight"].flatten(1)
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=0.02)  # Xavier
        assert not state[f"{name}.bias"].any()
    assert all(0.01 < state[name].std() < 0.03 for name in ("encoder.cls_token", "decoder.mask_token"))


# ======================================================================================================================
# II. What the scripts promise
# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def test_diversity_is_0_for_one_mask_and_near_1_for_unrelated_ones():
    one, other = torch.randn(1, 64, generator=generator(2)), torch.randn(100, 64, generator=generator())
    shifts = torch.randn(100, 1, generator=generator(3))
    assert train.diversity(one.expand(100, -1) + shifts) == pytest.approx(0, abs=1e-5)
    assert 0.97 < train.diversity(other + 5) < 1
    half = train.diversity(other.clamp(max=0) + torch.randn(1, 64, generator=generator(1)).clamp(max=0))
    assert 0.4 < half < 0.6  # half of the variance is common to all, the mean over tokens is not counted


def test_objects_is_the_area_under_the_roc_curve():
    where = torch.zeros(2, 8, 12, dtype=torch.bool)
    where[0, :4, :4] = where[0, 4:, 8:10] = True  # patches 0 and 5 of the first
    where[1, 0, :] = where[1, :4, 4] = True  # 4, 7 and 4 pixels of patches 0, 1 and 2 of the second
    scores = torch.tensor([[-1.0, 0, -3, 0, 0, 0], [-2, -3, 0, 0, 0, 0]])
    # first: -1 is below 0, 0, 0 and above -3: 3 of 4; 0 ties with three and is above -3: 1.5 of 4.
    # Second: 4 of 16 pixels are a fifth or more as well: 3 of 3, 3 of 3 and 1.5 of 3.
    assert train.objects(scores, where, 4) == pytest.approx((4.5 / 8 + 7.5 / 9) / 2)


def test_hiding_patches_of_high_contrast_does_not_hide_the_objects():
    images, _, covered = train.shapes(2000, 32, seed=2)  # the first 500 are those of the default run's figures
    contrast = patchify(images[:500].float(), 4).std(-1)
    assert f"by hiding high contrast {100 * train.objects(-contrast, covered[:500], 4):.0f} %" in page("README.md")


def some_data() -> train.Data:
    """20 generated images, and 40 that are held out."""
    images, labels, where = train.shapes(60, 16, seed=1)
    return train.Data(images[40:], labels[40:], [*train.SHAPES], 0, images[:40], labels[:40], where[:40])


def test_the_figures_are_of_held_out_images_under_the_same_noise(model):
    data = some_data()
    figures, scores = train.measure_masks(model, data, torch.tensor(-0.5))
    held_out = model.standardise(data.val_images)
    random, learned = (model(held_out, lam, generator()) for lam in (0.0, -0.5))
    assert figures["loss_random"] == pytest.approx(random.mae_loss.item()) and torch.equal(scores, learned.scores)
    assert figures["hardness"] == pytest.approx((learned.mae_loss / random.mae_loss).item())
    assert figures["objects"] == train.objects(learned.scores, data.covered, 4)
    assert figures["diversity"] == train.diversity(learned.scores)
    neutral, _ = train.measure_masks(model, data, torch.tensor(0.0))
    assert neutral["hardness"] == 1 and neutral["objects"] == 0.5
    plain, _ = train.measure_masks(CLMAE(small(kappa=0.0)), data._replace(covered=None), torch.tensor(0.0))
    assert plain.keys() == {"loss_random", "hardness"}

    assert torch.equal(train.encode(model, data.images), model.features(model.standardise(data.images)))
    floors = train.measure_floors(model, data)
    flat, flat_val = data.images.flatten(1).float(), data.val_images.flatten(1).float()
    assert floors["knn_pixels"] == train.evaluate(flat, data.labels, flat_val, data.val_labels)["knn"]
    trivial = (model.target(model.reconstruct(torch.zeros(40, 16, 48), held_out)) - model.target(held_out)).square()
    assert floors["loss_trivial"] == pytest.approx(trivial.mean().item(), rel=0.05)
    assert train.measure_floors(model, data._replace(classes=["one"])).keys() == {"loss_trivial"}


def test_knn_accuracy_equals_a_loop_over_images():
    z, labels = torch.randn(90, 5, generator=generator()), torch.arange(90) % 3
    z = z + 1.5 * F.one_hot(labels, 5)
    bank, bank_labels, query, query_labels = z[:60], labels[:60], z[60:], labels[60:]
    right = 0
    for q, label in zip(query, query_labels, strict=True):
        cosine = F.cosine_similarity(q, bank)
        votes = [0.0, 0.0, 0.0]
        for i in cosine.argsort(descending=True)[:20]:
            votes[bank_labels[i]] += math.exp(cosine[i] / 0.07)
        right += votes.index(max(votes)) == label
    assert 50 < 100 * right / 30 < 100
    assert train.knn_accuracy(bank, bank_labels, query, query_labels) == pytest.approx(100 * right / 30)
    scores = {k: train.knn_accuracy(bank, bank_labels, query, query_labels, k) for k in (1, 10, 20, 60)}
    assert len({*scores.values()}) > 1 and inspect.signature(train.knn_accuracy).parameters["k"].default == 20


def test_the_linear_probe_finds_what_is_linear_draws_nothing_and_needs_no_gradient_mode():
    z = torch.randn(600, 8, generator=generator())
    linear, unrelated = (z[:, 0] + z[:, 1] > 0).long(), torch.randint(0, 2, (600,), generator=generator(1))
    before = torch.get_rng_state()
    for labels, low, high in ((linear, 95, 100), (unrelated, 35, 65), (linear + 3, 95, 100)):
        with torch.no_grad():
            assert low < train.linear_probe(z[:400], labels[:400], z[400:], labels[400:]) <= high
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_z_scored_on_the_training_images(monkeypatch):
    monkeypatch.setattr(train, "knn_accuracy", Mock(return_value=1.0))
    z, z_val = torch.randn(70, 5, generator=generator()) * 3 + 1, torch.randn(20, 5, generator=generator(1))
    labels = torch.arange(70) % 2
    assert train.evaluate(z.requires_grad_(), labels, z_val, labels[:20], probe=False) == {"knn": 1.0}
    bank, _, query, _ = train.knn_accuracy.call_args.args
    assert not bank.requires_grad  # as model.features gives it
    torch.testing.assert_close(bank, (z - z.mean(0)) / (z.std(0) + 1e-6))
    torch.testing.assert_close(query, (z_val - z.mean(0)) / (z.std(0) + 1e-6))


# ----------------------------------------------------------------------------------------------------------------------
# Data


def save_images(folder: Path, n: int, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> list[Path]:
    """n images of random blocks as PNG (or JPEG for CMYK) files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(n):
        pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator(i))
        image = torchvision.transforms.functional.to_pil_image(pixels).resize(size).convert(mode)
        files.append(folder / f"{mode}-{i}.{'jpg' if mode == 'CMYK' else 'png'}")
        image.save(files[-1])
    return files


def arguments(*words) -> argparse.Namespace:
    return train.build_parser().parse_args([str(w) for w in ("--batch-size", 1, *words)])


def test_shapes_are_reproducible_and_tell_where_they_are():
    images, kinds, where = train.shapes(300, 32, seed=5)
    assert images.shape == (300, 3, 32, 32) and images.dtype == torch.uint8 and where.shape == (300, 32, 32)
    assert kinds.unique().tolist() == list(range(len(train.SHAPES))) and images.float().std() > 30
    again, other = train.shapes(300, 32, seed=5)[0], train.shapes(300, 32, seed=6)[0]
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert 0.05 < where.float().mean((1, 2)).min() and where.float().mean((1, 2)).max() < 0.6
    for mask, low, high in ((where, 60, 200), (where.flip(0), 0, 40)):  # the shapes have another colour than the ground
        inside, outside = ((images * m[:, None]).sum((2, 3)) / m.sum((1, 2))[:, None] for m in (mask, ~mask))
        assert low < (inside - outside).abs().mean() < high

    for words, held_out in (((), 2000), (("--holdout", 40), 40)):  # what is held out is not trained on
        data = train.load_data(arguments("--images", 60, *words))
        assert len(data.images) == 60 and len(data.val_images) == len(data.covered) == held_out
        assert not {x.numpy().tobytes() for x in data.images} & {x.numpy().tobytes() for x in data.val_images}


def test_the_learning_rate_warms_up_falls_as_a_cosine_and_scales_with_the_batch():
    args = arguments("--epochs", 10, "--warmup-epochs", 2, "--lr", 0.5, "--batch-size", 512)
    assert [train.learning_rate(args, epoch) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    short = arguments("--epochs", 2, "--warmup-epochs", 5, "--lr", 256)
    assert train.learning_rate(short, 1) == pytest.approx(1)  # half of a short run


def test_augment_crops_inside_the_image_and_flips_half_of_them():
    torch.manual_seed(0)
    H, W, n = 12, 20, 2000
    rows, columns = torch.meshgrid(torch.arange(H) / (H - 1), torch.arange(W) / (W - 1), indexing="ij")
    images = torch.stack([rows, columns, rows]).expand(n, -1, -1, -1)  # a pixel tells its place
    whole = train.augment(images, min_crop=1.0)
    flipped = whole[:, 1, 0, 0] > whole[:, 1, 0, -1]
    assert 0.45 < flipped.float().mean() < 0.55
    upright = torch.where(flipped[:, None, None, None], whole.flip(3), whole)
    torch.testing.assert_close(upright, images, atol=1e-4, rtol=0)  # 1: no crop

    crops = train.augment(images, min_crop=0.2)
    top, bottom = crops[:, 0, [0, -1], 0].T
    left, right = crops[:, 1, 0, [0, -1]].sort(1).values.T
    assert crops.min() >= -1e-4 and crops.max() <= 1 + 1e-4  # nothing from beyond the border
    height, width = bottom - top, right - left
    area, ratio = width * height, width / height
    assert 0.19 < area.min() < 0.25 and area.max() > 0.9 and 0.5 < area.mean() < 0.7
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    places = torch.stack([top / (1 - height), left / (1 - width)])[:, area < 0.8]  # of the room that is left, uniform
    assert (places.std(1) - 12**-0.5).abs().max() < 0.02 and torch.corrcoef(places)[0, 1].abs() < 0.1
    inner = crops[:, 1, 0].diff()
    torch.testing.assert_close(inner, inner[:, :1].expand_as(inner), atol=1e-4, rtol=0)  # evenly spaced: no distortion


def test_pictures_of_any_kind_stand_upright_on_white_cropped_to_their_middle(tmp_path):
    def fit(side: int) -> torch.Tensor:
        return train.read_images([(str(png), 0)], side)[0][0]  # (3, side, side)

    png = tmp_path / "a.png"
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    for mode in ("RGB", "P", "RGBA"):
        wide.convert(mode).save(png)
        assert (fit(10)[:, 5, 5] == torch.tensor([0, 0, 255])).all() and (fit(10)[0] < 9).all()
    glyph = Image.new("RGBA", (16, 16))
    glyph.paste((0, 0, 0, 255), (4, 4, 12, 12))
    for mode in ("RGBA", "LA", "P"):  # black on what is transparent, and stored as black
        glyph.convert(mode).save(png)
        assert fit(16)[:, 3, 3].tolist() == [255, 255, 255] and fit(16)[:, 8, 8].tolist() == [0, 0, 0]
    Image.new("1", (16_320, 12_240)).save(png)
    assert Image.open(png).size == (16_320, 12_240)  # a telephone's, for Pillow an attack
    flag = Image.new("RGB", (16, 16), "red")
    flag.paste("blue", (0, 0, 16, 8))
    exif = flag.getexif()
    exif[0x0112] = 3  # turned by half a turn
    flag.save(png, exif=exif)
    assert fit(16)[:, 2, 8].tolist() == [255, 0, 0]


def test_a_flat_folder_has_no_labels_and_what_programs_left_behind_is_left_out(tmp_path, capsys):
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA"):
        save_images(tmp_path, 3, mode, (40, 24))
    (tmp_path / "._thumb.png").write_text("not an image: hidden")
    (tmp_path / "notes.txt").write_text("not an image")
    for folder in (".thumbnails", "@eaDir", "__MACOSX/cat", "_small"):
        save_images(tmp_path / folder, 5)
    data = train.load_data(arguments("--data", tmp_path, "--image-size", 16))
    assert data.images.shape == (19, 3, 16, 16) and data.val_images.shape == (2, 3, 16, 16) and len(data.classes) == 1
    assert data.images.float().flatten(1).std(1).min() > 5  # none is blank
    said = capsys.readouterr().out
    assert "19 training and 2 held-out images, no labels" in said and ".thumbnails, @eaDir, __MACOSX, _small" in said


def test_class_folders_with_and_without_a_held_out_part(tmp_path, capsys):
    for i, (part, name) in enumerate(itertools.product(("Training", "validation"), ("cat", "dog/images/deep"))):
        for file in save_images(tmp_path / part / name, 10):
            Image.eval(Image.open(file), lambda value, i=i: value // 8 + 20 * i).save(file)  # no image is there twice
    save_images(tmp_path / "Training" / "cat" / ".small", 4)
    data = train.load_data(arguments("--data", tmp_path, "--image-size", 16))
    assert data.classes == ["cat", "dog"] and len(data.images) == len(data.val_images) == 20
    assert data.labels.bincount().tolist() == data.val_labels.bincount().tolist() == [10, 10]
    assert data.val_labels[:8].unique().tolist() == [0, 1]  # shuffled: the figures show the first eight
    assert (data.val_images.float().mean((1, 2, 3)) > 40).all() and ".small" in capsys.readouterr().out

    fewer = train.load_data(arguments("--data", tmp_path, "--image-size", 16, "--images", 12, "--holdout", 3))
    assert len(fewer.images) == 12 and len(fewer.val_images) == 3  # the images trained on are the same with and without
    alike = train.load_data(arguments("--data", tmp_path, "--image-size", 16, "--images", 12))
    assert fewer.images.equal(alike.images)
    tenth = train.load_data(arguments("--data", tmp_path / "Training", "--image-size", 16))
    assert len(tenth.images) == 18 and len(tenth.val_images) == 2
    for few in (data, fewer, tenth):  # what is held out is not trained on
        assert not (few.val_images[:, None] == few.images[None]).flatten(2).all(2).any()


def test_what_is_downloaded_is_read_by_torchvisions_own_classes(tmp_path, monkeypatch, capsys):
    """Small trees laid out as the real ones; only the check that all files are whole is replaced."""
    for module, name in (
        (torchvision.datasets.cifar, "check_integrity"),
        (torchvision.datasets.cifar.CIFAR10, "_check_integrity"),
    ):
        monkeypatch.setattr(module, name, lambda *args: True)

    def write(file: str, **content):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(pickle.dumps(content))

    pixels = torch.randint(0, 256, (20, 3072), dtype=torch.uint8, generator=generator()).numpy()
    for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        write(f"cifar-10-batches-py/{batch}", data=pixels, labels=[*range(10), *range(10)])
    write("cifar-10-batches-py/batches.meta", label_names=[f"kind {i}" for i in range(10)])
    for part in ("train", "test"):
        write(f"cifar-100-python/{part}", data=pixels, fine_labels=[*range(80, 100)])
    write("cifar-100-python/meta", fine_label_names=[f"kind {i}" for i in range(100)])
    for part, name in itertools.product(("train", "val"), ("n01440764", "n02102040")):
        for file in save_images(tmp_path / "imagenette2-160" / part / name, 6, size=(200, 160)):
            Image.open(file).save(file.with_suffix(".JPEG"))
            file.unlink()

    for name, told, N, M, classes in (
        ("cifar10", "10 classes: kind 0, kind 1, kind 2, ...", 100, 20, 10),
        ("cifar100", "100 classes: kind 0, kind 1, kind 2, ...", 20, 20, 100),
        ("imagenette", "2 classes: tench, English springer, ...", 12, 12, 2),
    ):
        data = train.load_data(arguments("--data", name, "--data-dir", tmp_path))
        assert (len(data.images), len(data.val_images), len(data.classes)) == (N, M, classes)
        assert int(data.labels.max()) == classes - 1 and data.images.float().std() > 30
        assert f"{name}: {N} training and {M} held-out images, {told}\n" == capsys.readouterr().out
    assert torch.equal(data.val_labels.bincount(), torch.tensor([6, 6]))


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def options(*words) -> list[str]:
    """A command line of train.py for a run of seconds."""
    tiny = ("--epochs", 2, "--batch-size", 32, "--images", 64, "--holdout", 64, "--device", "cpu")
    return [str(w) for w in (*tiny, *words)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of train.py, with its figures."""
    path = tmp_path_factory.mktemp("runs") / "shapes"
    train.main(options("--out", path, "--evaluate-every", 1))
    return path


@pytest.fixture
def bare(monkeypatch):
    """Runs without pictures and without the slowest of their figures."""
    draw = visualize.draw
    monkeypatch.setattr(visualize, "draw", lambda run: None)
    monkeypatch.setattr(train, "linear_probe", lambda *args: 0.0)
    return draw


def weights(path: Path) -> dict:
    return torch.load(path / "checkpoint.pt", weights_only=True)


def trained(path: Path, *words) -> dict:
    """The checkpoint of a new run in that folder."""
    train.main(options("--out", path, *words))
    return weights(path)


def test_a_run_leaves_a_log_a_checkpoint_and_pictures(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1, 2]
    every = set("epoch lambda loss lr images_per_s loss_random hardness diversity objects knn linear_probe".split())
    assert records[1].keys() == every and records[0].keys() - every == {"loss_trivial", "knn_pixels"}
    assert [r["lambda"] for r in records] == pytest.approx([1, 1 / 3, -1])
    checkpoint = weights(run)
    assert checkpoint["log"] == records and len(checkpoint["scores"]) == 3
    assert checkpoint["images"].shape == (8, 3, 32, 32)
    for name in ("masks.png", "masks.gif", "reconstructions.png", "curves.png", "step.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) >= 200 and getattr(picture, "n_frames", 1) == (3 if name == "masks.gif" else 1)
            grey = torchvision.transforms.functional.pil_to_tensor(picture.convert("L")).float()
        assert grey.std() > 10 and (grey != grey[0, 0, 0]).float().mean() > 0.05  # not blank


def test_the_same_command_gives_the_same_weights_and_another_seed_others(run, tmp_path, bare):
    """Measuring more or less often changes nothing: it draws no random number."""
    first = weights(run)["model"]
    again = trained(tmp_path / "again", "--evaluate-every", 2)["model"]
    other = trained(tmp_path / "other", "--seed", 1)["model"]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_the_loop_is_the_bare_one_with_shuffled_crops_and_a_schedule(tmp_path, monkeypatch, bare):
    """Each step: its own lambda, learning rate and crops; the logged loss is the mean of mae_loss over the epoch."""
    steps, forward = [], CLMAE.forward

    def spy(model, images, lam, *generator):
        output = forward(model, images, lam, *generator)
        if not generator:
            autocast = torch.is_autocast_enabled("cpu")
            steps.append((images.clone(), float(lam), output.mae_loss.item(), autocast))
        return output

    monkeypatch.setattr(CLMAE, "forward", spy)
    monkeypatch.setattr(train, "learning_rate", Mock(wraps=train.learning_rate))
    log = trained(tmp_path / "run")["log"]

    images, lams, losses, autocast = zip(*steps, strict=True)
    assert lams == pytest.approx([1, 1 / 3, -1 / 3, -1]) and not any(autocast)
    assert [call.args[1] for call in train.learning_rate.call_args_list[::2]] == [0, 0.5, 1, 1.5]  # of two groups
    assert [r["loss"] for r in log[1:]] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    assert log[2]["lr"] == train.learning_rate(train.build_parser().parse_args(options()), 1.5)
    data = train.load_data(arguments("--images", 64, "--holdout", 64))
    model, _ = clmae.load(tmp_path / "run")
    whole = model.standardise(data.images)
    for batch in images:  # each is another crop
        assert torch.cdist(batch.flatten(1), whole.flatten(1)).min() > 0.1

    monkeypatch.setattr(train, "find_device", lambda name: (torch.device("cpu"), True))
    train.main(options("--out", tmp_path / "half", "--min-crop", 1))
    assert all(step[3] for step in steps[4:]) and len(steps) == 8
    seen = torch.cat([step[0] for step in steps[4:]])
    distance = torch.cdist(seen.flatten(1), torch.cat([whole, whole.flip(3)]).flatten(1))
    assert distance.amin(1).max() < 0.1  # --min-crop 1: no crop
    order = (distance.argmin(1) % 64).tolist()
    first, second = order[:64], order[64:]
    assert sorted(first) == sorted(second) == list(range(64)) and len({(*first,), (*second,), (*range(64),)}) == 3


@pytest.mark.parametrize(
    ("device", "has", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_bfloat16_is_for_cuda_that_does_not_emulate_it(device, has, expected, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda n, device: types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    assert train.find_device(device) == (torch.device(device), expected)


def test_lambda_0_throughout_trains_what_random_masks_train(tmp_path, bare):
    random = trained(tmp_path / "random", "--masking", "random")
    zero = trained(tmp_path / "zero", "--lambda-start", 0, "--lambda-end", 0)
    assert random["options"]["lambda_start"] == 1  # what was not typed is not rewritten
    assert all(torch.equal(value, zero["model"][name]) for name, value in random["model"].items())
    for r, z in zip(random["log"], zero["log"], strict=True):
        assert all(r[name] == z[name] for name in r.keys() - {"images_per_s"})


def test_the_masks_find_the_objects(tmp_path, monkeypatch, bare):
    monkeypatch.setitem(train.MODELS, "nano", SMALL | {"depth": 1, "masker_dim": 32})
    words = ("--images", 900, "--holdout", 120, "--epochs", 12, "--batch-size", 8, "--lr", 0.128, "--min-crop", 1)
    log = trained(tmp_path, *words)["log"]
    assert min(entry["objects"] for entry in log) < 0.25 and log[-1]["objects"] > 0.8  # the partner shows them first
    assert min(entry["hardness"] for entry in log[:6]) < 0.98 and max(entry["hardness"] for entry in log[7:]) > 1.03


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("masking", ["curriculum", "random"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(masking, device, tmp_path, monkeypatch, bare):
    own = ("--masking", masking, "--epochs", 3, "--seed", 4, "--lr", 1e-2, "--batch-size", 16, "--device", device)
    whole, broken = trained(tmp_path / "whole", *own), tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save", Mock(wraps=train.save, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt]))
        train.main(options(*own, "--out", broken))
    moved = broken.rename(tmp_path / "moved")
    train.main(["--resume", str(moved)])

    resumed = weights(moved)
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    assert torch.equal(whole["rng"]["cpu"], resumed["rng"]["cpu"])
    differ = {name for name, value in whole["options"].items() if resumed["options"][name] != value}
    assert differ == {"out", "resume"}
    for entry in whole["log"] + resumed["log"]:
        entry["images_per_s"] = 0
    assert whole["log"] == resumed["log"] and (moved / "log.jsonl").read_text().count("\n") == 4


def test_a_run_is_made_longer(run, tmp_path, bare):
    shutil.copytree(run, tmp_path / "run")
    assert f"--epochs 1: {tmp_path / 'run'} has 2" in run_fails(None, "--resume", tmp_path / "run", "--epochs", 1)
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "4", "--evaluate-every", "3", "--device", "cpu"])
    record = weights(tmp_path / "run")
    assert [r["epoch"] for r in record["log"]] == [0, 1, 2, 3, 4] and record["options"]["epochs"] == 4
    assert record["log"][3]["lambda"] == pytest.approx(1 - 2 * 5 / 7) and record["log"][4]["lambda"] == -1
    args = train.build_parser().parse_args(options("--epochs", 4))
    assert record["log"][3]["lr"] == train.learning_rate(args, 2.5)


@pytest.mark.skipif(os.name == "nt", reason="Windows has another Ctrl-C")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *options("--out", out, "--epochs", 500, "--holdout", 8)]
    process = subprocess.Popen(  # a test run in the background may hand on that Ctrl-C is ignored
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.time() + 120
    while not (out / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "Traceback" not in error and f"python train.py --resume {out}" in error
    assert clmae.load(out)[1]["epoch"] >= 0


def test_compile_is_honoured_and_leaves_the_weights_their_names(run, tmp_path, monkeypatch, bare):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: lambda *args: calls.append(args) or f(*args))
    compiled = trained(tmp_path / "run", "--compile")
    assert len(calls) == 4 and compiled["model"].keys() == weights(run)["model"].keys()
    train.main(["--resume", str(tmp_path / "run"), "--no-compile", "--epochs", "3"])
    assert len(calls) == 4


def test_options_reach_model_and_optimiser_and_only_matrices_decay():
    own = ("--kappa", 3, "--tau", 0.5, "--mask-ratio", 0.5, "--no-norm-pix", "--image-size", 16)
    c = train.build(arguments(*own, "--patch-size", 8), some_data()).config
    assert (c.kappa, c.tau, c.mask_ratio, c.norm_pix, c.patch_size) == (3, 0.5, 0.5, False, 8)
    model = train.build(arguments(*own), some_data())
    assert model.config.patch_size == 2  # an eighth
    optimizer = train.build_optimizer(model, 0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert decay[id(p)] == (0.3 if matrix else 0), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_defaults_are_the_papers_and_those_of_the_results():
    args, c = train.build_parser().parse_args([]), Config()
    assert (args.epochs, args.batch_size, args.lr, args.warmup_epochs, args.min_crop) == (10, 64, 4e-3, 2, 0.2)
    assert (args.weight_decay, args.lambda_start, args.lambda_end, args.seed) == (0.05, 1, -1, 0)
    assert args.kappa == c.kappa == 2 and args.tau == c.tau == 1 and args.mask_ratio == c.mask_ratio == 0.75
    assert args.norm_pix and c.norm_pix and args.masking == "curriculum" and args.image_size == 32
    assert (c.dim, c.depth, c.heads, c.patch_size) == (192, 12, 3, 4)  # ViT-Tiny


def test_what_a_notebook_passes_is_saved_as_plain_values(run, tmp_path, monkeypatch, bare):
    args = train.build_parser().parse_args(options("--epochs", 1))
    args.out, args.seed = tmp_path / "run", torch.tensor(3).numpy()[()]
    args.kappa, args.lr, args.weight_decay = torch.tensor([2.0, 0.01, 0.1]).double().numpy()
    measure = train.measure_masks
    extra = {"mine": torch.tensor(0.5).numpy()[()]}  # a float32 of numpy's

    def measured(model, data, lam):
        figures, scores = measure(model, data, lam)
        return figures | extra, scores

    monkeypatch.setattr(train, "measure_masks", measured)
    train.train(args)
    record = clmae.load_record(tmp_path / "run")
    assert record["options"]["seed"] == 3 and record["options"]["out"] == str(args.out)
    assert [entry["mine"] for entry in record["log"]] == [0.5, 0.5]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture
def saved(monkeypatch) -> tuple[list, list]:
    """The figures that were saved and the frames of a gif (title, colour, pictures by axes); nothing is written."""
    figures, frames = [], []

    def record(figure, file, **options):
        figure.told_dpi = visualize.matplotlib.rcParams["savefig.dpi"]
        figures.append(figure)

    def record_frame(gif):
        title = gif.fig._suptitle
        frames.append((title.get_text(), title.get_color(), [pictures(ax) for ax in gif.fig.axes]))

    monkeypatch.setattr(visualize.Figure, "savefig", record)
    monkeypatch.setattr(visualize.PillowWriter, "grab_frame", record_frame)
    monkeypatch.setattr(visualize.PillowWriter, "finish", lambda gif: record(gif.fig, None))
    return figures, frames


def pictures(ax) -> list[torch.Tensor]:
    """What was given to imshow; nan where nothing is drawn."""
    return [torch.tensor(image.get_array().astype(float).filled(math.nan)).float() for image in ax.images]


def untrained(size: tuple[int, int], epochs: int = 3) -> tuple[CLMAE, dict]:
    """A model for images of this size and what the pictures need of a run's record."""
    torch.manual_seed(0)
    model, images = CLMAE(small(image_size=size)), torch.randint(256, (8, 3, *size), dtype=torch.uint8)
    log = [{"epoch": i, "lambda": 1 - 2 * i / (epochs - 1)} for i in range(epochs)]
    log[1]["objects"] = 0.2  # says nothing: lambda = 0
    return model, {"log": log, "images": images, "scores": [model.scores(images / 255, e["lambda"]) for e in log]}


def pixels(mask: torch.Tensor) -> torch.Tensor:
    """Whether each pixel of 32 x 32 is in a masked patch of 4 x 4: masks (B, L) to (B, 1, 32, 32)."""
    return F.interpolate(mask.reshape(-1, 1, 8, 8), scale_factor=4) == 1


def is_warm(image, value: float) -> bool:
    red, _, blue, _ = image.to_rgba([value])[0]
    return red > blue


@pytest.mark.parametrize("size", [None, (8, 24)])
def test_masks_are_drawn_epoch_by_epoch_each_on_its_image(run, tmp_path, saved, size):
    model, record = untrained(size) if size else clmae.load(run)
    visualize.draw_masks(record, model, tmp_path / "masks.png")
    visualize.draw_film(record, model, tmp_path / "masks.gif")
    (png, _), frames = saved
    chances = [model.mask_probability(scores).reshape(8, *model.config.grid) for scores in record["scores"]]
    assert not torch.equal(chances[0], chances[1]) and len(frames) == len(chances) == 3
    for i, image in enumerate(record["images"][:6].float()):
        original, *row = png.axes[4 * i : 4 * i + 4]
        assert torch.equal(pictures(original)[0], image.permute(1, 2, 0))
        for epoch, ax in enumerate(row):
            assert torch.equal(pictures(ax)[0], image.mean(0)) and torch.equal(pictures(ax)[1], chances[epoch][i])
            assert {tuple(part.get_extent()) for part in ax.images} == {(0, image.shape[2], image.shape[1], 0)}
            if i < 5:  # of masks.gif
                assert torch.equal(frames[epoch][2][i][0], image.permute(1, 2, 0))
                assert all(map(torch.equal, frames[epoch][2][5 + i], pictures(ax)))
    assert is_warm(ax.images[1], 1.0) and not is_warm(ax.images[1], 0.5)  # red: more often than by a random mask

    roles = {"untrained": "black", ("neutral" if size else "partner"): "#666666" if size else "C0", "adversary": "C1"}
    for entry, role, ax, frame in zip(record["log"], roles, png.axes[1:4], frames, strict=True):
        words = [f"epoch {entry['epoch']}", f"$\\lambda$ = {entry['lambda']:+.2f}", role]
        words += [] if size else [f"objects {entry['objects']:.2f}"]
        assert ax.get_title() == "\n".join(words) and frame[0] == ", ".join(words)
        assert ax.title.get_color() == frame[1] == roles[role]


def test_a_step_is_drawn_with_the_numbers_of_the_step(run, tmp_path, saved):
    model, record = clmae.load(run)
    with torch.no_grad():  # as a notebook may have it
        visualize.draw_step(record, model, tmp_path / "step.png")
    ((figure,), _), raw = saved, record["images"][:1]
    image, a, s, y, seen, filled, loss, cost, *pushes = figure.axes
    x, k = model.standardise(raw), model.config.visible
    out, scores = model(x, 1.0, generator()), model.masker(model.encoder.embed(x))[0].detach()
    visible, patch_loss = out.mask[0] == 0, out.patch_loss[0].detach()
    above = (out.scores + clmae.gumbel_noise(out.scores, generator())).detach()[0]
    above = above - above.topk(k + 1).values[-2:].mean()  # y less theta
    assert torch.equal(above > 0, visible)

    costs = (patch_loss - out.mae_loss.detach()).masked_fill(visible, math.nan)
    slope = above.sigmoid() * (1 - above.sigmoid()) / (model.config.patches - k)  # of soft
    moved = (1000 * costs * slope).masked_fill(scores > 0, math.nan)  # at lambda = +1
    expected = {a: scores, s: 2 * scores.clamp(max=0), y: above, loss: patch_loss.masked_fill(visible, math.nan)}
    expected |= dict(zip((cost, *pushes), (costs, moved, -moved, moved * math.nan), strict=True))
    for ax, values in expected.items():
        values = values.reshape(8, 8)
        width = 2 * values.square().nanmean().sqrt().nan_to_num(1)  # stronger colours would hide the figures
        torch.testing.assert_close(pictures(ax)[0], values.clamp(-width, width), equal_nan=True, rtol=1e-3, atol=1e-3)
        written = {text.get_position()[::-1]: float(text.get_text()) for text in ax.texts}
        rounded = {place: values[place].item() for place in map(tuple, values.isfinite().nonzero().tolist())}
        assert written == pytest.approx(rounded, abs=0.051)
    assert is_warm(cost.images[0], 1) and not is_warm(pushes[0].images[0], 1)  # orange: above the mean; blue: up

    assert torch.equal(pictures(image)[0], raw[0].permute(1, 2, 0))
    masked = pixels(out.mask)[0, 0, :, :, None]
    assert torch.equal(pictures(seen)[0], torch.where(masked, 160.0, pictures(image)[0]))
    assert torch.equal(pictures(filled)[0] * ~masked, pictures(image)[0] * ~masked)
    assert (pictures(filled)[0] - pictures(image)[0]).abs().mean() > 2


@pytest.mark.parametrize(("part", "name"), [(CLMAE, "score_tokens"), (clmae.Masker, "forward")])
def test_masks_of_ones_own_are_drawn_without_a_push(part, name, tmp_path, saved, monkeypatch):
    model, record = untrained((8, 24))
    monkeypatch.setattr(part, name, lambda self, x, lam=0.5: 2 * abs(lam) * torch.linspace(-1, 0, 12)[None])
    visualize.draw_step(record, model, tmp_path / "step.png")
    _, a, s, *_, plus, minus, zero = saved[0][0].axes
    assert pictures(s)[0].shape == (2, 6) and (pictures(s)[0].flatten().diff() >= 0).all()  # not transposed
    assert s.texts[0].get_text() == "-2.0" and s.texts[11].get_text() == "0.0"
    assert all(picture.isnan().all() for ax in (a, plus, minus, zero) for picture in pictures(ax))


def test_reconstructions_show_what_is_visible_and_fill_what_is_masked(run, tmp_path, saved):
    model, record = clmae.load(run)
    record["log"][-1]["lambda"] = -0.5  # at -1 the mask is that of +1, epoch 0's
    visualize.draw_reconstructions(record, model, tmp_path / "r.png")
    axes, raw = saved[0][0].axes, record["images"][:4]
    assert axes[1].get_title() == "random mask" and axes[3].get_title() == "learned mask,\n$\\lambda$ = -0.50"
    drawn = torch.stack([pictures(ax)[0].permute(2, 0, 1) for ax in axes]).unflatten(0, (4, 5)).transpose(0, 1)
    assert torch.equal(drawn[0], raw.float())
    for lam, seen, filled in ((0.0, *drawn[1:3]), (-0.5, *drawn[3:])):
        masked = pixels(model(model.standardise(raw), lam, generator()).mask)
        away = (filled - raw).flatten(1)
        assert torch.equal(seen, raw * ~masked + 160 * masked) and torch.equal(filled * ~masked, raw * ~masked)
        assert away.mean(1).abs().max() < 20  # of the same brightness,
        assert away.abs().mean(1).min() > 2  # yet not the same


def test_curves_show_all_that_was_logged_each_by_its_name(tmp_path, saved, monkeypatch):
    names = {"lambda": "lambda", "hardness": "learned / random masks", "loss": "loss training"}
    names |= {"loss_random": "loss held out", "loss_trivial": "loss predicting the patch mean", "knn": "kNN features"}
    names |= {"knn_pixels": "kNN raw pixels", "linear_probe": "linear probe", "objects": "objects"}
    names |= {"my_own_figure": "my_own_figure"}
    log = [{"epoch": epoch, "lr": 1.0} for epoch in range(3)]
    for i, key in enumerate(names):
        for entry in log[:1] if key in ("loss_trivial", "knn_pixels") else log:
            entry[key] = 1 + i / 10 + entry["epoch"] / 100
    log[0]["loss_random"] = 9.0  # untrained: far above the others
    monkeypatch.setattr(visualize, "load", lambda run: (CLMAE(small(kappa=0)), {"log": log, "run": tmp_path}))
    for name in ("draw_masks", "draw_film", "draw_reconstructions"):
        monkeypatch.setattr(visualize, name, lambda *args: None)
    visualize.draw(tmp_path)

    drawn = {}  # by key
    for ax in saved[0][0].axes:
        for line in ax.lines:
            said = f"{ax.get_title()} {line.get_label()}"
            (key,) = (key for key, words in names.items() if all(word in said for word in words.split(" ")))
            drawn[key] = [*line.get_ydata()]
    expected = {key: [entry[key] for entry in log if entry.get(key, 9) < 9] for key in names}
    assert drawn == {key: pytest.approx(values if len(values) > 1 else 2 * values) for key, values in expected.items()}


def test_runs_are_compared_as_far_as_they_go(run, tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = {"a-0": [1.0, 0.9, 0.8], "a-1": [1.0, 0.7], "b": [1.0], "try-1": [0.5], "try-2": [0.5]}
    for seed, (name, log) in enumerate(logs.items()):
        record = weights(run) | {"model": {}}  # of a clmae.py that was changed since
        record["options"] |= {"seed": seed, "evaluate_every": seed, "out": name}
        if name == "try-2":
            record["options"]["kappa"] = 3.0  # no seed of try
        record["log"] = [{"epoch": i, "hardness": value, "linear_probe": 2 * value} for i, value in enumerate(log)]
        Path(name).mkdir()
        torch.save(record, Path(name, "checkpoint.pt"))
    visualize.main([*logs])

    ((figure,), _) = saved
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["a, 2 seeds: mean and range", "b", "try-1", "try-2"]
    hardness, probe = figure.axes
    assert hardness.get_title().startswith("hardness") and probe.get_title().startswith("linear probe")
    for ax, times in ((hardness, 1), (probe, 2)):
        several, *single = (line for line in ax.lines if line.get_label() in told)
        assert several.get_ydata() == pytest.approx([times, 0.8 * times])  # of the epochs that both have
        band = {tuple(corner) for corner in ax.collections[0].get_paths()[0].vertices.round(6).tolist()}
        assert band == {(0, times), (1, times * 0.7), (1, times * 0.9)}
        assert [line.get_ydata()[0] for line in single] == [times, times / 2, times / 2]
        assert len({line.get_color() for line in (several, *single)}) == 4


def test_drawing_changes_no_setting_and_pictures_of_long_runs_stay_small(run, tmp_path, saved, monkeypatch):
    monkeypatch.setitem(visualize.matplotlib.rcParams, "figure.facecolor", "black")  # a notebook's style
    settings = visualize.matplotlib.rcParams.copy()
    folder = str(shutil.copytree(run, tmp_path / "run"))
    visualize.main([folder, folder])
    train.main(["--resume", folder])  # only draws: the run is finished
    assert {figure.get_facecolor() for figure in saved[0]} == {(1, 1, 1, 1)}
    assert {figure.told_dpi for figure in saved[0]} == {110} and visualize.matplotlib.rcParams.copy() == settings
    assert not re.search(r"pyplot|\.use\(|rcParams", Path(visualize.__file__).read_text(encoding="utf-8"))

    saved[0].clear()
    saved[1].clear()
    for size, epochs in (((8, 24), 50), ((1024, 8), 3)):
        model, record = untrained(size, epochs)
        visualize.draw_step(record, model, tmp_path)
        visualize.draw_masks(record, model, tmp_path)
        visualize.draw_film(record, model, tmp_path)
        visualize.draw_reconstructions(record, model, tmp_path)
    assert len(saved[1]) == 40 + 3 and max(max(figure.get_size_inches()) for figure in saved[0]) < 15
    assert [ax.get_title()[:8] for ax in saved[0][1].axes[1:10:8]] == ["epoch 0\n", "epoch 49"]


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input: one line that names it, an exit status that is not 0, nothing overwritten


def run_fails(capsys, *words, main=train.main) -> str:
    """The line that a command says which must fail; argparse's own, below its usage, has been printed already."""
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    if stop.value.code == 2:
        return capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*", stop.value.code) and len(stop.value.code) < 350
    assert main == visualize.main or re.search(r"\(.+:\d+\)$", stop.value.code)  # for who edits the code
    return stop.value.code


@pytest.mark.parametrize(
    ("message", "several"),  # what is said, with ... for what was typed, and what was typed
    [
        ("... is not between 0 and 1", "--mask-ratio 1.5, --mask-ratio nan"),
        ("... is not between 0 and inf", "--lr nan, --lr inf, --lr -0.001, --holdout -1, --weight-decay -1.0"),
        ("... is not between 0 and inf", "--warmup-epochs -1.0"),
        (
            "... is not between 1 and inf",
            "--batch-size 0, --epochs 0, --evaluate-every 0, --image-size 0, --patch-size 0",
        ),
        ("... is not between 2 and inf", "--images 0"),
        ("... is not between -1 and 1", "--lambda-start 2.0, --lambda-end -1.5"),
        ("... is not between 0.01 and 1", "--min-crop 3.0"),
        ("... is not between 1e-06 and inf", "--kappa 0.0, --tau -1.0, --tau inf"),
        ("... is not between 0 and 9223372036854775807", "--seed -1"),
        ("patch_size 5 must divide the image size 32 x 32", "--patch-size 5"),
        ("mask_ratio 0.0 leaves 64 of 64", "--mask-ratio 0"),
        ("... is neither shapes, cifar10", "--data cifar11"),
        ("64 training, 64 held-out images: --batch-size is 65", "--batch-size 65"),
        ("argument --epochs: invalid int value: 'many'", "--epochs many"),
        ("argument --model: invalid choice: 'huge' (choose from", "--model huge"),
        ("...: Expected one of cpu, cuda", "--device tpu"),
        ("null", "--out a\0b, --data a\0b"),
        ("cannot read nowhere/checkpoint.pt: [Errno 2] No such file", "--resume nowhere"),
        ("cannot read checkpoint.pt", "--resume ''"),
        ("unrecognized arguments: ...", "--nonsense"),
    ],
)
def test_wrong_options_are_named(message, several, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for typed in several.split(", "):
        error = run_fails(capsys, *options(), *shlex.split(typed))
        assert message.replace("...", typed) in error
    assert not list(tmp_path.rglob("*"))  # nothing was written


@pytest.mark.parametrize(
    ("tree", "message"),  # cat=3: three pictures in data/cat; b->a: data/b is a link to a
    [
        ("", "no images in data: expected .jpg"),
        ("__MACOSX=3", "no images in data: expected .jpg"),
        (".=5", "0 training, 5 held-out images: --batch-size is 6"),
        (".=40 thumbs=3", "data has images beside folders (thumbs)"),
        ("val/cat=3", "data/val is no class: --data takes it alone, or a folder with train/ and val/"),
        ("bus=3 Train=3", "data/Train is no class"),
        ("train/cat=3 train/Test=3 val/cat=3 val/Test=3", "data/train/Test is no class"),
        ("train/cat=3 test/dog=3", "data/test has other classes (cat): --data data/train reads the first alone"),
        ("cat=3 dog=0", "no images in data/dog"),
        ("cat=3 dog/.small=3", "no images in data/dog"),
        ("cat=12 dog=12 dog/up->..", "times, by links: leave one"),
        ("a=3 b->a", "data/a/RGB-"),
        ("train/a=3 val->train", "by links: leave one"),
        ("train/a=3 val/a=0 val/a/0.png->../../train/a/RGB-0.png", "data/train/a/RGB-0.png is in data 2 times"),
    ],
)
def test_wrong_folders_are_named(tree, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(Path("data"), 0)
    for place, sign, what in (re.split("(=|->)", item) for item in tree.split()):
        if sign == "=":
            save_images(Path("data", place), int(what))
        else:
            Path("data", place).symlink_to(what)
    assert message in run_fails(capsys, "--data", "data", "--batch-size", 6)
    assert not Path("runs").exists()


def test_pictures_that_cannot_be_read_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = save_images(Path("photos"), 20)[0].read_bytes()
    for name, content, message in (
        ("cut.png", whole[: len(whole) // 2], "cannot read photos/cut.png"),
        ("text.png", b"not an image", "cannot read photos/text.png"),
        ("empty.jpg", b"", "cannot read photos/empty.jpg"),
        ("I.tiff", "I", "cannot read photos/I.tiff (mode I has more than 8 bits a channel: save it with 8)"),
        ("I16.png", "I;16", "cannot read photos/I16.png (mode I"),
        ("F.tiff", "F", "cannot read photos/F.tiff (mode F"),
    ):
        file = Path("photos", name)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            Image.new(content, (16, 16)).save(file)
        assert message in run_fails(capsys, "--data", "photos", "--batch-size", 2)
        file.unlink()


def test_without_a_network_a_download_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Mock(side_effect=OSError("no route to host")))
    assert "no route to host" in run_fails(capsys, *options("--data", "cifar10"))


def test_an_existing_run_is_not_touched_and_a_resumed_one_keeps_its_options(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    assert f"{run} has a run: go on with --resume {run}, or take another" in run_fails(capsys, *options("--out", run))
    for option, value, kept in (
        ("patch-size", 8, None), ("image-size", 16, 32), ("lr", 0.1, 0.004), ("batch-size", 16, 32), ("seed", 5, 0),
        ("images", 32, 64), ("masking", "random", "curriculum"), ("lambda-end", 0.0, -1.0), ("holdout", 9, 64),
        ("out", "elsewhere", run),
    ):  # fmt: skip
        error = run_fails(capsys, "--resume", run, f"--{option}", value)
        assert f"--{option} {value}: the run keeps {kept}" in error
    assert "cannot read no/checkpoint.pt" in run_fails(capsys, "no", "run", main=visualize.main)
    assert "required: RUN" in run_fails(capsys, main=visualize.main)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_run_goes_on_only_with_the_images_that_it_began_with(run, tmp_path, capsys, bare):
    photos, out = tmp_path / "photos", tmp_path / "run"
    files = save_images(photos / "cat", 120, size=(32, 32))
    train.main(options("--data", photos, "--out", out, "--images", 100, "--holdout", 20, "--epochs", 1))
    assert "100 training and 20 held-out images, no labels" in capsys.readouterr().out
    again = ("--resume", out, "--epochs", 2)
    for change, undo in (  # another order, or number: some trained on would be held out
        (lambda: files[7].rename(photos / "z.png"), lambda: (photos / "z.png").rename(files[7])),
        (lambda: shutil.copy(files[7], photos / "cat" / "z.png"), lambda: (photos / "cat" / "z.png").unlink()),
        (lambda: files[7].rename(tmp_path / "z.png"), lambda: (tmp_path / "z.png").rename(files[7])),
    ):
        change()
        assert "beside folders" in (error := run_fails(capsys, *again)) or f"not what {out} began with" in error
        undo()
    moved = photos.rename(tmp_path / "moved")
    train.main([str(w) for w in (*again, "--data", moved)])  # another place
    for resumed, data in ((run, moved), (out, "shapes")):
        assert f"--data {data} is not what {resumed} began with" in run_fails(
            capsys, "--resume", resumed, "--data", data
        )


def test_a_damaged_checkpoint_is_named_and_runs_no_code(run, tmp_path, capsys):
    file, whole, saved = tmp_path / "checkpoint.pt", (run / "checkpoint.pt").read_bytes(), weights(run)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of some weight

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for content in (b"", whole[:5000], flipped, [1, 2], saved | {"options": Bomb()}):
        torch.save(content, file) if isinstance(content, dict | list) else file.write_bytes(content)
        for main, *words in ((train.main, "--resume"), (visualize.main,), (visualize.main, run)):
            assert f"cannot read {file}: " in run_fails(capsys, *words, tmp_path, main=main)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch, bare):
    train.main(options("--out", tmp_path, "--epochs", 1))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(record, file):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in run_fails(capsys, "--resume", tmp_path, "--epochs", 2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys):
    for name, words in (("run", ()), ("last", ("--batch-size", 64))):  # in the middle, in the last step of an epoch
        broken = options("--out", tmp_path / name, "--lr", 1e30, "--warmup-epochs", 0, *words)
        assert f"the loss of epoch 1 is not finite: try a lower --lr; {tmp_path / name}" in run_fails(capsys, *broken)
        assert clmae.load(tmp_path / name)[1]["epoch"] == 0


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    for place, error in (("augment", RuntimeError("CUDA out of memory")), ("shapes", KeyError("a fault"))):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(train, place, Mock(side_effect=error))
            train.main(options("--out", tmp_path / place))


# ----------------------------------------------------------------------------------------------------------------------
# The README and its recipes


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language: str, *names: str) -> list[str]:
    """The blocks of code of a language in these pages."""
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(map(page, names)), re.DOTALL)


def test_the_readmes_commands_run_on_a_tiny_budget(run, tmp_path, monkeypatch, bare):
    pages = blocks("bash", "README.md", "assets/results.md", "assets/recipes.md")
    commands = [line for block in pages for line in block.splitlines() if re.match(r"python \w+\.py", line)]
    assert len(commands) >= 10
    monkeypatch.chdir(tmp_path)
    for part, label in itertools.product(("train", "test"), range(3)):
        save_images(tmp_path / "cifar10" / part / str(label), 24, size=(32, 32))
    shutil.copytree(tmp_path / "cifar10", tmp_path / "imagenette")
    save_images(tmp_path / "path" / "to" / "photos", 80, size=(70, 50))
    shutil.copytree(run, tmp_path / "runs" / "shapes")  # the command of the README's Start made it
    monkeypatch.setattr(train, "MODELS", {name: SMALL for name in train.MODELS})
    for command in dict.fromkeys(commands):
        script, *words = shlex.split(command, comments=True)[1:]
        words = [f"./{w}" if w in ("cifar10", "imagenette") else w for w in words if w != "--compile"]
        if script == "train.py" and "--resume" not in words:
            words += options("--images", 32, "--holdout", 32, "--epochs", 1, "--image-size", 32)
            shutil.rmtree(train.build_parser().parse_args(words).out or "runs/none", ignore_errors=True)
        with monkeypatch.context() as patch:
            if script == "visualize.py":
                patch.setattr(visualize, "draw", bare)
            {"train.py": train.main, "visualize.py": visualize.main}[script](words)


def test_the_readmes_notebook_lines_run(run, tmp_path, monkeypatch):
    """Load, features, their score on other data, the masks of a photograph; and timm, where it is installed."""
    shutil.copytree(run, tmp_path / "runs" / "shapes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", types.SimpleNamespace(figure=visualize.Figure))
    code = blocks("python", "README.md")
    first = next(i for i, block in enumerate(code) if "load(" in block)
    notebook, scored, photograph, parity = code[first : first + 4]
    exec(notebook, scope := {})
    model, record, x, features = (scope[name] for name in ("model", "record", "x", "features"))
    assert features.shape == (8, 32)  # 96 of the README's model, which is not SMALL
    data = train.load_data(argparse.Namespace(**record["options"]))
    images = data.images.float()
    assert torch.equal(record["images"], data.val_images[:8])
    torch.testing.assert_close(model.mean.flatten(), images.mean((0, 2, 3)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.std.flatten(), images.std((0, 2, 3)), rtol=1e-4, atol=1e-3)
    now = model.scores(x, record["log"][-1]["lambda"])
    torch.testing.assert_close(now, record["scores"][-1], rtol=1e-3, atol=1e-3)

    monkeypatch.setitem(train.DATASETS, "cifar100", lambda root, part: fashion(70))
    exec(scored, scope)
    assert scope["z"].shape == (70, 32)
    photo = Image.new("RGB", (90, 60), "red")
    photo.paste("blue", (30, 0, 60, 60))
    photo.save(tmp_path / "photo.jpg")
    exec(photograph, scope)
    assert scope["image"].shape == (3, 32, 32) and scope["image"][:, 16, 16].tolist()[2] > 200
    assert scope["p"].shape == (8, 8) and scope["p"].mean().item() == pytest.approx(0.75) and scope["p"].std() > 0.01
    pytest.importorskip("timm")
    exec(parity, scope)
    torch.testing.assert_close(scope["vit"].forward_features(x), model.encode(x), rtol=1e-3, atol=1e-4)


def fashion(n: int) -> list[tuple[Image.Image, int]]:
    """Grey images of three kinds, as a data set of torchvision that does not name its classes."""
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


@pytest.mark.parametrize("words", [["progress**2", "Conv2d", "FashionMNIST", "score_std", "F.normalize"],
                                   ["torch.rand("], ["advantage"], ["2 * end"]])  # fmt: skip
def test_the_recipes_changes_work(words, tmp_path, capsys, monkeypatch, bare):
    module = changed(monkeypatch, *words)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda root, train, download: fashion(140))
    data = ("--data", "fashion") if "FashionMNIST" in words else ()
    module.main(options("--out", tmp_path / "run", *data))
    assert ("3 classes: 0, 1, 2, ..." in capsys.readouterr().out) == bool(data)
    record = weights(tmp_path / "run")
    log = record["log"]
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    if data:
        assert log[0]["score_std"] > 0 and log[1]["lambda"] == pytest.approx(1 - 2 * (1 / 3) ** 2 * (3 - 2 / 3))
        assert {"knn", "linear_probe"} <= log[2].keys() and record["model"]["masker.score.weight"].shape[2:] == (3, 3)
    if words == ["2 * end"]:
        assert [entry["lambda"] for entry in log] == pytest.approx([1, -1 / 3, 0])
    elif words == ["torch.rand("]:
        scores = record["scores"][2].reshape(8, 4, 2, 4, 2)
        assert torch.equal(scores, scores[:, :, :1, :, :1].expand_as(scores)) and scores.std() > 10
    else:
        assert not torch.equal(record["scores"][1], record["scores"][2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_recipe_of_cuda_graphs_trains_what_an_eager_run_trains(device, tmp_path, monkeypatch, bare):
    """On a CPU the capture is replaced. On a GPU only masks and rounding may differ."""
    words = ("--device", device)
    eager = trained(tmp_path / "eager", *words)
    module = changed(monkeypatch, "make_graphed_callables")
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
        capture = Mock(side_effect=lambda step, sample, allow_unused_input: (step(*sample), step)[1])
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    module.main(options("--out", tmp_path / "graph", *words))
    graph = weights(tmp_path / "graph")
    for name, value in eager["model"].items():
        torch.testing.assert_close(graph["model"][name], value, rtol=0, atol=0 if device == "cpu" else 0.02)
    assert [entry["loss"] for entry in graph["log"][1:]] == pytest.approx(
        [r["loss"] for r in eager["log"][1:]], rel=0.02
    )


def test_the_recipe_of_fine_tuning_learns_from_the_patch_tokens_and_moves_the_first_layers_least(monkeypatch, capsys):
    torch.manual_seed(0)
    images, labels = torch.zeros(256, 3, 16, 16, dtype=torch.uint8), torch.arange(256) % 2
    images[labels == 1, :, ::2] = 255
    data, model = train.Data(images, labels, ["plain", "striped"], 0, images[:64], labels[:64]), CLMAE(small())
    record = {"options": vars(train.build_parser().parse_args([]))}
    monkeypatch.setattr(clmae, "load", lambda run: (model, record))
    monkeypatch.setattr(train, "load_data", lambda args, device: data)
    results = {"AdamW": [], "augment": [], "features": [], "cross_entropy": []}
    for place, name in ((torch.optim, "AdamW"), (train, "augment"), (CLMAE, "features"), (F, "cross_entropy")):
        real = getattr(place, name)
        monkeypatch.setattr(
            place,
            name,
            lambda *a, real=real, name=name, **k: results[name].append((real(*a, **k), k)) or results[name][-1][0],
        )
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    (recipe,) = (block for block in blocks("python", "assets/recipes.md") if "pretrained" in block)
    settings = '"epochs": 50, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 5.0, "min_crop": 0.3'
    assert settings in recipe
    exec(
        recipe.replace(settings, '"epochs": 4, "batch_size": 32, "lr": 1e-2, "warmup_epochs": 1.0, "min_crop": 0.3'), {}
    )

    told = re.findall(r"(.*): (.*) % after 4 epochs", capsys.readouterr().out)
    assert [name for name, _ in told] == ["pretrained", "from scratch"] and float(told[0][1]) == 100
    assert not any(torch.equal(before[name], p) for name, p in model.encoder.named_parameters())
    assert sum(z.requires_grad for z, _ in results["features"]) == 2 * 4 * 8  # through the patch tokens, not CLS
    crops = [x for x, _ in results["augment"]]
    assert len(crops) == 64 and not torch.equal(crops[0], crops[1]) and all(map(torch.equal, crops[:32], crops[32:]))
    assert all(given == {"label_smoothing": 0.1} for _, given in results["cross_entropy"])

    groups = {id(p): group for group in results["AdamW"][0][0].param_groups for p in group["params"]}
    expected = {"norm.weight": 1, "blocks.1.attn.qkv.weight": 0.75, "blocks.0.mlp.fc1.bias": 0.75**2}
    expected |= {"patch_embed.proj.weight": 0.75**3, "cls_token": 0.75**3}
    for name, p in model.encoder.named_parameters():
        scale, decay = groups[id(p)]["scale"], groups[id(p)]["weight_decay"]
        assert scale == expected.get(name, scale) and decay == (0.05 if p.ndim in (2, 4) else 0), name
        assert groups[id(p)]["lr"] == pytest.approx(groups[id(model.encoder.norm.weight)]["lr"] * scale)
    assert len(groups) == len(before) + 2


def test_the_recipe_of_timing_times_both_arms_in_turns(capsys, monkeypatch):
    kappas, forward = [], CLMAE.forward
    monkeypatch.setattr(CLMAE, "forward", lambda model, *a: kappas.append(model.config.kappa) or forward(model, *a))
    monkeypatch.setitem(train.MODELS, "tiny", SMALL)
    (recipe,) = (block for block in blocks("python", "assets/recipes.md") if "turn by turn" in block)
    exec(recipe.replace("range(21)", "range(3)").replace("256", "8"), {})
    assert kappas == [0.0, 2.0] * 3
    assert re.search(r"random [\d.]+ ms, curriculum / random, turn by turn [\d.]+\n$", capsys.readouterr().out)


def test_the_readmes_bare_loop_trains(tmp_path, monkeypatch):
    (loop,) = (block for block in blocks("python", "README.md") if "curriculum_factor" in block and "backward" in block)
    pixels = train.shapes(200, 32, seed=1)[0].permute(0, 2, 3, 1).numpy()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: types.SimpleNamespace(data=pixels))
    torch.manual_seed(0)
    exec(re.sub(r"epochs = \d+", "epochs = 2", loop), scope := {})
    assert scope["output"].mae_loss.isfinite() and scope["lam"] == -1


def test_the_readmes_table_is_what_clmae_prints(capsys):
    clmae.tour()
    (shown,) = (block for block in blocks("text", "README.md") if block.startswith("One step"))
    printed, number = capsys.readouterr().out, r"[-+]?\d+\.\d+"
    assert re.sub(number, "#", shown).split() == re.sub(number, "#", printed).split()
    numbers = [[float(n) for n in re.findall(number, text)] for text in (shown, printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011)  # the last digit depends on the machine

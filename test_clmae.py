"""What CL-MAE guarantees, and what its two scripts promise. `pytest` runs everything in minutes on two cores.

No test needs a network, a GPU or a data set: the images are generated.
"""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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
        grads = torch.autograd.grad(
            loss, list(part.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        result.append(torch.cat([g.flatten() for g in grads]))
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
    """loss = mae_loss + lam masker_loss: the first reaches encoder and decoder alone, the second the masker alone."""
    out = model(images, lam, generator())
    mae, none = gradients(model, out.mae_loss)
    nothing, masker = gradients(model, out.masker_loss)
    assert not none.any() and not nothing.any() and mae.norm() > 0.1 and (masker.norm() > 1e-3) == (lam != 0)
    both = gradients(model, out.loss)
    assert torch.equal(both[0], mae)
    torch.testing.assert_close(both[1], lam * masker, atol=1e-8, rtol=1e-5)
    assert not out.mask.requires_grad and torch.equal(out.mask.unique(), torch.tensor([0.0, 1.0]))


def test_lambda_turns_the_maskers_gradient_around_and_touches_nothing_else(model, images):
    """The MAE's loss and gradient are those of a plain MAE under the same mask; -lambda turns the masker's around."""
    partner, adversary = (model(images, lam, generator()) for lam in (0.7, -0.7))
    assert torch.equal(partner.mask, adversary.mask) and torch.equal(partner.mae_loss, adversary.mae_loss)
    pred = model.predict(images, partner.mask)
    plain = ((pred - model.target(images)).square().mean(-1) * partner.mask).sum() / 72
    torch.testing.assert_close(partner.mae_loss, plain)
    (expected, _), (mae, helps), (same, opposes) = (gradients(model, x) for x in (plain, partner.loss, adversary.loss))
    torch.testing.assert_close(mae, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(mae, same) and torch.equal(helps, -opposes) and helps.norm() > 1e-4


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
    torch.manual_seed(0)
    assert not torch.equal(CLMAE(small())(images, 1.0).mask, results[0][0])


def test_the_masker_learns_to_help_at_plus_one_and_to_oppose_at_minus_one():
    """Images of flat and noisy patches: noise cannot be guessed, so a partner shows it and an adversary hides it."""
    torch.manual_seed(0)
    model = CLMAE(small(image_size=24, norm_pix=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def batch(n):
        noisy = (torch.rand(n, 36, 1) < 0.25).float()
        patches = torch.randn(n, 1, 1) * 0.5 + noisy * torch.randn(n, 36, 48)
        return unpatchify(patches, 4, (6, 6)), noisy.squeeze(-1)

    held_out, noisy = batch(200)
    for lam, sign in ((1.0, -1), (-1.0, 1)):
        for _ in range(150):
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
    z = torch.cat([s["encoder.cls_token"][0] + s["encoder.pos_embed"][0, :1], x[mask == 0]])[None]
    for i in range(c.depth):
        z = plain_block(z, s, f"encoder.blocks.{i}.", c.heads)
    z = F.layer_norm(z, (c.dim,), s["encoder.norm.weight"], s["encoder.norm.bias"], 1e-6)[0]
    z = F.linear(z, s["decoder.embed.weight"], s["decoder.embed.bias"])
    seen = iter(z[1:])
    y = torch.stack([z[0]] + [s["decoder.mask_token"][0, 0] if m else next(seen) for m in mask.tolist()])
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
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, (4, 4))
    changed = images + 100 * hidden
    torch.testing.assert_close(model.predict(changed, mask), model.predict(images, mask))
    assert not torch.allclose(model.predict(images + 1 - hidden, mask), model.predict(images, mask))


def test_a_mask_of_ones_own(model, images):
    out = model(images, 1.0, generator())
    torch.testing.assert_close(model.predict(images, out.mask), out.pred)
    for wrong in (torch.ones(6, 16), torch.zeros(6, 16), (torch.arange(96) % 5 > 0).reshape(6, 16)):
        with pytest.raises(ValueError, match="mask must leave the same number of patches visible"):
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
    out.loss.backward()
    plain = (model.predict(images, out.mask) - model.target(images)).square().mean(-1) * out.mask
    assert out.mae_loss.item() == pytest.approx((plain.sum() / out.mask.sum()).item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_whole_model_can_be_of_another_precision(model, images, dtype):
    loss = model(images, 1.0, generator()).mae_loss.item()
    assert model.to(dtype)(images.to(dtype), 1.0, generator()).mae_loss.item() == pytest.approx(loss, rel=0.05)
    assert model.target(images.to(dtype)).dtype == torch.float32


def test_encode_can_be_exported_for_any_number_of_images(model, images):
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.encode(images)

    exported = torch.export.export(Encode(), (images,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    torch.testing.assert_close(exported(images[:3]), model.encode(images[:3]))


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


@pytest.mark.parametrize(
    ("channels", "height", "width", "p"), [(3, 16, 16, 4), (1, 8, 20, 4), (4, 6, 3, 3), (3, 5, 7, 1)]
)
def test_unpatchify_undoes_patchify(channels, height, width, p):
    images = torch.randn(2, channels, height, width)
    assert torch.equal(unpatchify(patchify(images, p), p, (height // p, width // p)), images)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_undoes_the_target(images, norm_pix):
    model = CLMAE(small(norm_pix=norm_pix))
    torch.testing.assert_close(model.reconstruct(model.target(images), images), images)


def test_patches_run_row_by_row_and_pixels_as_row_column_channel():
    images = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    assert torch.equal(patchify(images, 2)[0, 4], images[0, :, 2:4, 2:4].permute(1, 2, 0).flatten())


def test_positions_follow_the_formula():
    table, dim = sincos_positions((3, 5), 16)[0], 16
    assert (table[0] == 0).all()  # CLS
    for row, column, feature in itertools.product(range(3), range(5), range(dim)):
        position = column if feature < dim // 2 else row
        quarter, i = divmod(feature % (dim // 2), dim // 4)
        angle = position / 10000 ** (i / (dim // 4))
        expected = math.cos(angle) if quarter else math.sin(angle)
        assert table[1 + 5 * row + column, feature].item() == pytest.approx(expected, abs=1e-6)


def test_the_encoder_carries_timms_names():
    state = CLMAE(small(depth=1)).encoder.state_dict()
    parts = itertools.product("norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split(), ("weight", "bias"))
    ends = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias", "cls_token", "pos_embed"]
    assert sorted(state) == sorted([f"blocks.0.{part}.{name}" for part, name in parts] + ends)
    assert state["pos_embed"].shape == (1, 17, 32) and state["cls_token"].shape == (1, 1, 32)


def test_encode_never_masks_and_repeats_itself(model, images):
    z = model.encode(images)
    assert z.shape == (6, 17, 32) and torch.equal(z, model.encode(images))
    assert torch.equal(model.features(images), z[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 must divide the image size 16 x 16"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 leaves 0 of 16"),
        ({"mask_ratio": 0.01}, "mask_ratio 0.01 leaves 16 of 16"),
        ({"heads": 3}, "dim 32 must be a multiple of 4 and of heads 3"),
        ({"masker_dim": 6}, "masker_dim 6"),
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


# ----------------------------------------------------------------------------------------------------------------------
# What the masks are measured by


def test_diversity_is_0_for_one_mask_and_near_1_for_unrelated_ones():
    one, other = torch.randn(1, 64), torch.randn(100, 64, generator=generator())
    assert train.diversity(one.expand(100, -1) + torch.randn(100, 1)) == pytest.approx(0, abs=1e-5)
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


def test_the_figures_are_of_held_out_images_under_the_same_noise(monkeypatch):
    images, labels, where = train.shapes(60, (16, 16), seed=1)
    data = train.Data(images[40:], labels[40:], train.SHAPES, images[:40], labels[:40], where[:40])
    model = CLMAE(small())
    monkeypatch.setattr(train, "knn_accuracy", lambda z, val, data: val.abs().sum().item())  # no two alike
    figures, scores = train.measure(model, data, torch.tensor(-0.5), first=True, knn=True)
    held_out = model.standardise(images[:40])
    random, learned = (model(held_out, lam, generator()) for lam in (0.0, -0.5))
    assert figures["loss_random"] == pytest.approx(random.mae_loss.item()) and torch.equal(scores, learned.scores)
    assert figures["hardness"] == pytest.approx((learned.mae_loss / random.mae_loss).item())
    assert figures["objects"] == train.objects(learned.scores, where[:40], 4)
    assert figures["diversity"] == train.diversity(learned.scores)
    for name, encoder in (("knn", model), ("knn_pixels", None)):
        assert figures[name] == train.knn_accuracy(*train.vectors(encoder, data), data)
    assert figures["objects_contrast"] == train.objects(-patchify(held_out, 4).std(-1), where[:40], 4)
    trivial = (model.target(model.reconstruct(torch.zeros(40, 16, 48), held_out)) - model.target(held_out)).square()
    assert figures["loss_trivial"] == pytest.approx(trivial.mean().item(), rel=0.05)
    neutral = train.measure(model, data, 0.0, first=False, knn=False)[0]
    assert neutral["hardness"] == 1 and neutral["objects"] == 0.5 and "knn" not in neutral
    plain = train.measure(CLMAE(small(kappa=0.0)), data._replace(objects=None, classes=[]), 0.0, False, True)[0]
    assert plain.keys() == {"loss_random", "hardness"}


# ----------------------------------------------------------------------------------------------------------------------
# Data


def save_images(folder: Path, n: int, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> list[Path]:
    """n images of random blocks as PNG (or JPEG for CMYK) files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(n):
        pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator(i))
        image = torchvision.transforms.functional.to_pil_image(pixels).resize(size).convert(mode)
        files.append(folder / f"{mode}-{size[0]}x{size[1]}-{i}.{'jpg' if mode == 'CMYK' else 'png'}")
        image.save(files[-1])
    return files


def arguments(*words) -> train.argparse.Namespace:
    return train.build_parser().parse_args([str(w) for w in ("--batch-size", 1, *words)])


def fit(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """A picture as it is read, (3, H, W)."""
    folder = train.Folder(path.parent, loader=train.open_image, is_valid_file=lambda file: Path(file).name == path.name)
    return train.read_images(folder, size)[0][0]


def test_shapes_are_reproducible_and_tell_where_they_are():
    images, kinds, where = train.shapes(300, (32, 48), seed=5)
    assert images.shape == (300, 3, 32, 48) and images.dtype == torch.uint8 and where.shape == (300, 32, 48)
    assert kinds.unique().tolist() == list(range(len(train.SHAPES))) and images.float().std() > 30
    again, other = train.shapes(300, (32, 48), seed=5)[0], train.shapes(300, (32, 48), seed=6)[0]
    assert torch.equal(images, again) and not torch.equal(images, other)
    shares = where.float().mean((1, 2))
    assert 0.05 < shares.min() and shares.max() < 0.6
    for mask, low, high in ((where, 60, 200), (where.flip(0), 0, 40)):  # the shapes have another colour than the ground
        inside, outside = ((images * m[:, None]).sum((2, 3)) / m.sum((1, 2))[:, None] for m in (mask, ~mask))
        assert low < (inside - outside).abs().mean() < high


def test_a_batch_is_augmented_shuffled_and_sets_the_learning_rate():
    args = arguments("--batch-size", 32, "--epochs", 4, "--lr", 1e-2, "--warmup-epochs", 1)
    images, labels, _ = train.shapes(96, (16, 16), seed=1)
    data, model = train.Data(images, labels, train.SHAPES, images, labels), CLMAE(small())
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": scale} for scale in (1.0, 0.5)])
    orders, rates = [], []
    for epoch in (2, 3):
        for ids, batch in train.batches(args, data, model, optimizer, epoch):
            orders += ids.tolist()
            rates.append([group["lr"] for group in optimizer.param_groups])
            assert batch.shape == (32, 3, 16, 16)
            assert (batch - model.standardise(images[ids])).abs().amax((1, 2, 3)).min() > 0.01  # each is another crop
    assert sorted(orders[:96]) == sorted(orders[96:]) == list(range(96))
    assert orders[:96] != orders[96:] and orders[:96] != sorted(orders[:96])
    lrs = [1e-2 * 32 / 256 * train.lr_factor(1 + i / 3, 4, 1.0) for i in range(6)]
    assert rates == [pytest.approx([lr, lr / 2]) for lr in lrs]
    ids, batch = next(iter(train.batches(arguments("--batch-size", 96, "--min-crop", 1), data, model, optimizer, 1)))
    whole = model.standardise(images[ids])
    differences = torch.stack([(batch - x).abs().amax((1, 2, 3)) for x in (whole, whole.flip(3))])
    assert differences.amin(0).max() < 1e-3  # --min-crop 1: no crop
    assert [train.lr_factor(e, 10, 2) for e in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_augment_crops_inside_the_image_and_flips_half_of_them():
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


def test_a_folder_of_any_images_becomes_one_tensor(tmp_path):
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA"):
        save_images(tmp_path / "mixed", 2, mode, (40, 24))
    save_images(tmp_path / "mixed", 20, "RGB", (19, 33))
    (tmp_path / "mixed" / "._thumb.png").write_text("not an image: hidden")
    save_images(tmp_path / "mixed" / ".thumbnails", 5)
    assert train.is_image("/a/b.GIF", "/a") and not train.is_image("/a/b.txt", "/a")
    data = train.load_data(arguments("--data", tmp_path / "mixed", "--image-size", 16))
    assert data.train.shape == (31, 3, 16, 16) and data.val.shape == (3, 3, 16, 16) and data.classes == []
    assert data.train.float().flatten(1).std(1).min() > 5  # none is blank
    assert (data.train_labels == -1).all()


def test_pictures_keep_their_shades_their_middle_and_stand_upright(tmp_path):
    deep, turned, wide = (tmp_path / f"{name}.png" for name in ("deep", "turned", "wide"))
    ramp = (torch.arange(16) * 4096).expand(16, 16).to(torch.int32).numpy()
    Image.fromarray(ramp.astype("uint16")).save(deep)
    assert (fit(deep, (16, 16))[0, 0].int() - torch.arange(16) * 16).abs().max() <= 1
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))  # blue above red
    exif = image.getexif()
    exif[0x0112] = 3  # turned by half a turn
    image.save(turned, exif=exif)
    assert fit(turned, (16, 16))[:, 2, 8].tolist() == [255, 0, 0]
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    image.save(wide)
    assert (fit(wide, (10, 10))[:, 5, 5] == torch.tensor([0, 0, 255])).all()
    assert fit(wide, (10, 30))[:, 5, 5].tolist() == [255, 0, 0]
    line = tmp_path / "line.png"
    Image.new("RGB", (20_000, 1), "blue").save(line)
    assert fit(line, (224, 224))[:, 9, 9].tolist() == [0, 0, 255]  # cropped first: resized first it takes gigabytes


def test_class_folders_with_and_without_a_held_out_part(tmp_path):
    for i, (part, name) in enumerate(itertools.product(("Train", "validation"), ("cat", "dog", ".hidden"))):
        for file in save_images(tmp_path / part / name, 10):
            Image.eval(Image.open(file), lambda value, i=i: value // 8 + 20 * i).save(file)  # no image is there twice
    data = train.load_data(arguments("--data", tmp_path))
    assert data.classes == ["cat", "dog"] and len(data.train) == len(data.val) == 20
    assert data.train_labels.bincount().tolist() == data.val_labels.bincount().tolist() == [10, 10]
    assert data.val_labels[:8].unique().tolist() == [0, 1]  # shuffled: the figures show the first eight
    assert data.train.shape[2:] == (16, 16)  # as the files are
    fewer = train.load_data(arguments("--data", tmp_path, "--images", 12, "--holdout", 3))
    assert len(fewer.train) == 12 and len(fewer.val) == 3  # the images trained on are the same with and without
    assert fewer.train.equal(train.load_data(arguments("--data", tmp_path, "--images", 12)).train)
    tenth = train.load_data(arguments("--data", tmp_path / "Train"))
    assert len(tenth.train) == 18 and len(tenth.val) == 2
    for few in (data, fewer, tenth):  # what is held out is not trained on
        assert not (few.val[:, None] == few.train[None]).flatten(2).all(2).any()


def test_imagenette_is_read_as_it_is_downloaded(tmp_path, monkeypatch):
    def downloaded(root, split, size, download):
        assert download and size == "160px"
        return torchvision.datasets.ImageFolder(Path(root) / "imagenette2-160" / split)

    for split, name in itertools.product(("train", "val"), ("n01440764", "n02102040")):
        save_images(tmp_path / "imagenette2-160" / split / name, 6, size=(200, 160))
    monkeypatch.setattr(torchvision.datasets, "Imagenette", downloaded)
    data = train.load_data(arguments("--data", "imagenette", "--data-dir", tmp_path))
    assert data.train.shape == data.val.shape == (12, 3, 160, 160) and data.classes == ["n01440764", "n02102040"]
    assert data.train_labels.bincount().tolist() == [6, 6]


def test_shapes_hold_out_others():
    for words in ((), ("--holdout", 40)):
        data = train.load_data(arguments("--images", 60, *words))
        assert len(data.train) == 60 and len(data.val) == len(data.objects) == (40 if words else 2000)
        seen, held_out = ({image.numpy().tobytes() for image in images} for images in (data.train, data.val))
        assert len(seen) == 60 and not seen & held_out


def test_the_held_out_part_is_not_the_training_part(monkeypatch):
    for name in ("CIFAR10", "CIFAR100", "Imagenette"):
        monkeypatch.setattr(torchvision.datasets, name, lambda root, part, *args, **kwargs: part)
        assert train.open_data(name.lower(), "") in ([True, False], ["train", "val"])


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def labelled(labels, val_labels, classes: int) -> train.Data:
    return train.Data(None, labels, [str(i) for i in range(classes)], None, val_labels)


def test_knn_accuracy_equals_a_loop_over_images():
    z, labels = torch.randn(90, 5, generator=generator()), torch.arange(90) % 3
    z = z + 1.5 * F.one_hot(labels, 5)
    bank, bank_labels, query, query_labels = z[:60], labels[:60], z[60:], labels[60:]
    right = 0
    for q, label in zip(query, query_labels, strict=True):
        cosine = [F.cosine_similarity(q, b, dim=0).item() for b in bank]
        votes = [0.0, 0.0, 0.0]
        for i in sorted(range(60), key=lambda i: -cosine[i])[:20]:
            votes[bank_labels[i]] += math.exp(cosine[i] / 0.07)
        right += votes.index(max(votes)) == label
    assert 50 < 100 * right / 30 < 100
    assert train.knn_accuracy(bank, query, labelled(bank_labels, query_labels, 3)) == pytest.approx(100 * right / 30)


def test_the_linear_probe_finds_what_is_linear_and_nothing_else():
    z = torch.randn(600, 8, generator=generator())
    linear, unrelated = (z[:, 0] + z[:, 1] > 0).long(), torch.randint(0, 2, (600,), generator=generator(1))
    for labels, low, high in ((linear, 95, 100), (unrelated, 35, 65)):
        assert low < train.linear_probe(z[:400], z[400:], labelled(labels[:400], labels[400:], 2)) <= high


def test_vectors_are_z_scored_features_or_pixels():
    images, labels, _ = train.shapes(90, (16, 16), seed=1)
    data, model = train.Data(images[:70], labels[:70], train.SHAPES, images[70:], labels[70:]), CLMAE(small())
    for z, zv, encoder in (
        (model.features(model.standardise(images[:70])), model.features(model.standardise(images[70:])), model),
        (images[:70].float().flatten(1), images[70:].float().flatten(1), None),
    ):
        train_z, val_z = train.vectors(encoder, data)
        torch.testing.assert_close(train_z, (z - z.mean(0)) / (z.std(0) + 1e-6), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(val_z, (zv - z.mean(0)) / (z.std(0) + 1e-6), rtol=1e-3, atol=1e-3)
    large = data._replace(train=images[:70].repeat(1, 1, 3, 4), val=images[70:].repeat(1, 1, 3, 4))
    assert train.vectors(None, large)[0].shape == (70, 3 * 32 * 32)


def test_fine_tuning_learns_and_moves_the_first_layers_least(monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.zeros(256, 3, 16, 16, dtype=torch.uint8), torch.arange(256) % 2
    images[labels == 1, :, ::2] = 255
    data, model = train.Data(images, labels, ["plain", "striped"], images[:64], labels[:64]), CLMAE(small())
    optimizers, batches = [], train.batches
    monkeypatch.setattr(train, "batches", lambda *args: optimizers.append(args[3]) or batches(*args))
    before, twin = model.encoder.patch_embed.proj.weight.clone(), copy.deepcopy(model)
    for m in (model, twin):  # the second meets the same head, order and crops
        assert train.finetune(m, data, arguments("--epochs", 4, "--batch-size", 32, "--lr", 1e-2, "--no-amp")) == 100
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    scale = {id(p): group["lr_scale"] for group in optimizers[0].param_groups for p in group["params"]}
    encoder = model.encoder
    assert not torch.equal(encoder.patch_embed.proj.weight, before) and encoder.norm.weight.grad is None
    parts = (encoder.norm, encoder.blocks[1].attn.qkv, encoder.patch_embed.proj)
    assert [scale[id(part.weight)] for part in parts] == [1, 0.75, 0.75**3] and scale[id(encoder.cls_token)] == 0.75**3
    assert len(scale) == len(list(encoder.parameters())) + 2


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
    train.main(options("--out", path, "--knn-every", 1))
    return path


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(visualize, "draw", lambda run: None)


def weights(path: Path) -> dict:
    return torch.load(path / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_a_log_a_checkpoint_and_pictures(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1, 2]
    trained = set("epoch lambda loss lr images_per_s loss_random hardness diversity objects knn".split())
    assert records[1].keys() >= trained and records[0].keys() >= {"loss_trivial", "knn_pixels", "objects_contrast"}
    assert records[0]["lambda"] == 1 and records[2]["lambda"] == -1
    checkpoint = weights(run)
    assert checkpoint["log"] == records and len(checkpoint["scores"]) == 3
    for record, scores in zip(records, checkpoint["scores"], strict=True):
        assert scores.max() == 0 and (scores.min() < 0) == (record["lambda"] != 0)  # a masker that hides only
    assert checkpoint["images"].shape == (8, 3, 32, 32)
    for name in ("masks.png", "masks.gif", "reconstructions.png", "curves.png", "step.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) >= 200
            if name == "masks.gif":
                assert picture.n_frames == 3
            grey = torchvision.transforms.functional.pil_to_tensor(picture.convert("L")).float()
        assert grey.std() > 10  # not blank
        assert (grey != grey[0, 0, 0]).float().mean() > 0.05


def test_the_same_command_gives_the_same_weights_and_another_seed_others(run, tmp_path, no_figures):
    train.main(options("--out", tmp_path / "again", "--knn-every", 2))
    train.main(options("--out", tmp_path / "other", "--seed", 1))
    first, again, other = (weights(p)["model"] for p in (run, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_lambda_0_throughout_trains_what_random_masks_train(tmp_path, no_figures):
    for name, words in (("random", ["--masking", "random"]), ("zero", ["--lambda-start", 0, "--lambda-end", 0])):
        train.main(options("--out", tmp_path / name, *words))
    random, zero = weights(tmp_path / "random"), weights(tmp_path / "zero")
    assert all(torch.equal(value, zero["model"][name]) for name, value in random["model"].items())
    for r, z in zip(random["log"], zero["log"], strict=True):
        assert all(r[name] == z[name] for name in r.keys() - {"images_per_s"})


def test_the_masks_find_the_objects(tmp_path, monkeypatch, no_figures):
    monkeypatch.setitem(train.MODELS, "nano", SMALL | {"dim": 64, "decoder_dim": 32, "masker_dim": 32})
    words = options("--out", tmp_path, "--images", 3000, "--holdout", 500, "--epochs", 12, "--lr", 8e-3)
    train.main([*words, "--knn-every", "12"])
    log = weights(tmp_path)["log"]
    assert min(entry["objects"] for entry in log) < 0.3 and log[-1]["objects"] > 0.8  # the partner shows them first
    assert min(entry["hardness"] for entry in log[:6]) < 0.97 and max(entry["hardness"] for entry in log[7:]) > 1.01
    assert abs(log[0]["objects_contrast"] - 0.5) < 0.1


@pytest.mark.parametrize("masking", ["curriculum", "random"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(masking, tmp_path, monkeypatch, no_figures):
    command = options("--masking", masking, "--epochs", 3)
    train.main([*command, "--out", str(tmp_path / "whole")])

    def interrupted(*state, save=train.save):
        save(*state)
        if weights(tmp_path / "broken")["epoch"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save", interrupted)
        train.main([*command, "--out", str(tmp_path / "broken")])
    old = weights(tmp_path / "broken")
    del old["options"]["tau"], old["config"]["tau"]  # as if saved before that option was there
    torch.save(old, tmp_path / "broken" / "checkpoint.pt")
    train.main(["--resume", str(tmp_path / "broken")])
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    assert torch.equal(whole["rng"]["cpu"], resumed["rng"]["cpu"])
    for entry in whole["log"] + resumed["log"]:
        entry["images_per_s"] = 0
    assert whole["log"] == resumed["log"]
    assert (tmp_path / "broken" / "log.jsonl").read_text().count("\n") == 4
    train.main(["--evaluate", str(tmp_path / "broken")])
    assert (tmp_path / "broken" / "evaluation.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has another Ctrl-C")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *options("--out", out, "--epochs", 500)]
    process = subprocess.Popen(  # a test run in the background may hand on that Ctrl-C is ignored
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.time() + 120
    while not (out / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f"python train.py --resume {out}" in error and "Traceback" not in error
    assert clmae.load(out)[1]["epoch"] >= 0


def test_ctrl_c_stops_decoding_and_drawing(run, tmp_path, capsys, monkeypatch):
    save_images(tmp_path / "photos", 64)
    opened = []

    def interrupted(path):
        opened.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_image", interrupted)
    monkeypatch.setattr(visualize, "draw_masks", lambda *args: interrupted("masks.png"))
    for main, words in (
        (train.main, options("--data", tmp_path / "photos", "--image-size", 16)),
        (visualize.main, [str(run)]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 130 and capsys.readouterr().err.strip().endswith("interrupted")
    assert len(opened) < 64


def test_the_evaluations_tell_the_pretrained_encoder_from_the_floors(run, capsys, monkeypatch):
    model, record = clmae.load(run)
    data = train.load_data(train.argparse.Namespace(**record["options"]))
    torch.manual_seed(record["options"]["seed"])
    untrained = CLMAE(model.config)
    untrained.mean, untrained.std = model.mean, model.std
    expected = {"pretrained": model, "random_init": untrained, "pixels": None}
    train.main(["--evaluate", str(run), "--device", "cpu", "--image-size", "32"])
    printed, results = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    for name, encoder in expected.items():
        for what, score in (("knn", train.knn_accuracy), ("linear_probe", train.linear_probe)):
            assert results[what][name] == pytest.approx(score(*train.vectors(encoder, data), data))
            assert f"{what}, {name}: {results[what][name]:.2f} %" in printed
    assert len({results["linear_probe"][name] for name in expected}) > 1

    seen = []
    monkeypatch.setattr(train, "finetune", lambda m, data, args: seen.append((m, args)) or 50.0 + len(seen))
    train.main(["--finetune", str(run), "--device", "cpu", "--epochs", "3", "--batch-size", "32"])
    results = json.loads((run / "evaluation.json").read_text())
    assert results.keys() == {"knn", "linear_probe", "finetune"} and results["finetune"]["random_init"] == 52
    assert results["finetune"]["finetune_epochs"] == 3 and results["finetune"]["pretrained_epochs"] == 2
    assert "pixels" not in results["finetune"]
    for (tuned, args), encoder in zip(seen, (model, untrained), strict=True):
        assert all(map(torch.equal, tuned.parameters(), encoder.parameters()))
        assert (args.epochs, args.lr, args.min_crop) == (3, 2e-3, 0.3)  # its own defaults, but for what was typed


def test_compile_is_honoured(run, tmp_path, monkeypatch, no_figures):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: lambda *args: compiled.append(f) or f(*args))
    train.main(options("--compile", "--out", tmp_path / "run"))
    assert len(compiled) == 4 and isinstance(compiled[0], CLMAE)
    train.main(["--finetune", str(run), "--compile", "--epochs", "1", "--batch-size", "32"])
    assert len(compiled) == 8


def test_options_reach_model_and_optimiser_and_only_matrices_decay():
    own = ("--kappa", 3, "--tau", 0.5, "--mask-ratio", 0.5, "--no-norm-pix")
    model, optimizer = train.build(arguments("--weight-decay", 0.3, "--patch-size", 4, *own), (32, 32), "cpu")
    c = model.config
    assert (c.kappa, c.tau, c.mask_ratio, c.norm_pix) == (3, 0.5, 0.5, False)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert decay[id(p)] == (0.3 if matrix else 0), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_the_logged_loss_is_the_mean_over_the_epoch(tmp_path, monkeypatch, no_figures):
    losses, forward = [], CLMAE.forward

    def spy(model, images, lam, *generator):
        output = forward(model, images, lam, *generator)
        losses.extend([] if generator else [output.mae_loss.item()])
        return output

    monkeypatch.setattr(CLMAE, "forward", spy)
    train.main(options("--out", tmp_path / "run", "--epochs", 1))
    assert weights(tmp_path / "run")["log"][1]["loss"] == pytest.approx(sum(losses) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture
def shown(monkeypatch) -> list:
    """What visualize.show is given: the image and, where there is one, the probability of being masked."""
    seen, show = [], visualize.show
    monkeypatch.setattr(visualize, "show", lambda ax, *args: seen.append(args) or show(ax, *args))
    return seen


def test_masks_are_drawn_epoch_by_epoch(run, tmp_path, shown):
    model, record = clmae.load(run)
    visualize.draw_masks(record, model, tmp_path / "masks.png")
    visualize.draw_gif(record, model, tmp_path / "masks.gif")
    # Six images, in the columns of masks.png, then in masks.gif.
    drawn, ratios = zip(*(args[1:] for args in shown if len(args) > 1), strict=True)
    assert {*ratios} == {0.75}
    expected = [model.mask_probability(scores).reshape(8, 8, 8) for scores in record["scores"]]
    assert len(drawn) == 2 * 3 * 6 and all(torch.equal(p, expected[i // 6 % 3][i % 6]) for i, p in enumerate(drawn))
    assert not torch.equal(expected[0], expected[2])
    roles = [role for _, _, role, _ in visualize.masks_by_epoch(record, model, 3)]
    assert roles == ["untrained", "partner", "adversary"]
    assert [epoch for epoch, *_ in visualize.masks_by_epoch(record, model, 2)] == [0, 2]
    picture = visualize.show(visualize.plt.figure().add_subplot(), torch.zeros(3, 8, 8), torch.rand(2, 2), 0.75)
    (r0, _, b0, _), (r1, _, b1, _) = picture.to_rgba([0.5, 1.0])
    assert b0 > r0 and r1 > b1  # blue: less, red: more often than by a random mask


def test_the_push_in_step_png_is_where_descent_moves_the_score(run, tmp_path, monkeypatch):
    seen, show = [], visualize.show_values
    monkeypatch.setattr(visualize, "show_values", lambda ax, *args: seen.append(args[0]) or show(ax, *args))
    model, record = clmae.load(run)
    visualize.draw_step(record, model, tmp_path / "step.png")
    a, (_, y, loss, push) = seen[0], seen[2:6]  # of lambda = +1
    assert ((push > 0) == (loss > loss.nanmean()))[push.isfinite()].all() and push.isfinite().sum() > 5
    assert torch.equal(push.isfinite(), loss.isfinite() & (a <= 0))  # what reaches the masker
    assert torch.equal(y.flatten().topk(16).indices.sort()[0], loss.flatten().isnan().nonzero()[:, 0])
    for column, sign in ((5, 1), (6, -1)):  # as the note below says: a high loss is orange, a push up is blue
        (image,) = visualize.plt.gcf().axes[column].images
        red, _, blue, _ = image.to_rgba(image.get_clim()).T  # of the lowest and the highest value
        low, high = sign * (red - blue)
        assert low < 0 < high


def test_reconstructions_show_what_is_visible_and_fill_what_is_masked(run, tmp_path, shown):
    model, record = clmae.load(run)
    visualize.draw_reconstructions(record, model, tmp_path / "r.png")
    pictures = [patchify(args[0][None].float(), 4)[0] for args in shown]
    rows = len(pictures) // 5
    masks = [model(model.standardise(record["images"][:rows]), lam, generator()).mask for lam in (0.0, -1.0)]
    for i in range(rows):
        original, *pairs = pictures[i::rows]
        for mask, seen, filled in ((masks[0], pairs[0], pairs[1]), (masks[1], pairs[2], pairs[3])):
            assert (filled - original).mean().abs() < 20  # of the same brightness
            visible = (seen == original).all(1)
            assert torch.equal(visible, mask[i] == 0) and (seen[~visible] == 160).all()
            torch.testing.assert_close(filled[visible], original[visible])
            assert (filled[~visible] - original[~visible]).abs().mean() > 3


def test_curves_show_all_that_was_logged(tmp_path):
    keys = {"lambda": 0.0, "hardness": 1.0, "my_own_figure": 3.0}
    losses = [{"loss_random": 9.0, "loss_trivial": 0.25}, {"loss": 0.8, "loss_random": 0.7}, {"loss": 0.5}]
    visualize.draw_curves({"log": [{"epoch": i, **keys, **loss} for i, loss in enumerate(losses)]}, tmp_path / "c.png")
    panels = {ax.get_title(): ax for ax in visualize.plt.gcf().axes}
    losses = panels["reconstruction loss"]
    assert 0.8 < losses.get_ylim()[1] < 1.3  # the untrained loss is far above; --no-norm-pix: above loss_trivial
    assert [len(line.get_xdata()) for line in losses.lines] == [2, 2, 2]
    assert panels["my_own_figure"].lines[0].get_ydata().tolist() == [3, 3, 3]


def test_runs_are_compared_as_far_as_they_go(run, tmp_path):
    for name, log in (("a-0", [1.0, 0.9]), ("a-1", [1.0, 0.7, 0.6]), ("old", [1.0])):
        record = weights(run)
        record["options"] |= {"seed": len(log), "lr": 1.0 if name == "old" else 2.0}
        record["log"] = [{"epoch": i, "hardness": value} for i, value in enumerate(log)]
        (tmp_path / name).mkdir()
        torch.save(record, tmp_path / name / "checkpoint.pt")
    visualize.main([str(tmp_path / name) for name in ("a-0", "a-1", "old")])
    (ax,) = (ax for ax in visualize.plt.gcf().axes if ax.get_title().startswith("hardness"))
    arm, old = ax.lines
    assert list(arm.get_xdata()) == [0, 1, 2] and list(arm.get_ydata()) == pytest.approx([1, 0.8, 0.6])
    assert list(old.get_ydata()) == [1] and "lr 2.0" in arm.get_label() and "2 seeds" in arm.get_label()
    assert (tmp_path / "a-0" / "compare.png").stat().st_size > 10_000


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input: one line that names it, exit status 2, nothing overwritten


def run_fails(capsys, *words, main=train.main) -> str:
    """The one line on stderr of a command that must exit with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ")
    return error[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch-size", 5], "patch_size 5 must divide the image size 32 x 32"),
        (["--mask-ratio", 0.999], "mask_ratio 0.999 leaves 0 of 64 patches visible"),
        (["--mask-ratio", 0], "mask_ratio 0.0 leaves 64 of 64"),
        (["--mask-ratio", 1.5], "1.5 is not between 0 and 1"),
        (["--data", "cifar11"], "cifar11 is neither shapes, cifar10"),
        (["--batch-size", 65], "--batch-size 65 is more than the 64 training images"),
        (["--epochs", 0], "0 is not between 1 and inf"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--lambda-start", 2], "2 is not between -1 and 1"),
        (["--lr", "nan"], "nan is not between 0 and inf"),
        (["--lr", "inf"], "inf is not between 0 and inf"),
        (["--image-size", "8x8x8"], "argument --image-size: invalid pixels value: '8x8x8'"),
        (["--model", "huge"], "'huge' (choose from"),
        (["--device", "tpu"], "--device tpu cannot be used"),
        (["--images", 10**11], "memory"),
        (["--out", "a\0b"], "null"),
        (["--resume", "nowhere"], "nowhere is no run"),
        (["--resume", ""], "is no run"),
        (["--evaluate", ""], "is no run"),
        (["--finetune", "nowhere"], "nowhere is no run"),
        (["--finetune", ""], "is no run"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options_are_named(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run_fails(capsys, *options(), *words)
    assert not list(tmp_path.rglob("*"))  # nothing was written


def test_a_poor_terminal_does_not_stop_a_command(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "ünïcode")
    command = f"{sys.executable} {ROOT}/train.py --resume ünïcode 2>&-"  # a closed stderr, no letters but ASCII
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    printed = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"figures in \\xfcn\\xefcode" in printed.stdout
    monkeypatch.setattr(sys, "stdout", None)  # closed
    with visualize.one_line_errors():
        print("to nowhere")


def test_wrong_folders_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, n in (("cut", 20), ("text", 20), ("mixed", 40), ("mixed/thumbs", 3), ("few", 5), ("lonely/val/cat", 3)):
        save_images(tmp_path / folder, n)
    for folder in ("split/train/cat", "split/test/dog", "locked/cat", "vehicles/bus", "vehicles/train"):
        save_images(tmp_path / folder, 3)
    save_images(tmp_path / "tiny", 20, size=(3, 9))
    cut, text = (next((tmp_path / folder).iterdir()) for folder in ("cut", "text"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    text.write_text("not an image")
    for folder in ("empty", "locked/dog", "float"):  # locked: what a folder that may not be read looks like
        (tmp_path / folder).mkdir()
    Image.new("F", (16, 16), 0.5).save(tmp_path / "float" / "a.tiff")
    for folder, message in {
        "empty": f"no images in {tmp_path / 'empty'}",
        "cut": str(cut),
        "text": str(text),
        "mixed": "40 images beside folders (thumbs)",
        "tiny": "only 3 pixels wide or high",
        "few": "5 images",
        "split": "different classes: ['cat', 'dog']",
        "lonely": "val has no train/ beside it",
        "vehicles": "has train/ without val/ or test/",
        "locked": "no valid file for the classes dog",
        "float": "32-bit values have no known range",
    }.items():
        assert message in run_fails(capsys, "--data", tmp_path / folder, "--batch-size", 8)
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_touched_unless_asked(run, tmp_path, capsys, no_figures):
    before = (run / "checkpoint.pt").read_bytes()
    assert f"{run} exists" in run_fails(capsys, *options("--out", run))
    assert (run / "checkpoint.pt").read_bytes() == before
    out = tmp_path / "run"
    out.mkdir()  # a folder without a checkpoint is free
    train.main(options("--out", out, "--epochs", 1))
    old = [out / "evaluation.json", out / "step.png"]  # of the run that is replaced
    for file in old:
        file.touch()
    train.main(options("--out", out, "--epochs", 1, "--seed", 5, "--overwrite"))
    assert weights(out)["options"]["seed"] == 5 and not any(file.exists() for file in old)


def test_a_resumed_run_keeps_its_options(run, capsys):
    assert f"--patch-size 8: {run} has 4" in run_fails(capsys, "--resume", run, "--patch-size", 8)
    assert f"--epochs 9: {run} has 2" in run_fails(capsys, "--resume", run, "--epochs", 9)


def test_a_run_is_not_resumed_or_evaluated_on_other_images(run, tmp_path, capsys):
    save_images(tmp_path / "other", 100, size=(32, 32))
    assert f"{tmp_path / 'other'} has changed" in run_fails(capsys, "--resume", run, "--data", tmp_path / "other")
    assert f"--image-size (16, 16): {run} has (32, 32)" in run_fails(capsys, "--evaluate", run, "--image-size", 16)
    assert f"--images 32: {run} has 64" in run_fails(capsys, "--evaluate", run, "--images", 32)  # held out: others
    assert "needs class labels" in run_fails(capsys, "--evaluate", run, "--data", tmp_path / "other")


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    file, whole, saved = tmp_path / "checkpoint.pt", (run / "checkpoint.pt").read_bytes(), weights(run)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of some weight
    some = {name: saved[name] for name in ("config", "model", "options")}
    for content, message in (
        (b"", "damaged or not a checkpoint"),
        (whole[:5000], "damaged or not a checkpoint"),
        (flipped, "damaged or not a checkpoint"),
        ({"weights": torch.zeros(3)}, "damaged or not a checkpoint"),
        (some, "it has no N, epoch, images, log"),
    ):
        torch.save(content, file) if isinstance(content, dict) else file.write_bytes(content)
        for main, *words in ((train.main, "--evaluate"), (train.main, "--resume"), (visualize.main,)):
            error = run_fails(capsys, *words, tmp_path, main=main)
            assert f"{file} is" in error and message in error


def test_a_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"options": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged"):
        clmae.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_failed_download_says_how_to_use_local_images(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    for name in ("CIFAR10", "Imagenette"):
        monkeypatch.setattr(torchvision.datasets, name, no_network)
        error = run_fails(capsys, *options("--data", name.lower(), "--data-dir", tmp_path))
        assert "no route to host" in error and "--data PATH" in error


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, capsys, monkeypatch, no_figures):
    train.main(options("--out", tmp_path, "--epochs", 1))
    evaluation, before = tmp_path / "evaluation.json", (tmp_path / "checkpoint.pt").read_bytes()
    evaluation.write_text("{}")

    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in run_fails(capsys, "--evaluate", tmp_path)
    assert evaluation.read_text() == "{}"
    error = run_fails(capsys, *options("--out", tmp_path / "new"))
    assert "No space left on device" in error and "still whole" not in error
    with pytest.raises(OSError, match="the earlier one is still whole"):
        train.replace(tmp_path / "checkpoint.pt", b"new")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys):
    error = run_fails(capsys, *options("--out", tmp_path / "run", "--lr", 1e30, "--warmup-epochs", 0))
    assert re.search(r"the loss became (nan|inf) in epoch 1, step \d of 2", error)
    last_step = options("--out", tmp_path / "last", "--lr", 1e30, "--warmup-epochs", 0, "--batch-size", 64)
    assert "no longer finite after the last step" in run_fails(capsys, *last_step)
    assert all(clmae.load(tmp_path / name)[1]["epoch"] == 0 for name in ("run", "last"))


def test_out_of_memory_names_the_batch_size(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(train, "measure", full)
    assert "--batch-size" in run_fails(capsys, *options("--out", tmp_path / "run"))


# ----------------------------------------------------------------------------------------------------------------------
# The README


def readme(language: str) -> list[str]:
    """The blocks of code of a language in README.md and assets/results.md."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "assets/results.md")]
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


def test_the_readmes_commands_run_on_a_tiny_budget(run, tmp_path, monkeypatch):
    commands = [line for block in readme("bash") for line in block.splitlines() if re.match(r"python \w+\.py", line)]
    assert len(commands) >= 15
    monkeypatch.chdir(tmp_path)
    for split, label in itertools.product(("train", "test"), range(3)):
        save_images(tmp_path / "cifar10" / split / str(label), 24, size=(32, 32))
    save_images(tmp_path / "path" / "to" / "photos", 80, size=(70, 50))
    shutil.copytree(run, tmp_path / "runs" / "shapes")  # the command of the README's Start made it
    draw = visualize.draw
    monkeypatch.setattr(train.benchmark, "__defaults__", (1,))  # repeats
    for command in dict.fromkeys(commands):
        script, *words = shlex.split(command, comments=True)[1:]
        words = [str(tmp_path / "cifar10") if w in ("cifar10", "imagenette") else w for w in words if w != "--compile"]
        if script == "train.py" and not {"--resume", "--evaluate", "--finetune"} & set(words):
            words += [*options("--overwrite", "--images", 40, "--holdout", 32, "--epochs", 1), "--model", "nano"]
        if "--benchmark" in words:
            words += ["--batch-size", "4", "--image-size", "32", "--patch-size", "8"]
        if "--finetune" in words:
            words += ["--epochs", "1", "--batch-size", "16"]
        monkeypatch.setattr(visualize, "draw", draw if script == "visualize.py" else lambda run: None)
        {"train.py": train.main, "visualize.py": visualize.main, "clmae.py": lambda words: clmae.tour()}[script](words)


def test_the_readmes_notebook_and_timm_lines_give_features(run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "shapes")
    monkeypatch.chdir(tmp_path)
    notebook, parity = (block for block in readme("python") if "features = " in block)
    exec(notebook, scope := {})
    model, record, x, features = (scope[name] for name in ("model", "record", "x", "features"))
    assert features.shape == (8, 96)
    data = train.load_data(train.argparse.Namespace(**record["options"]))
    images = data.train.float()
    assert torch.equal(record["images"], data.val[:8])
    torch.testing.assert_close(model.mean.flatten(), images.mean((0, 2, 3)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.std.flatten(), images.std((0, 2, 3)), rtol=1e-4, atol=1e-3)
    now = model(x, record["log"][-1]["lambda"]).scores
    torch.testing.assert_close(now, record["scores"][-1], rtol=1e-3, atol=1e-3)
    pytest.importorskip("timm")
    exec(parity, scope)
    torch.testing.assert_close(scope["vit"].forward_features(x), model.encode(x), rtol=1e-3, atol=1e-4)


def test_the_readmes_bare_loop_trains(tmp_path, monkeypatch):
    class Images:  # 32 x 32 images in place of the download
        def __init__(self, root, download):
            self.data = train.shapes(200, (32, 32), seed=1)[0].permute(0, 2, 3, 1).numpy()

    (loop,) = (block for block in readme("python") if "curriculum_factor" in block and "backward" in block)
    assert len(loop.splitlines()) <= 30
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Images)
    scope = {}
    torch.manual_seed(0)
    exec(re.sub(r"epochs = \d+", "epochs = 2", loop), scope)
    assert scope["output"].mae_loss.isfinite() and scope["lam"] == -1


def test_the_readmes_walk_is_what_clmae_prints(capsys):
    clmae.tour()
    printed = capsys.readouterr().out
    printed = printed[printed.index("1. One step") : printed.index("2. What")]
    (shown,) = (block for block in readme("text") if block.startswith("1. One step"))
    number = r"[-+]?\d+\.\d+"
    assert re.sub(number, "#", shown).split() == re.sub(number, "#", printed).split()
    numbers = [[float(n) for n in re.findall(number, text)] for text in (shown, printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011)  # the last digit depends on the machine

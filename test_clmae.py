"""What CL-MAE guarantees, and what its two scripts promise. `pytest` runs everything in a few minutes on two cores.

No test needs a network, a GPU or a data set: the images are generated.
"""

import itertools
import json
import math
import os
import platform
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
from clmae import CLMAE, Config, curriculum_factor, gumbel_top_k, mask_diversity, patchify, sincos_positions, unpatchify

ROOT = Path(__file__).parent
SMALL = {"dim": 32, "depth": 2, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "masker_dim": 16}


def small(**changes) -> Config:
    return Config(**{"image_size": (16, 16), **SMALL, **changes})


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
        assert (hard.sum(1) == k).all() and ((hard == 0) | (hard == 1)).all()
        assert torch.equal(hard, torch.zeros_like(hard).scatter(1, ids, 1.0))
        assert ((soft >= 0.5) >= (hard == 1)).all() and soft.isfinite().all()  # soft agrees with hard on the side
        assert ((soft <= 0.5) >= (hard == 0)).all()


def test_gumbel_top_k_with_the_same_generator_repeats_itself():
    scores = torch.randn(3, 8)
    assert torch.equal(
        gumbel_top_k(scores, 3, generator=generator(7))[1], gumbel_top_k(scores, 3, generator=generator(7))[1]
    )


@pytest.mark.parametrize("k", [0, 8, 9])
def test_gumbel_top_k_names_an_impossible_k(k):
    with pytest.raises(ValueError, match=f"k {k} "):
        gumbel_top_k(torch.zeros(2, 8), k)


# ----------------------------------------------------------------------------------------------------------------------
# The curriculum


def gradients(model: CLMAE, images: torch.Tensor, lam: float) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss at lambda, the gradient of the MAE and that of the masker, under the same noise every time."""
    model.zero_grad()
    loss = model(images, torch.tensor(lam), generator=generator()).loss
    loss.backward()
    mae = torch.cat([p.grad.flatten() for part in (model.encoder, model.decoder) for p in part.parameters()])
    return loss.item(), mae, torch.cat([p.grad.flatten() for p in model.masker.parameters()])


def test_lambda_scales_the_maskers_gradient_and_touches_nothing_else(model, images):
    loss, mae, masker = gradients(model, images, 1.0)
    assert masker.norm() > 1e-4
    for lam in (0.5, 0.0, -0.3, -1.0):
        loss_lam, mae_lam, masker_lam = gradients(model, images, lam)
        assert loss_lam == loss
        assert torch.equal(mae_lam, mae)
        torch.testing.assert_close(masker_lam, lam * masker, rtol=1e-4, atol=1e-7)


def test_a_masked_patch_is_charged_its_own_loss_against_its_images_mean(images):
    model, lam, tau = CLMAE(small(tau=0.5)), 0.3, 0.5
    output = model(images, lam, generator=generator())
    output.scores.retain_grad()
    output.loss.backward()
    _, _, soft = gumbel_top_k(output.scores.detach(), 4, tau, generator())
    mean = (output.patch_loss * output.mask).sum(1, keepdim=True) / 12
    expected = -lam * (output.patch_loss - mean).detach() / 12 / len(images) * soft * (1 - soft) / tau
    masked = output.mask == 1
    torch.testing.assert_close(output.scores.grad[masked], expected[masked], atol=1e-7, rtol=1e-4)


def test_the_masker_does_not_teach_the_patch_embedding(model, images):
    scores = model(images, 1.0).scores
    (scores * torch.randn_like(scores)).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.masker.parameters())


def test_a_gate_is_the_derivative_of_fading_a_key_out(images):
    """d loss / d keep at keep = 1 is the finite difference of attention weights times keep, renormalised."""
    torch.manual_seed(0)
    attention = clmae.Attention(8, 2).double()
    x, keep = torch.randn(1, 5, 8, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64, requires_grad=True)

    def by_hand(keep):
        q, k, v = attention.qkv(x).reshape(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2).softmax(-1) * keep[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True)
        return attention.proj((weights @ v).transpose(1, 2).reshape(1, 5, 8)).square().sum()

    (gate,) = torch.autograd.grad(attention(x, keep.log()).square().sum(), keep)
    for i in range(5):
        step = torch.zeros(1, 5, dtype=torch.float64)
        step[0, i] = 1e-6
        assert gate[0, i].item() == pytest.approx(((by_hand(1 + step) - by_hand(1 - step)) / 2e-6).item(), rel=1e-5)


def test_the_masker_learns_to_help_at_plus_one_and_to_oppose_at_minus_one():
    """Images of flat and noisy patches: noise cannot be guessed, so a partner shows it and an adversary hides it."""
    torch.manual_seed(0)
    model = CLMAE(small(image_size=(24, 24), norm_pix=False, kappa=2.0))
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
        figures, scores = train.hardness(model, held_out)
        assert sign * (figures["hardness"] - 1) > 0.1
        difference = scores[noisy == 1].mean() - scores[noisy == 0].mean()
        assert sign * difference < -1  # it is the noise that it shows or hides


def test_curriculum_factor_falls_linearly_and_is_exactly_zero_half_way():
    assert [curriculum_factor(p) for p in (0, 0.25, 0.5, 1)] == [1, 0.5, 0, -1]
    assert curriculum_factor(0.5, start=0.8, end=0.4) == pytest.approx(0.6)
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"progress {progress}"):
            curriculum_factor(progress)


def test_scores_have_mean_0_and_std_kappa(model, images):
    for kappa in (0.5, 2.0):
        scores = model(images, kappa=kappa).scores
        torch.testing.assert_close(scores.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.std(1, unbiased=False), torch.full((6,), kappa), atol=1e-3, rtol=0)


def test_at_kappa_0_learned_masks_are_random_masks(model, images):
    random = model(images, scores=torch.zeros(6, 16), generator=generator())
    neutral = model(images, kappa=0.0, generator=generator())
    assert torch.equal(neutral.mask, random.mask) and neutral.loss == random.loss
    assert not torch.equal(model(images, generator=generator()).mask, random.mask)


def test_mask_diversity_is_0_for_one_mask_and_near_1_for_unrelated_ones():
    one = torch.randn(1, 64)
    one = one - one.mean()
    assert mask_diversity(one.expand(100, -1)).item() == pytest.approx(0, abs=1e-6)
    other = torch.randn(100, 64, generator=generator())
    assert 0.97 < mask_diversity(other - other.mean(1, keepdim=True)).item() < 1


def test_the_diversity_loss_pushes_masks_apart(images):
    torch.manual_seed(0)
    model = CLMAE(small(diversity=1.0))
    optimizer = torch.optim.AdamW(model.masker.parameters(), lr=1e-3)
    before = mask_diversity(model(images).scores).item()
    for _ in range(30):
        model(images, 0.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mask_diversity(model(images).scores).item() > before + 0.02


# ----------------------------------------------------------------------------------------------------------------------
# The masked autoencoder


def plain_block(x: torch.Tensor, state: dict, prefix: str, heads: int) -> torch.Tensor:
    """A pre-norm transformer block with torch's own attention, from weights alone."""
    p = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    D = x.shape[-1]
    h = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-6).transpose(0, 1)
    h, _ = F.multi_head_attention_forward(
        h, h, h, D, heads, p["attn.qkv.weight"], p["attn.qkv.bias"], None, None, False, 0.0, p["attn.proj.weight"],
        p["attn.proj.bias"], need_weights=False,
    )  # fmt: skip
    x = x + h.transpose(0, 1)
    h = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-6)
    h = F.gelu(F.linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
    return x + F.linear(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"])


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
    expected = [plain_mae(model, image, mask) for image, mask in zip(images, out.mask, strict=True)]
    for pred, (expected_pred, _) in zip(out.pred, expected, strict=True):
        torch.testing.assert_close(pred, expected_pred, rtol=1e-4, atol=1e-5)
    assert out.loss.item() == pytest.approx(torch.stack([loss for _, loss in expected]).mean().item(), rel=1e-5)


def test_masked_pixels_never_reach_the_prediction(model, images):
    mask = model(images, generator=generator()).mask
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, (4, 4))
    changed = images + 100 * hidden
    torch.testing.assert_close(model(changed, mask=mask).pred, model(images, mask=mask).pred)
    assert not torch.allclose(model(images + 1 - hidden, mask=mask).pred, model(images, mask=mask).pred)


def test_a_mask_and_scores_can_be_passed_in(model, images):
    mask = torch.ones(6, 16)
    mask[:, [0, 5, 7]] = 0
    assert torch.equal(model(images, mask=mask).mask, mask)
    scores = 1e3 * (1 - mask)
    assert ((model(images, scores=scores).mask == 0).sum(1) == 4).all()
    assert (model(images, scores=scores).mask[:, [0, 5, 7]] == 0).all()
    for wrong in (
        torch.ones(6, 16),
        torch.zeros(6, 16),
        torch.full((6, 16), 0.5),
        (torch.arange(96) % 5 > 0).reshape(6, 16),
    ):
        with pytest.raises(ValueError, match="mask must be 0 or 1 and leave the same number"):
            model(images, mask=wrong)
    for name in ("scores", "mask"):
        with pytest.raises(ValueError, match=rf"{name} \(1, 16\) must be \(B, L\) = \(6, 16\)"):
            model(images, **{name: torch.ones(1, 16)})
    for step in (model, model.encode):
        with pytest.raises(ValueError, match=r"images \(2, 3, 8, 32\) must be \(B, 3, 16, 16\)"):
            step(torch.zeros(2, 3, 8, 32))


def test_the_same_seed_gives_the_same_result(images):
    def run():
        torch.manual_seed(3)
        return CLMAE(small())(images, 1.0).loss.item()

    assert run() == run()


def test_half_precision_keeps_scores_and_loss_in_float32(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, torch.tensor(1.0), generator=generator())
    assert out.scores.dtype == out.loss.dtype == out.patch_loss.dtype == torch.float32
    out.loss.backward()
    assert out.loss.item() == pytest.approx(model(images, 1.0, mask=out.mask).loss.item(), rel=0.02)


@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_step_equals_a_plain_one_and_is_not_compiled_again_for_another_lambda(model, images):
    """One graph without breaks, the same noise, so the same masks, losses and gradients within float32's rounding."""
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(model, fullgraph=True)
        for lam in (1.0, 0.25, -1.0):
            with torch.compiler.set_stance("default" if lam == 1 else "fail_on_recompile"):
                results = []
                for step in (compiled, model):
                    torch.manual_seed(0)
                    model.zero_grad()
                    out = step(images, torch.tensor(lam), torch.tensor(2 * abs(lam)))
                    out.loss.backward()
                    results.append((out, [p.grad.clone() for p in model.parameters()]))
            (out, grads), (plain, plain_grads) = results
            assert torch.equal(out.mask, plain.mask)
            torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grads, plain_grads, rtol=1e-3, atol=1e-5)


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
    with pytest.raises(ValueError, match="patch_size 4 must divide the image size 4 x 6"):
        patchify(images, 4)
    with pytest.raises(ValueError, match="grid of 2 x 2"):
        unpatchify(torch.zeros(1, 6, 8), 2, (2, 2))


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
    block = [
        f"{m}.{w}"
        for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for w in ("weight", "bias")
    ]
    ends = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias", "cls_token", "pos_embed"]
    assert sorted(state) == sorted([f"blocks.0.{name}" for name in block] + ends)
    assert state["pos_embed"].shape == (1, 17, 32) and state["cls_token"].shape == (1, 1, 32)


def test_features_equal_those_of_timms_vision_transformer(model, images):
    timm = pytest.importorskip("timm")
    vit = timm.models.vision_transformer.VisionTransformer(16, 4, num_classes=0, embed_dim=32, depth=2, num_heads=2)
    vit.load_state_dict(model.encoder.state_dict(), strict=True)
    torch.testing.assert_close(vit.eval().forward_features(images), model.encode(images), rtol=1e-4, atol=1e-5)


def test_features_equal_those_of_torchvisions_vision_transformer(model, images):
    vit = torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 128)
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    state = {}
    for name, value in model.encoder.state_dict().items():
        name = name.replace("norm.", "encoder.ln.") if name.startswith("norm.") else name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = value
    vit.load_state_dict(state | {k: v for k, v in vit.state_dict().items() if k.startswith("heads")}, strict=True)
    tokens = vit._process_input(images)
    tokens = torch.cat([vit.class_token.expand(6, -1, -1), tokens], dim=1)
    torch.testing.assert_close(vit.eval().encoder(tokens), model.encode(images), rtol=1e-4, atol=1e-5)


def test_encode_never_masks_and_repeats_itself(model, images):
    z = model.encode(images)
    assert z.shape == (6, 17, 32) and torch.equal(z, model.encode(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 must divide the image size 16 x 16"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 leaves 0 of 16"),
        ({"mask_ratio": 0.01}, "mask_ratio 0.01 leaves 16 of 16"),
        ({"heads": 3}, "dim 32 must be a multiple of 4 and of heads 3"),
        ({"masker_dim": 6}, "masker_dim 6"),
        ({"tau": 0.0}, "tau 0.0 > 0"),
        ({"patch_size": 1, "channels": 1}, "norm_pix needs more than 1 value in a patch"),
    ],
)
def test_config_names_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**change)


# ----------------------------------------------------------------------------------------------------------------------
# Data and evaluation


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


def options(*words) -> list[str]:
    """A command line of train.py for a run of seconds."""
    return [str(w) for w in ("--epochs", 2, "--batch-size", 32, "--images", 64, "--device", "cpu", *words)]


def run_fails(capsys, *words) -> str:
    """The one line on stderr of a command that must exit with status 2."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(w) for w in words])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ")
    return error[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of train.py, with its figures."""
    path = tmp_path_factory.mktemp("runs") / "shapes"
    train.main(options("--out", path, "--knn-every", 1))
    return path


def test_shapes_are_reproducible_and_of_ten_classes():
    images, labels = train.shapes(300, (32, 48), seed=5)
    assert images.shape == (300, 3, 32, 48) and images.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(10)) and images.float().std() > 30
    again, _ = train.shapes(300, (32, 48), seed=5)
    other, _ = train.shapes(300, (32, 48), seed=6)
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_statistics_are_the_mean_and_std_of_each_colour():
    images, _ = train.shapes(50, (16, 16), seed=1)
    mean, std = train.statistics(images)
    torch.testing.assert_close(mean.flatten(), images.float().mean((0, 2, 3)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(std.flatten(), images.float().std((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-3)
    standard = train.standardise(images, mean, std)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


def test_augment_crops_inside_the_image_and_flips_half_of_them():
    H, W, n = 12, 20, 2000
    ramp = torch.arange(W).expand(3, H, W) * 10 + torch.arange(H)[:, None]  # tells every pixel's column and row
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    whole = train.augment(ramp.to(torch.uint8).expand(n, -1, -1, -1), zero, one, min_crop=1.0)
    flipped = whole[:, 0, 0, 0] > whole[:, 0, 0, -1]
    assert 0.45 < flipped.float().mean() < 0.55
    upright = torch.where(flipped[:, None, None, None], whole.flip(3), whole)
    torch.testing.assert_close(upright, ramp.float().expand(n, -1, -1, -1), atol=1e-2, rtol=0)  # 1: no crop
    crops = train.augment(ramp.to(torch.uint8).expand(n, -1, -1, -1), zero, one, min_crop=0.2)
    assert crops.min() >= 0 and crops.max() <= ramp.max()  # nothing from beyond the border
    width = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]).abs() / 10 / (W - 1)
    height = (crops[:, 0, -1, 0] - crops[:, 0, 0, 0]) / (H - 1)
    area = width * height
    assert 0.15 < area.min() < 0.3 and area.max() > 0.9 and 0.5 < area.mean() < 0.7
    inner = crops[:, 0, 0, 1:] - crops[:, 0, 0, :-1]
    torch.testing.assert_close(inner, inner[:, :1].expand_as(inner), atol=1e-2, rtol=0)  # evenly spaced: no distortion


def test_knn_accuracy_equals_a_loop_over_images():
    z, labels = torch.randn(90, 5, generator=generator()), torch.arange(90) % 3
    z = z + 1.5 * F.one_hot(labels, 5)
    bank, bank_labels, query, query_labels = z[:60], labels[:60], z[60:], labels[60:]
    mean, std, right = bank.mean(0), bank.std(0), 0
    for q, label in zip(query, query_labels, strict=True):
        cosine = [F.cosine_similarity((q - mean) / std, (b - mean) / std, dim=0).item() for b in bank]
        votes = [0.0, 0.0, 0.0]
        for i in sorted(range(60), key=lambda i: -cosine[i])[:20]:
            votes[bank_labels[i]] += math.exp(cosine[i] / 0.07)
        right += votes.index(max(votes)) == label
    assert 50 < 100 * right / 30 < 100
    assert train.knn_accuracy(bank, bank_labels, query, query_labels) == pytest.approx(100 * right / 30)


def test_the_linear_probe_finds_what_is_linear_and_nothing_else():
    z = torch.randn(600, 8, generator=generator())
    linear, unrelated = (z[:, 0] + z[:, 1] > 0).long(), torch.randint(0, 2, (600,), generator=generator(1))
    assert train.linear_probe(z[:400], linear[:400], z[400:], linear[400:]) > 95
    assert train.linear_probe(z[:400], unrelated[:400], z[400:], unrelated[400:]) < 65


def test_hardness_is_the_ratio_of_two_reconstruction_losses(images):
    """1 for masks that are random; with a diversity loss, which only one of the passes has, still the ratio."""
    torch.manual_seed(0)
    figures, scores = train.hardness(CLMAE(small(kappa=0.0)), images)
    assert figures["hardness"] == 1 and figures["diversity"] is None and (scores == 0).all()
    model = CLMAE(small(diversity=1.0))
    assert train.hardness(model, images, kappa=0.0)[0]["hardness"] == 1
    figures, scores = train.hardness(model, images, kappa=3.0)
    learned = model(images, scores=scores, generator=generator())
    random = model(images, scores=torch.zeros(6, 16), generator=generator())
    assert figures["loss_random"] == pytest.approx(random.loss.item(), rel=1e-6)
    assert figures["hardness"] == pytest.approx((learned.loss / random.loss).item(), rel=1e-5)
    assert not torch.equal(learned.mask, random.mask)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    assert [train.lr_factor(e, 10, 2) for e in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_folder_of_any_images_becomes_one_tensor(tmp_path):
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA"):
        save_images(tmp_path / "mixed", 2, mode, (40, 24))
    save_images(tmp_path / "mixed", 20, "RGB", (19, 33))
    args = train.build_parser().parse_args(["--data", str(tmp_path / "mixed"), "--image-size", "16", "24"])
    data = train.load_data(args)
    assert data.train.shape == (31, 3, 16, 24) and data.val.shape == (3, 3, 16, 24) and data.classes == []
    assert data.train.float().flatten(1).std(1).min() > 5  # none is blank


def test_sixteen_bit_pictures_keep_their_shades(tmp_path):
    ramp = (torch.arange(16) * 4096).expand(16, 16).to(torch.int32).numpy()
    Image.fromarray(ramp.astype("uint16")).save(tmp_path / "deep.png")
    assert (train.read_image(tmp_path / "deep.png", (16, 16))[0, 0].int() - torch.arange(16) * 16).abs().max() <= 1


def test_photographs_stand_upright(tmp_path):
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))  # blue above red
    exif = image.getexif()
    exif[0x0112] = 3  # turned by half a turn
    image.save(tmp_path / "turned.png", exif=exif)
    assert train.read_image(tmp_path / "turned.png", (16, 16))[:, 2, 8].tolist() == [255, 0, 0]


def test_a_picture_keeps_its_orientation_and_middle(tmp_path):
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    image.save(tmp_path / "wide.png")
    assert (train.read_image(tmp_path / "wide.png", (10, 10))[:, 5, 5] == torch.tensor([0, 0, 255])).all()
    assert train.read_image(tmp_path / "wide.png", (10, 30))[:, 5, 5].tolist() == [255, 0, 0]


def test_class_folders_with_and_without_a_held_out_split(tmp_path):
    parse = train.build_parser().parse_args
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save_images(tmp_path / split / name, 10)
    data = train.load_data(parse(["--data", str(tmp_path)]))
    assert data.classes == ["cat", "dog"] and len(data.train) == len(data.val) == 20
    assert data.train_labels.bincount().tolist() == data.val_labels.bincount().tolist() == [10, 10]
    assert data.val_labels[:8].unique().tolist() == [0, 1]  # shuffled: the figures show the first eight
    assert data.train.shape[2:] == (16, 16)  # as the files are
    data = train.load_data(parse(["--data", str(tmp_path), "--images", "12", "--holdout", "3"]))
    assert len(data.train) == 12 and len(data.val) == 3  # the images trained on are the same with and without
    assert data.train.equal(train.load_data(parse(["--data", str(tmp_path), "--images", "12"])).train)
    data = train.load_data(parse(["--data", str(tmp_path / "train"), "--images", "10"]))
    assert len(data.train) == 9 and len(data.val) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(visualize, "draw", lambda run: None)


def weights(path: Path) -> dict:
    return torch.load(path / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_a_log_a_checkpoint_and_pictures(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1, 2]
    names = {
        "epoch",
        "lambda",
        "loss",
        "loss_trivial",
        "loss_random",
        "hardness",
        "diversity",
        "knn",
        "lr",
        "images_per_s",
    }
    assert all(set(r) == names for r in records)
    assert records[0]["lambda"] == 1 and records[0]["loss"] is None and records[2]["lambda"] == -1
    checkpoint = weights(run)
    assert checkpoint["log"] == records and len(checkpoint["history"]) == 3
    for record, scores in zip(records, checkpoint["history"], strict=True):  # masks are as strong as lambda
        assert scores.std(1, unbiased=False).mean().item() == pytest.approx(2 * abs(record["lambda"]), rel=1e-2)
    assert checkpoint["images"].shape == (8, 3, 32, 32)
    for name in ("masks.png", "masks.gif", "reconstructions.png", "curves.png"):
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


@pytest.mark.parametrize("masking", ["curriculum", "random"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(masking, tmp_path, monkeypatch, no_figures):
    command = options("--masking", masking, "--epochs", 3)
    train.main([*command, "--out", str(tmp_path / "whole")])

    def interrupted(checkpoint, path, save=train.save):
        save(checkpoint, path)
        if checkpoint["epoch"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save", interrupted)
        train.main([*command, "--out", str(tmp_path / "broken")])
    train.main(["--resume", str(tmp_path / "broken")])
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    assert torch.equal(whole["rng"], resumed["rng"])
    for a, b in zip(whole["log"], resumed["log"], strict=True):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}
    assert (tmp_path / "broken" / "log.jsonl").read_text().count("\n") == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows has another Ctrl-C")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *options("--out", out, "--epochs", 500)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.time() + 120
    while not (out / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f"python train.py --resume {out}" in error and "Traceback" not in error
    assert train.load_run(out)[1]["epoch"] >= 0


def test_the_three_evaluations_print_a_floor_and_keep_their_results(run, capsys):
    for mode, extra in (
        ("knn", ["--image-size", "32"]),
        ("linear-probe", []),
        ("finetune", ["--epochs", "1", "--batch-size", "32"]),
    ):
        train.main([f"--{mode}", str(run), "--device", "cpu", *extra])
        printed = capsys.readouterr().out
        result = json.loads((run / "evaluation.json").read_text())[mode]
        for name in ("pretrained", "random_init"):
            assert f"{name} encoder: {result[name]:.2f} %" in printed and 0 <= result[name] <= 100
    assert set(json.loads((run / "evaluation.json").read_text())) == {"knn", "linear-probe", "finetune"}


def test_fine_tuning_learns():
    torch.manual_seed(0)
    images, labels = torch.zeros(256, 3, 16, 16, dtype=torch.uint8), torch.arange(256) % 2
    images[labels == 1, :, ::2] = 255
    data = train.Data(images, labels, images[:64], labels[:64], ["plain", "striped"])
    args = train.build_parser().parse_args(["--epochs", "4", "--batch-size", "32", "--lr", "1e-2"])
    assert train.finetune(CLMAE(small()), data, *train.statistics(images), args) == 100


def test_mask_probability_is_the_chance_of_being_masked():
    scores = torch.tensor([[1.5, 0.3, 0.0, -0.7, -2.0]])
    exact = 1 - inclusion_probabilities(scores[0].tolist(), 2)
    torch.testing.assert_close(visualize.mask_probability(scores, 2)[0], exact.float(), atol=0.06, rtol=0)


def test_curves_show_the_losses_whatever_their_size(tmp_path, monkeypatch):
    # With --no-norm-pix a healthy loss stays above that of the patch means.
    keys = {"lambda": 0.0, "hardness": 1.0, "loss_trivial": 0.25, "knn": None}
    losses = [{"loss": None, "loss_random": 9.0}, {"loss": 0.8, "loss_random": 0.7}, {"loss": 0.5, "loss_random": 0.4}]
    monkeypatch.setattr(visualize.plt, "close", lambda figure: None)
    visualize.draw_curves({"log": [{"epoch": i, **keys, **loss} for i, loss in enumerate(losses)]}, tmp_path / "c.png")
    top = visualize.plt.gcf().axes[2].get_ylim()[1]
    monkeypatch.undo()
    visualize.plt.close("all")
    assert 0.8 < top < 1


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="memory is kept with glibc only")
def test_freed_memory_is_kept_for_the_next_step():
    import resource  # Windows has none

    train.pick_device("cpu")
    for repeat in range(20):
        if repeat == 10:  # by then the heap has room: an aligned block does not always fit where the last one was
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults * resource.getpagesize() < 2 * 2**26, f"{faults} page faults in 10 blocks of 64 MB"


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input: one line that names it, exit status 2, nothing overwritten


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch-size", 5], "patch_size 5 must divide the image size 32 x 32"),
        (["--mask-ratio", 0.999], "mask_ratio 0.999 leaves 0 of 64 patches visible"),
        (["--mask-ratio", 0], "mask_ratio 0.0 leaves 64 of 64"),
        (["--mask-ratio", 1.5], "1.5 is not between 0 and 1"),
        (["--data", "cifar11"], "cifar11 is neither shapes, cifar10, cifar100 nor a folder"),
        (["--batch-size", 65], "--batch-size 65 is more than the 64 training images"),
        (["--epochs", 0], "0 is not between 1 and inf"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--lambda-start", 2], "2 is not between -1 and 1"),
        (["--lr", "nan"], "nan is not between 0 and inf"),
        (["--image-size", 8, 8, 8], "--image-size 8 8 8: one or two numbers"),
        (["--model", "huge"], "'huge' (choose from"),
        (["--device", "tpu"], "--device tpu cannot be used"),
        (["--images", 10**11], "this machine has"),
        (["--data", "cifar10", "--image-size", 64], "--image-size 64 64: the images of cifar10 have 32 x 32"),
        (["--resume", "nowhere"], "nowhere is no run"),
        (["--finetune", "nowhere"], "nowhere is no run"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options_are_named(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run_fails(capsys, *options(), *words)
    assert not list(tmp_path.rglob("*"))  # nothing was written


def test_wrong_folders_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert f"no images in {tmp_path / 'empty'}" in run_fails(capsys, *options("--data", tmp_path / "empty"))
    good = save_images(tmp_path / "photos", 40)
    whole = good[7].read_bytes()
    good[7].write_bytes(whole[: len(whole) // 2])
    assert str(good[7]) in run_fails(capsys, *options("--data", tmp_path / "photos", "--batch-size", 8))
    good[7].write_text("not an image")
    assert str(good[7]) in run_fails(capsys, *options("--data", tmp_path / "photos", "--batch-size", 8))
    save_images(tmp_path / "photos" / "thumbs", 3)
    assert "40 images beside folders of images (thumbs)" in run_fails(capsys, *options("--data", tmp_path / "photos"))
    save_images(tmp_path / "tiny", 20, size=(3, 9))
    assert "only 3 pixels wide or high" in run_fails(capsys, *options("--data", tmp_path / "tiny"))
    save_images(tmp_path / "few", 5)
    assert "5 images" in run_fails(capsys, *options("--data", tmp_path / "few"))
    save_images(tmp_path / "split" / "train" / "cat", 3)
    save_images(tmp_path / "split" / "test" / "dog", 3)
    assert "different classes: ['cat', 'dog']" in run_fails(capsys, *options("--data", tmp_path / "split"))
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_touched_unless_asked(run, tmp_path, capsys, no_figures):
    before = (run / "checkpoint.pt").read_bytes()
    assert f"{run} exists" in run_fails(capsys, *options("--out", run))
    assert (run / "checkpoint.pt").read_bytes() == before
    out = tmp_path / "run"
    train.main(options("--out", out, "--epochs", 1))
    train.main(options("--out", out, "--epochs", 1, "--seed", 5, "--overwrite"))
    assert weights(out)["args"]["seed"] == 5


def test_a_resumed_run_keeps_its_options(run, capsys):
    assert f"--patch-size 8: {run} has None" in run_fails(capsys, "--resume", run, "--patch-size", 8)
    assert f"--epochs 9: {run} has 2" in run_fails(capsys, "--resume", run, "--epochs", 9)


def test_a_run_is_not_resumed_or_evaluated_on_other_images(run, tmp_path, capsys):
    save_images(tmp_path / "other", 40, size=(32, 32))
    assert f"{tmp_path / 'other'} has changed" in run_fails(capsys, "--resume", run, "--data", tmp_path / "other")
    assert f"--image-size 16: {run} was trained on 32 x 32 pixels" in run_fails(
        capsys, "--knn", run, "--image-size", 16
    )
    assert "--knn needs class labels" in run_fails(capsys, "--knn", run, "--data", tmp_path / "other")


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    file.touch()
    assert f"{file} is damaged" in run_fails(capsys, "--knn", tmp_path)
    file.write_bytes((run / "checkpoint.pt").read_bytes()[:5000])
    assert f"{file} is damaged" in run_fails(capsys, "--resume", tmp_path)
    torch.save({"weights": torch.zeros(3)}, file)
    assert f"{file} is damaged or not a checkpoint" in run_fails(capsys, "--knn", tmp_path)
    torch.save({name: weights(run)[name] for name in ("config", "model", "args")}, file)
    assert "it has no N, epoch, history" in run_fails(capsys, "--resume", tmp_path)
    with pytest.raises(SystemExit):
        visualize.draw(tmp_path)


def test_a_failed_download_says_how_to_use_local_images(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    error = run_fails(capsys, *options("--data", "cifar10", "--data-dir", tmp_path))
    assert "no route to host" in error and "--data PATH" in error


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    train.save({"epoch": 1}, tmp_path)

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        train.save({"epoch": 2}, tmp_path)
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert weights(tmp_path) == {"epoch": 1} and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys):
    error = run_fails(capsys, *options("--out", tmp_path / "run", "--lr", 1e30, "--warmup-epochs", 0))
    assert re.search(r"the loss became (nan|inf) in epoch 1, step \d of 2", error)
    last_step = options("--out", tmp_path / "last", "--lr", 1e30, "--warmup-epochs", 0, "--batch-size", 64)
    assert "no longer finite after the last step of epoch 1" in run_fails(capsys, *last_step)
    assert all(train.load_run(tmp_path / name)[1]["epoch"] == 0 for name in ("run", "last"))


# ----------------------------------------------------------------------------------------------------------------------
# The README


def readme_commands() -> list[str]:
    """Every line of the README's shell blocks that runs one of the scripts."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line.split("#")[0].strip() for b in blocks for line in b.splitlines() if re.match(r"python \w+\.py", line)]


def test_the_readmes_commands_run_on_a_tiny_budget(tmp_path, monkeypatch):
    commands = readme_commands()
    assert len(commands) >= 8
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for label in range(3):
            save_images(tmp_path / "cifar10" / split / str(label), 24, size=(32, 32))
    save_images(tmp_path / "path" / "to" / "photos", 40, size=(70, 50))
    for command in commands:
        script, *words = shlex.split(command)[1:]
        words = [str(tmp_path / "cifar10") if w == "cifar10" else w for w in words if w != "--compile"]
        evaluation = {"--knn", "--linear-probe", "--finetune"} & set(words)
        if script == "train.py" and "--resume" not in words and not evaluation:
            words += options("--overwrite", "--images", 40)
        if "--benchmark" in words:
            words += ["--batch-size", "4"]
        if "--finetune" in words:
            words += ["--epochs", "1", "--batch-size", "16"]
        {"train.py": lambda w: train.main(w), "visualize.py": lambda w: visualize.main(w),
         "clmae.py": lambda w: clmae.tour()}[script](words)  # fmt: skip


def test_the_readmes_walk_is_what_clmae_prints(capsys):
    clmae.tour()
    printed = capsys.readouterr().out
    printed = printed[printed.index("2. The same step") :]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(2\. The same step.*?)```", readme, re.DOTALL)[1]
    number = r"[-+]?\d+\.\d+"
    assert re.sub(number, "#", shown).split() == re.sub(number, "#", printed).split()
    numbers = [[float(n) for n in re.findall(number, text)] for text in (shown, printed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011)  # the last digit depends on the machine

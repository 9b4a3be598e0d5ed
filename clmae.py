"""CL-MAE (Curriculum-Learned Masked Autoencoders, arXiv 2308.16572) in one file. Read it from top to bottom.

A masked autoencoder (MAE) sees a few patches of an image and predicts the rest. In CL-MAE a small network, the masker,
chooses which patches are hidden. It is trained on the MAE's own reconstruction loss times a factor lambda that falls
from +1 (partner: hide what is easy to fill in) through 0 to -1 (adversary: hide what is hard), a curriculum of masks.

    images -> PatchEmbed -> x -> Encoder(visible tokens of x) -> Decoder(+ mask tokens) -> pixels -> loss
                            |                 ^
                            +-> Masker -> scores -> gumbel_top_k

Symbols: B images, C channels, L patches (tokens), K visible ones, r = 1 - K/L mask ratio, D encoder width,
s scores (high = keep visible), y = s + Gumbel noise, keep = 1 visible / 0 masked, mask = 1 - keep.
MAE is He et al., CVPR 2022. `python clmae.py` walks one batch through every stage.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    """Everything that shapes the model and its loss. Widths are in features, image sizes in pixels."""

    image_size: tuple[int, int] = (32, 32)  # (height, width), pixels
    patch_size: int = 4  # side of a square patch, pixels; divides both image sides
    channels: int = 3  # image channels
    dim: int = 192  # encoder width D, features; a multiple of 4 (positions) and of `heads`
    depth: int = 12  # encoder blocks
    heads: int = 3  # encoder attention heads
    decoder_dim: int = 64  # decoder width, features
    decoder_depth: int = 2  # decoder blocks
    decoder_heads: int = 2  # decoder attention heads
    masker_dim: int = 64  # masker width, features
    masker_depth: int = 1  # masker blocks
    masker_heads: int = 2  # masker attention heads
    mask_ratio: float = 0.75  # r, fraction of the patches that is hidden; K = round(L (1 - r))
    kappa: float = 2.0  # std of the masker's scores, against 1.28 of the Gumbel noise. 0: no masker, plain MAE
    tau: float = 1.0  # temperature of the straight-through sigmoid, in units of the scores
    diversity: float = 0.0  # weight of the loss against one mask for all images
    norm_pix: bool = True  # predict patches standardised each by itself instead of pixels

    def __post_init__(self):
        self.image_size = tuple(self.image_size)
        for side in self.image_size:
            if self.patch_size < 1 or side < 1 or side % self.patch_size:
                height, width = self.image_size
                raise ValueError(f"patch_size {self.patch_size} must divide the image size {height} x {width}")
        if not 1 <= self.visible <= self.patches - 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves {self.visible} of {self.patches} patches visible; "
                f"at least 1 must be visible and 1 masked"
            )
        for part in ("", "decoder_", "masker_"):
            dim, heads = getattr(self, f"{part}dim"), getattr(self, f"{part}heads")
            if heads < 1 or dim < 1 or dim % heads or dim % 4:
                raise ValueError(f"{part}dim {dim} must be a multiple of 4 and of {part}heads {heads}")
        if self.norm_pix and self.patch_size**2 * self.channels < 2:
            raise ValueError(
                "norm_pix needs more than 1 value in a patch: patch_size 1 with channels 1 has no variance"
            )
        if self.kappa < 0 or self.tau <= 0 or self.diversity < 0:
            raise ValueError(f"kappa {self.kappa} and diversity {self.diversity} must be >= 0, tau {self.tau} > 0")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        """K."""
        return round(self.patches * (1 - self.mask_ratio))


# ----------------------------------------------------------------------------------------------------------------------
# Images to patches and back


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into flattened patches (B, L, p*p*C), row by row, pixels as (p, p, channel) as in MAE."""
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"patch_size {p} must divide the image size {H} x {W}")
    x = images.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, L, p*p*C) on a grid of (rows, columns) together to images (B, C, H, W); undoes `patchify`."""
    (h, w), p = grid, patch_size
    if patches.shape[1] != h * w or patches.shape[2] % (p * p):
        raise ValueError(f"patches {tuple(patches.shape)} do not fit a grid of {h} x {w} patches of {p} x {p} pixels")
    x = patches.reshape(len(patches), h, w, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return x.reshape(len(patches), -1, h * p, w * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, L, 1) each of the values of every patch (B, L, n); the std is above 0."""
    mean = patches.mean(-1, keepdim=True)
    variance = (patches - mean).square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)  # var() is 5 x slower on a CPU
    return mean, (variance + 1e-6).sqrt()


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, 1+L, dim); the CLS row, first, is zero. MAE, appendix A.1.

    The first half of the features encodes the column, the second the row, each as [sin, cos] of dim/4 frequencies.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")  # (h, w) each
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim/4,)
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # 2 x (L, dim/4)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # (L, dim)
    return F.pad(table, (0, 0, 1, 0))[None].float()  # (1, 1+L, dim)


class PatchEmbed(nn.Module):
    """Project every patch to a token: images (B, C, H, W) -> (B, L, dim). ViT, eq. 1."""

    def __init__(self, patch_size: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, dim, h, w) -> (B, L, dim)


# ----------------------------------------------------------------------------------------------------------------------
# Transformer. The names of the parts are timm's, so that trained weights move without renaming.


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), in which a token can be faded out as a key.

    `log_keep` (B, N) is added to the logits: softmax(q k / sqrt(d) + log keep) are the weights softmax(q k / sqrt(d))
    multiplied by keep of the key's token and renormalised. It is written out so that the gate is in sight; the fused
    scaled_dot_product_attention takes it as attn_mask, and on a CPU, at these lengths, is no faster.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, log_keep: Tensor | None = None) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
        if log_keep is not None:
            logits = logits + log_keep[:, None, None, :]
        out = logits.softmax(-1).to(v.dtype) @ v  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with GELU between, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, log_keep: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), log_keep)
        return x + self.mlp(self.norm2(x))


# ----------------------------------------------------------------------------------------------------------------------
# The masked autoencoder


class Encoder(nn.Module):
    """ViT over the visible tokens only. MAE, Sec. 3. `state_dict()` loads into a timm VisionTransformer as it is."""

    def __init__(self, c: Config):
        super().__init__()
        self.size = (c.channels, *c.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.register_buffer("pos_embed", sincos_positions(c.grid, c.dim))  # (1, 1+L, D)
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens with their positions, x (B, L, D)."""
        if images.shape[1:] != self.size:
            C, H, W = self.size
            raise ValueError(f"images {tuple(images.shape)} must be (B, {C}, {H}, {W})")
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, K, D), gated by keep (B, K) where it is given, to normalised features (B, 1+K, D), CLS first."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1+K, D)
        log_keep = None if keep is None else F.pad(keep.log(), (1, 0))  # (B, 1+K); CLS is always kept, log 1 = 0
        for block in self.blocks:
            x = block(x, log_keep)
        return self.norm(x)


class Decoder(nn.Module):
    """A light ViT that fills in the masked patches. MAE, Sec. 3."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.register_buffer("pos_embed", sincos_positions(c.grid, c.decoder_dim))  # (1, 1+L, Dd)
        self.blocks = nn.ModuleList(Block(c.decoder_dim, c.decoder_heads) for _ in range(c.decoder_depth))
        self.norm = nn.LayerNorm(c.decoder_dim, eps=1e-6)
        self.pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.channels)

    def forward(self, z: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features (B, 1+K, D) of the visible patches ids (B, K), gated by keep (B, K), to `target`s (B, L, p*p*C)."""
        z = self.embed(z)  # (B, 1+K, Dd)
        cls, z = z[:, :1], z[:, 1:]
        mask_token = self.mask_token.to(z.dtype)
        if keep is not None:  # a token that fades out turns into a mask token
            gate = keep[..., None].to(z.dtype)  # (B, K, 1)
            z = gate * z + (1 - gate) * mask_token
        x = mask_token.expand(len(z), self.pos_embed.shape[1] - 1, -1)  # (B, L, Dd)
        x = x.scatter(1, ids[..., None].expand_as(z), z)  # visible features at their places
        x = torch.cat([cls, x], dim=1) + self.pos_embed  # (B, 1+L, Dd)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))


# ----------------------------------------------------------------------------------------------------------------------
# What CL-MAE adds: a masker, a way to sample its masks, a factor that turns it from partner to adversary


class Masker(nn.Module):
    """Look at all tokens x (B, L, D) and give each a score (B, L), high = keep visible. CL-MAE, Sec. 3.

    The scores of each image have mean 0 and std 1; the forward pass multiplies them by kappa, which says how far masks
    may depart from random ones. Left free they would grow until the noise of `gumbel_top_k` drowns and masks freeze.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Linear(c.dim, c.masker_dim)
        self.blocks = nn.ModuleList(Block(c.masker_dim, c.masker_heads) for _ in range(c.masker_depth))
        self.norm = nn.LayerNorm(c.masker_dim, eps=1e-6)
        self.score = nn.Linear(c.masker_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)  # (B, L, Dm)
        for block in self.blocks:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):  # float32: bfloat16 would round scores into ties
            scores = self.score(self.norm(x.float())).squeeze(-1)  # (B, L)
        scores = scores - scores.mean(1, keepdim=True)
        return scores / (scores.square().mean(1, keepdim=True) + 1e-6).sqrt()


def gumbel_top_k(
    scores: Tensor, k: int, tau: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample k of L tokens without replacement: each draw takes i, of those left, with probability e^s_i / their sum.

    Adding Gumbel(0, 1) noise and taking the k largest is an exact sample of that Plackett-Luce distribution
    (Yellott 1977; Vieira 2014; Kool et al., ICML 2019).

    scores: s, (B, L). tau: temperature of the relaxation, in units of the scores.
    Returns ids (B, k) of the sampled tokens; hard (B, L), 1 for them and 0 for the others; soft (B, L) in [0, 1], its
    differentiable stand-in: how far y = scores + noise lies above the threshold between in and out.
    """
    if not 1 <= k < scores.shape[1]:
        raise ValueError(f"k {k} must be between 1 and {scores.shape[1] - 1}, the number of tokens less one")
    u = torch.empty_like(scores).uniform_(generator=generator).clamp_min(torch.finfo(scores.dtype).tiny)  # (B, L)
    noise = -(-u.log()).log()  # (B, L), Gumbel(0, 1)
    y = scores + noise  # (B, L)
    top, ids = y.topk(k + 1, dim=1)  # (B, k+1), descending
    theta = top[:, k - 1 :].mean(1, keepdim=True)  # (B, 1), midway between the last in and the first out
    theta = theta.detach()  # the gradient of a token is its own, not that of the two at the border
    ids = ids[:, :k]
    hard = torch.zeros_like(scores).scatter(1, ids, 1.0)  # (B, L)
    soft = torch.sigmoid((y - theta) / tau)  # (B, L)
    return ids, hard, soft


def curriculum_factor(progress: float, start: float = 1.0, end: float = -1.0) -> float:
    """Lambda after a fraction `progress` in [0, 1] of the training: linear from start (partner) to end (adversary).

    CL-MAE, Sec. 3: it multiplies the reconstruction loss of the masker only. AdamW divides the size of a gradient out,
    and with it that of lambda; so train.py makes the scores' std kappa * |lambda| as well: at 0 the masks are random.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} must be between 0 and 1")
    return start + (end - start) * progress


def mask_diversity(scores: Tensor) -> Tensor:
    """The share (0-d, 0 to 1) of the scores' variance over tokens that differs from image to image, scores (B, L).

    0: one mask for all images. B unrelated images have 1 - 1/B.
    """
    common = scores.mean(0).square().mean()  # what all images share; the scores of an image have mean 0
    return 1 - common / scores.square().mean().clamp_min(1e-12)


class Output(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor  # (), the one to call backward() on; its value does not depend on lambda; includes the diversity loss
    pred: Tensor  # (B, L, p*p*C), predicted patches, standardised by their own statistics if norm_pix
    mask: Tensor  # (B, L), 1 = masked, 0 = visible
    scores: Tensor  # (B, L), the masker's times kappa, or those passed in; zeros if there are neither
    patch_loss: Tensor  # (B, L), mean squared error of every patch; only the masked ones are trained on


class CLMAE(nn.Module):
    """Encoder, decoder and masker, and the step that trains them together. Plain MAE is kappa = 0."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.masker = Masker(config) if config.kappa > 0 else None
        for module in self.modules():  # MAE, appendix A.1
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.data.flatten(1))  # as the matmul that it is
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def target(self, images: Tensor) -> Tensor:
        """What the decoder is to predict for every patch of images (B, C, H, W): (B, L, p*p*C)."""
        patches = patchify(images, self.config.patch_size).float()
        if self.config.norm_pix:  # MAE, Sec. 4.1: enhances the contrast within patches
            mean, std = patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    def reconstruct(self, pred: Tensor, images: Tensor) -> Tensor:
        """Undo `target`: predicted patches (B, L, p*p*C) to images (B, C, H, W).

        norm_pix predicts neither brightness nor contrast of a patch: both are taken from the true images (B, C, H, W).
        """
        if self.config.norm_pix:
            mean, std = patch_statistics(patchify(images, self.config.patch_size).float())
            pred = pred * std + mean
        return unpatchify(pred, self.config.patch_size, self.config.grid)

    def forward(
        self,
        images: Tensor,
        lam: Tensor | float = 0.0,
        kappa: Tensor | float | None = None,
        *,
        scores: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Output:
        """One step on standardised images (B, C, H, W).

        lam: the curriculum factor. kappa: std of the scores, default config.kappa; 0 gives random masks. train.py
        passes config.kappa * |lam|. Both as 0-d tensors if the model is compiled: it compiles anew for every float.
        scores: (B, L), sample from these instead of the masker's, for looking only: no gradient reaches them.
        mask: (B, L), 1 = masked, use exactly this, the same number of visible patches in each image; no sampling.
        """
        c = self.config
        x = self.encoder.embed(images)  # (B, L, D)
        for name, given in (("scores", scores), ("mask", mask)):
            if given is not None and given.shape != x.shape[:2]:
                raise ValueError(f"{name} {tuple(given.shape)} must be (B, L) = {tuple(x.shape[:2])}")

        # 1. The masker scores every token. detach: it must not teach the patch embedding.
        learned = mask is None and scores is None and self.masker is not None
        if learned:
            scores = (c.kappa if kappa is None else kappa) * self.masker(x.detach())  # (B, L)
        elif scores is None:
            scores = x.new_zeros(x.shape[:2], dtype=torch.float32)

        # 2. Sample K visible tokens; in value `keep` is 0 or 1.
        if mask is None:
            ids, keep, soft = gumbel_top_k(scores.float(), c.visible, c.tau, generator)  # (B, K), (B, L), (B, L)
        else:
            keep = 1 - mask.float()  # (B, L)
            K, *others = (keep == 1).sum(1).unique().tolist()
            if others or not 1 <= K < c.patches or not ((keep == 0) | (keep == 1)).all():
                raise ValueError(
                    f"mask must be 0 or 1 and leave the same number of patches of each image visible, 1 to "
                    f"{c.patches - 1}; visible here: {[K, *others]}"
                )
            ids = keep.topk(K, dim=1).indices  # (B, K)
        hidden = 1 - keep  # (B, L), 1 = masked; without the gradient that step 3 gives to keep

        # 3. The curriculum in one line. lam times the straight-through gradient reaches the masker, while the value of
        #    keep, and so the loss and the MAE's gradient, are the same for every lam: one pass trains both networks.
        gate = None
        if learned:
            keep = keep + lam * (soft - soft.detach())  # (B, L)
            gate = keep.gather(1, ids)  # (B, K), ones

        # 4. Encode the visible tokens, decode all.
        visible_x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
        pred = self.decoder(self.encoder(visible_x, gate), ids, gate)  # (B, L, p*p*C)

        # 5. Reconstruction loss over the masked patches. MAE, Sec. 3.
        patch_loss = (pred.float() - self.target(images)).square().mean(-1)  # (B, L)
        per_image = (patch_loss * hidden).sum(1) / hidden.sum(1)  # (B,)
        loss = per_image.mean()

        # 6. The gates tell the masker what a visible patch was worth to the masked ones. A masked patch never entered
        #    the pass: it is charged its own loss, less the mean over its image's masked patches. K is fixed, so to show
        #    one is to hide another, and only differences count. The value of this term is zero.
        if learned:
            m = 1 - keep  # (B, L), mask with the masker's gradient
            cost = ((patch_loss - per_image[:, None]) * hidden).detach()  # (B, L)
            loss = loss + (cost * (m - m.detach())).sum(1).div(hidden.sum(1)).mean()
            if c.diversity > 0:
                loss = loss + c.diversity * (1 - mask_diversity(scores))
        return Output(loss, pred, hidden, scores, patch_loss)

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, 1+L, D) of whole images (B, C, H, W): never masked, deterministic, normalised, CLS first."""
        return self.encoder(self.encoder.embed(images))


# ----------------------------------------------------------------------------------------------------------------------


def tour():
    """Walk two tiny images of noise through every stage and print what appears. Set breakpoints along the way."""

    def show(name: str, tensor: Tensor, what: str):
        print(f"{name:<10}{tuple(tensor.shape)!s:<18}{what}")

    def draw() -> torch.Generator:  # the same noise each time, so that all that follows sees the same masks
        return torch.Generator().manual_seed(1)

    torch.manual_seed(0)
    c = Config(image_size=(16, 16), dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, masker_dim=16)
    model = CLMAE(c)
    images = torch.randn(2, 3, 16, 16)
    print(f"1. Forward, over noise. B = 2 images, L = {c.patches} patches, K = {c.visible} visible, D = {c.dim}\n")

    show("images", images, "standardised pixels")
    show("target", model.target(images), "patches, flattened, each with mean 0 and std 1 (norm_pix)")
    x = model.encoder.embed(images)
    show("x", x, "a token per patch, with its position")
    scores = c.kappa * model.masker(x.detach())
    show("scores", scores, f"the masker's, mean 0 and std kappa = {c.kappa:g}; high = keep visible")
    ids, hard, soft = gumbel_top_k(scores, c.visible, c.tau, draw())
    show("ids", ids, "the K patches that the encoder may see")
    show("hard", hard, "1 = visible, 0 = masked")
    show("soft", soft, "its differentiable stand-in")
    z = model.encoder(x.gather(1, ids[..., None].expand(-1, -1, c.dim)))
    show("z", z, "features of CLS and the visible patches")
    pred = model.decoder(z, ids)
    show("pred", pred, "every patch, predicted")

    print("\n2. The same step at three lambdas: one loss, two gradients\n")
    print("lambda     loss   |gradient| of encoder   of masker   first three of its last layer")
    on_scores = {}
    for lam in (1.0, 0.0, -1.0):
        model.zero_grad()
        output = model(images, lam, generator=draw())
        output.scores.retain_grad()
        output.loss.backward()
        on_scores[lam] = output.scores.grad[0]  # (L,)
        encoder, masker = (
            torch.cat([p.grad.flatten() for p in part.parameters()]).norm() for part in (model.encoder, model.masker)
        )
        first = "  ".join(f"{g:+.5f}" for g in model.masker.score.weight.grad.flatten()[:3].tolist())
        print(f"{lam:+.0f}      {output.loss:.5f}{encoder:24.5f}{masker:12.5f}   {first}")

    print("\n3. What that tells the masker about each patch of the first image\n")
    print("patch  score s   soft           patch loss   push, lambda = +1   push, lambda = -1")
    for i in range(c.patches):
        state = "visible      -   " if hard[0, i] else f"masked  {output.patch_loss[0, i]:9.3f}"
        push = "".join(f"{-1000 * on_scores[lam][i]:+20.2f}" for lam in (1.0, -1.0))
        print(f"{i:5d}{scores[0, i]:+9.2f}{soft[0, i]:7.2f}   {state}{push}")
    mean = (output.patch_loss[0] * output.mask[0]).sum() / output.mask[0].sum()
    print("\npush = -1000 dL/ds, where descent moves the score. A masked patch with a loss above the mean,")
    print(f"{mean:.3f}, is shown more often by the partner (+1) and hidden more often by the adversary (-1).")


if __name__ == "__main__":
    tour()

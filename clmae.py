"""CL-MAE (Curriculum-Learned Masked Autoencoders, arXiv 2308.16572) in one file. Read it from top to bottom.

A masked autoencoder (MAE) sees a few patches of an image and predicts the rest. In CL-MAE a second network, the masker,
chooses which patches are hidden. It is trained on the MAE's own reconstruction loss times a factor lambda that falls
from +1 (partner: hide what is easy to fill in) through 0 to -1 (adversary: hide what is hard), a curriculum of masks.

    images -> PatchEmbed -> x -> Encoder(visible tokens) -> Decoder(+ mask tokens) -> pred -> patch_loss -> mae_loss
                            |               ^ ids                                                 | cost
                            +-> Masker -> scores -> gumbel_top_k -> soft -----------------------> masker_loss

Symbols: B images, C channels, L patches (tokens), K visible ones, D encoder width (Dd the decoder's, Dm the masker's),
lam the factor lambda. Of an image: x tokens, z the encoder's features, ids the K visible patches, theta the threshold
of y for being visible. Of a patch: raw the masker's raw score, s the score (low = hide), y = s + Gumbel noise, keep
1 = visible, soft its differentiable stand-in, mask = 1 - keep, patch_loss its error, cost how far that is above its
image's mean. MAE is He et al., CVPR 2022. `python clmae.py` shows one step and who gets which gradient.
"""

import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    """Everything that shapes the model and its loss. Widths are in features, image sizes in pixels."""

    image_size: int | tuple[int, int] = 32  # one side of a square, or (height, width); kept as the pair
    patch_size: int = 4  # side of a square patch; divides both image sides
    channels: int = 3
    dim: int = 192  # encoder width D; each width is a multiple of 4 (positions) and of its heads
    depth: int = 12  # encoder blocks
    heads: int = 3
    decoder_dim: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 2
    masker_dim: int = 48  # it reads all L tokens, the encoder only K of them: it has to be small to cost little
    masker_depth: int = 1
    masker_heads: int = 2
    mask_ratio: float = 0.75  # fraction of the patches that is hidden; K = round(L (1 - mask_ratio))
    kappa: float = 2.0  # how far masks may depart from random ones, see CLMAE.score_tokens. 0: no masker, plain MAE
    tau: float = 1.0  # temperature of the straight-through sigmoid, in units of the scores
    norm_pix: bool = True  # predict each patch standardised by its own mean and std, not raw pixels

    def __post_init__(self):
        size, p = self.image_size, self.patch_size
        self.image_size = height, width = (size, size) if isinstance(size, int) else tuple(size)
        if min(p, height, width) < 1 or height % p or width % p:
            raise ValueError(f"patch_size {p} must divide the image size {height} x {width}")
        for name, low, high in (("kappa", 0, 1e9), ("tau", 1e-9, 1e9), ("mask_ratio", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)} must be between {low:g} and {high:g}")
        if not 1 <= self.visible < self.patches:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves {self.visible} of {self.patches} patches visible")
        if self.norm_pix and p * p * self.channels < 2:
            raise ValueError("norm_pix needs more than 1 value in a patch: one alone has no variance")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """Number of patches, L."""
        return self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        """Number of visible patches, K."""
        return round(self.patches * (1 - self.mask_ratio))


# ---- Images to patches and back --------------------------------------------------------------------------------------
def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into flattened patches (B, L, p*p*C), row by row, pixels as (p, p, channel) as in MAE."""
    B, C, H, W = images.shape
    p = patch_size
    x = images.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, L, p*p*C) on a grid of (rows, columns) together to images (B, C, H, W); undoes `patchify`."""
    (h, w), p = grid, patch_size
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


# ---- Transformer. The names of the parts are timm's, so that trained weights move without renaming -------------------
class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v, (B, heads, N, d)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# ---- The masked autoencoder ------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """ViT over the visible tokens only. MAE, Sec. 3. `state_dict()` loads into a timm VisionTransformer as it is.

    CLS is there for timm's and MAE's layout: the other tokens attend to it, no loss and no feature is taken from it.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.size = (c.channels, *c.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.register_buffer("pos_embed", sincos_positions(c.grid, c.dim))  # (1, 1+L, D)
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.dim)
        self.blocks = nn.Sequential(*(Block(c.dim, c.heads) for _ in range(c.depth)))
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens with their positions, x (B, L, D)."""
        if images.shape[1:] != self.size:
            C, H, W = self.size
            raise ValueError(f"images {tuple(images.shape)} must be (B, {C}, {H}, {W})")
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Normalised features, CLS first, of the tokens ids (B, K) of x (B, L, D): (B, 1+K, D). Without ids, of all."""
        if ids is not None:
            x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, D): the others are never seen
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1)  # (B, 1+K, D)
        return self.norm(self.blocks(x))


class Decoder(nn.Module):
    """A light ViT that fills in the masked patches. MAE, Sec. 3."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.register_buffer("pos_embed", sincos_positions(c.grid, c.decoder_dim))  # (1, 1+L, Dd)
        self.blocks = nn.Sequential(*(Block(c.decoder_dim, c.decoder_heads) for _ in range(c.decoder_depth)))
        self.norm = nn.LayerNorm(c.decoder_dim, eps=1e-6)
        self.pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.channels)

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        """Features (B, 1+K, D) of CLS and the visible patches `ids` (B, K) to all patches, (B, L, p*p*C)."""
        z = self.embed(z)  # (B, 1+K, Dd)
        cls, z = z[:, :1], z[:, 1:]
        x = self.mask_token.to(z.dtype).expand(z.shape[0], self.pos_embed.shape[1] - 1, -1)  # (B, L, Dd)
        x = x.scatter(1, ids[..., None].expand_as(z), z)  # visible features at their places
        x = self.blocks(torch.cat([cls, x], dim=1) + self.pos_embed)  # (B, 1+L, Dd)
        return self.pred(self.norm(x[:, 1:]))


# ---- What CL-MAE adds: a masker, a way to sample its masks, a factor that turns it from partner to adversary ---------
class Masker(nn.Module):
    """Look at all tokens x (B, L, D) and give each a raw score (B, L), low = hide. After CL-MAE, Sec. 3.

    The raw scores of each image have mean 0 and std 1: left free they would outgrow the noise of `gumbel_top_k`, and
    the masks would freeze.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Linear(c.dim, c.masker_dim)
        self.blocks = nn.Sequential(*(Block(c.masker_dim, c.masker_heads) for _ in range(c.masker_depth)))
        self.norm = nn.LayerNorm(c.masker_dim, eps=1e-6)
        self.score = nn.Linear(c.masker_dim, 1, bias=False)  # the mean is taken out: a bias would do nothing

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x))  # (B, L, Dm)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round scores into ties
            raw = self.score(self.norm(x.to(self.score.weight.dtype))).squeeze(-1).float()  # (B, L)
        raw = raw - raw.mean(1, keepdim=True)
        return raw / (raw.square().mean(1, keepdim=True) + 1e-6).sqrt()


def gumbel_noise(s: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent Gumbel(0, 1) noise, std 1.28, of the shape (B, L) of the scores s."""
    u = torch.empty_like(s).uniform_(generator=generator).clamp_min(torch.finfo(s.dtype).tiny)
    return -(-u.log()).log()


def gumbel_top_k(
    s: Tensor, k: int, tau: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample k of L tokens, one after another: of those left, i is drawn with probability e^s_i / (their sum of e^s).

    Adding Gumbel(0, 1) noise and taking the k largest is an exact sample of that Plackett-Luce distribution
    (Yellott 1977; Vieira 2014; Kool et al., ICML 2019).

    s: scores (B, L). tau: temperature of the relaxation, in units of the scores.
    Returns ids (B, k) of the sampled tokens; keep (B, L), 1 for them and 0 for the others; soft (B, L) in [0, 1], its
    differentiable stand-in: the sigmoid of how far y = s + noise lies above the threshold theta, over tau.
    """
    y = s + gumbel_noise(s, generator)  # (B, L)
    top, ids = y.topk(k + 1, dim=1)  # (B, k+1), descending
    ids = ids[:, :k]
    keep = torch.zeros_like(s).scatter(1, ids, 1.0)  # (B, L)

    # theta is two tokens' y, averaged. Detached: else each of these would also get minus half the sum of all gradients.
    theta = top[:, k - 1 :].mean(1, keepdim=True).detach()  # (B, 1), midway between the last in and the first out
    soft = torch.sigmoid((y - theta) / tau)  # (B, L)
    return ids, keep, soft


def curriculum_factor(progress: float, start: float = 1.0, end: float = -1.0) -> float:
    """Lambda after a fraction `progress` in [0, 1] of the training: linear from start (partner) to end (adversary).

    CL-MAE, Sec. 3: the factor of the masker's loss. Here its magnitude scales the scores as well.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} must be between 0 and 1")
    return start + (end - start) * progress


class Output(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor  # (), mae_loss + lam masker_loss: only to call backward() on
    mae_loss: Tensor  # (), the reconstruction loss, the one to look at: mean of patch_loss over the masked patches
    masker_loss: Tensor  # (), what the masks cost; its value means little, its gradient trains the masker
    pred: Tensor  # (B, L, p*p*C), predicted patches, standardised by their own statistics if norm_pix
    mask: Tensor  # (B, L), 1 = masked, 0 = visible
    scores: Tensor  # (B, L), s; zeros without a masker
    patch_loss: Tensor  # (B, L), mean squared error of every patch; only the masked ones are trained on


def init_weights(module: nn.Module):
    """Xavier weights and zero biases for a linear layer. MAE, appendix A.1."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class CLMAE(nn.Module):
    """Encoder, decoder and masker, and the step that trains them together. Plain MAE is kappa = 0."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.full((config.channels, 1, 1), 127.5))  # of the training set, 0 to 255
        self.register_buffer("std", torch.full((config.channels, 1, 1), 127.5))
        self.encoder = Encoder(config).apply(init_weights)
        self.decoder = Decoder(config).apply(init_weights)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.data.flatten(1))  # as the matmul that it is
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        with torch.random.fork_rng(devices=[]):  # a seed draws the same with a masker and without
            self.masker = Masker(config).apply(init_weights) if config.kappa > 0 else None

    def standardise(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of 0 to 255, not ToTensor's 0 to 1, to what the model reads: each channel of std 1."""
        return (images.to(self.mean.device).float() - self.mean) / self.std

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, 1+L, D) of whole standardised images (B, C, H, W): never masked, normalised, CLS first."""
        return self.encoder(self.encoder.embed(images))

    def features(self, images: Tensor) -> Tensor:
        """What is evaluated: the mean (B, D) of the patch tokens of `encode`."""
        return self.encode(images)[:, 1:].mean(1)

    def target(self, images: Tensor) -> Tensor:
        """What the decoder is to predict for every patch of images (B, C, H, W): (B, L, p*p*C)."""
        patches = patchify(images, self.config.patch_size).float()
        if self.config.norm_pix:  # MAE, Sec. 4.1: enhances the contrast within patches
            mean, std = patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    def reconstruct(self, pred: Tensor, images: Tensor) -> Tensor:
        """Undo `target`: predicted patches (B, L, p*p*C) to standardised images (B, C, H, W).

        norm_pix predicts neither brightness nor contrast of a patch: both are taken from the true images (B, C, H, W).
        """
        if self.config.norm_pix:
            mean, std = patch_statistics(patchify(images, self.config.patch_size).float())
            pred = pred * std + mean
        return unpatchify(pred, self.config.patch_size, self.config.grid)

    def scores(self, images: Tensor, lam: Tensor | float) -> Tensor:
        """The scores s (B, L) of standardised images (B, C, H, W), low = hide. zeros without a masker or at lam = 0."""
        return self.score_tokens(self.encoder.embed(images), lam)

    def score_tokens(self, x: Tensor, lam: Tensor | float) -> Tensor:
        """The scores s (B, L) of tokens x (B, L, D)."""
        if self.masker is None:
            return x.new_zeros(x.shape[:2], dtype=torch.float32)  # (B, L)
        raw = self.masker(x.detach())  # (B, L); detach: the masker must not teach the patch embedding

        # min(raw, 0): it may only hide, a linear probe was lower when it could also show. About half of the tokens have
        # raw < 0 and are hidden more often than the others, which share s = 0 and pass no gradient on.
        # |lam|: AdamW rescales gradients to unit size, so a loss that shrinks with lam would not slow the masker down;
        # therefore its scores, how far masks depart from random ones, shrink too. The sign of lam is the loss's.
        return self.config.kappa * abs(lam) * raw.clamp(max=0)  # (B, L)

    def forward(self, images: Tensor, lam: Tensor | float = 0.0, generator: torch.Generator | None = None) -> Output:
        """One step of CL-MAE on standardised images (B, C, H, W).

        lam: the curriculum factor, as a 0-d tensor if the model is compiled: it compiles anew for every float.
        lam = 0 is plain MAE, exactly. generator: of the Gumbel noise, on the images' device.
        """
        c = self.config
        hidden = c.patches - c.visible  # L - K

        # 1. The masker scores every token.
        x = self.encoder.embed(images)  # (B, L, D)
        s = self.score_tokens(x, lam)  # (B, L)

        # 2. Sample the K visible tokens.
        ids, keep, soft = gumbel_top_k(s, c.visible, c.tau, generator)  # (B, K), (B, L), (B, L): soft is for step 5
        mask = 1 - keep  # (B, L), 1 = masked

        # 3. Encode the visible tokens, decode all.
        z = self.encoder(x, ids)  # (B, 1+K, D)
        pred = self.decoder(z, ids)  # (B, L, p*p*C)

        # 4. The MAE's loss, mae_loss: the error of the masked patches. MAE, Sec. 3.
        patch_loss = (pred.float() - self.target(images)).square().mean(-1)  # (B, L)
        image_loss = (patch_loss * mask).sum(1, keepdim=True) / hidden  # (B, 1)
        mae_loss = image_loss.mean()  # ()

        # 5. The masker's loss: what its masks cost. A hidden patch costs its own error, less the mean over its image's
        #    hidden patches: K is fixed, so to show one is to hide another, and only differences count. Sampling has no
        #    gradient, so soft stands in for keep (straight-through). cost is detached: none of this reaches the MAE.
        #    What descent adds to the score of a hidden patch, its push: lam cost soft (1 - soft) / (tau (L - K) B).
        cost = ((patch_loss - image_loss) * mask).detach()  # (B, L)
        masker_loss = (cost * (1 / hidden) * (1 - soft)).sum(1).mean()  # ()

        # 6. The curriculum. The MAE lowers the first loss; the masker lowers the second at lam > 0, raises it below 0.
        loss = mae_loss + lam * masker_loss
        return Output(loss, mae_loss, masker_loss, pred, mask, s, patch_loss)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """All patches (B, L, p*p*C) under a mask (B, L) of your own, 1 = masked, the same number in each image."""
        if mask.shape != (len(images), self.config.patches):
            raise ValueError(f"mask {tuple(mask.shape)} must be ({len(images)}, {self.config.patches})")
        shown = (mask == 0).sum(1)  # (B,)
        if (shown != shown[0]).any() or not 1 <= shown[0] < mask.shape[1]:
            raise ValueError(f"mask must leave the same number of patches visible, 1 to L - 1: {shown.tolist()}")
        ids = mask.float().argsort(dim=1, stable=True)[:, : shown[0]]  # (B, K)
        return self.decoder(self.encoder(self.encoder.embed(images), ids), ids)

    @torch.no_grad()
    def mask_probability(self, scores: Tensor, samples: int = 1000) -> Tensor:
        """The chance (B, L) of every patch to be masked, given scores (B, L), by sampling."""
        repeated = scores.expand(samples, -1, -1).flatten(0, 1)  # (samples * B, L)
        generator = torch.Generator(scores.device).manual_seed(0)
        _, keep, _ = gumbel_top_k(repeated, self.config.visible, generator=generator)
        return 1 - keep.reshape(samples, *scores.shape).mean(0)


def load_record(run: str | Path) -> dict:
    """What `save` in train.py lists of a run folder. Raises ValueError if it is not there, or damaged."""
    file = Path(run, "checkpoint.pt")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load reads past a flipped bit
        if damaged:
            raise ValueError(f"bad checksum of {damaged}")
        record = torch.load(file, map_location="cpu", weights_only=True)
        # Named, so that a checkpoint of another program, which lacks them, is refused here.
        return record | {"options": record["options"], "config": record["config"], "run": Path(run)}
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).partition("\n")[0][:150]
        raise ValueError(f"cannot read {file}: {reason}") from error


def load(run: str | Path) -> tuple[CLMAE, dict]:
    """The model of a run folder, on the CPU, ready for `model.features(model.standardise(images))`; and its record."""
    record = load_record(run)
    model = CLMAE(Config(**record["config"]))
    model.load_state_dict(record["model"])
    return model, record


def tour():
    """One step on two images of noise at five lambdas: the two losses, and who gets which gradient."""
    torch.manual_seed(0)
    model = CLMAE(Config(image_size=16, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, masker_dim=16))
    mae = nn.ModuleList([model.encoder, model.decoder])
    images = torch.randn(2, 3, 16, 16)  # B = 2, L = 16, K = 4

    def size(loss: Tensor, module: nn.Module) -> Tensor:
        weights = list(module.parameters())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.nn.utils.get_total_norm(gradients)

    print("One step, with the same noise, at five lambdas: two losses, and the size of the gradient that each gives\n")
    print("lambda   mae_loss: to MAE  to masker   masker_loss: to MAE  to masker   times lambda")
    for lam in (1.0, 0.5, 0.0, -0.5, -1.0):
        out = model(images, lam, torch.Generator().manual_seed(1))
        first = f"{out.mae_loss:9.5f}{size(out.mae_loss, mae):9.5f}{size(out.mae_loss, model.masker):11.5f}"
        masker = size(out.masker_loss, model.masker)
        second = f"{out.masker_loss:14.5f}{size(out.masker_loss, mae):9.5f}{masker:11.5f}{lam * masker:+15.5f}"
        print(f"{lam:+.1f}  {first}{second}")


if __name__ == "__main__":
    tour()

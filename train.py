"""Train a CL-MAE, or a plain MAE with --masking random, on one device, and evaluate its features.

    python train.py                                  # generated shapes: no download, no GPU, minutes
    python train.py --data cifar10 --model tiny      # or cifar100, or the path of an image folder
    python train.py --resume runs/cifar10            # go on after an interruption
    python train.py --linear-probe runs/cifar10      # or --knn, --finetune

A run is one folder: checkpoint.pt (everything, replaced after each epoch), log.jsonl (one record an epoch), at the end
the figures of visualize.py, and evaluation.json if it was evaluated.
"""

import argparse
import ctypes
import io
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional
from tqdm import tqdm

from clmae import CLMAE, Config, curriculum_factor, mask_diversity

# The masker reads all L tokens, the encoder only K of them: it has to be small to cost little.
MODELS = {
    "nano": dict(dim=96, depth=4, heads=3, decoder_dim=48, decoder_depth=1, masker_dim=32),
    "tiny": dict(dim=192, depth=12, heads=3, decoder_dim=64, decoder_depth=2, masker_dim=48),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=128, decoder_depth=2, decoder_heads=4, masker_dim=64),
}
SHAPES = ["disc", "ring", "square", "frame", "triangle", "star", "cross", "bar", "crescent", "pair"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


def fail(message: str):
    """Stop with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Data: the whole set is one uint8 tensor, a batch is an index into it. No worker processes, nothing to wait for.


class Data(NamedTuple):
    """A data set in memory. `val` is held out: never trained on."""

    train: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor  # (N,) class indices; -1 where the images have no classes
    val: Tensor  # (M, 3, H, W) uint8
    val_labels: Tensor  # (M,)
    classes: list[str]  # names; empty where the images have no classes


def shapes(n: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw n images (n, 3, H, W) uint8 of four shapes of a kind on stripes; kind, colour, place, angle at random.

    Returns the images and their classes (n,). The same seed gives the same images.
    """
    g, (H, W) = torch.Generator().manual_seed(seed), size
    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")  # (H, W)
    quadrant = (x > 0).long() + 2 * (y > 0).long()  # (H, W), one shape in each
    labels, images = torch.randint(len(SHAPES), (n,), generator=g), []
    for label in labels.split(1000):
        b = len(label)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=g)

        radius, turn = uniform(0.36, 0.44, b, 4)[:, quadrant], uniform(0, 2 * math.pi, b, 4)[:, quadrant]  # (b, H, W)
        dx, dy = ((axis - axis.sign() / 2 - uniform(-0.22, 0.22, b, 4)[:, quadrant]) / radius for axis in (x, y))
        u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()  # (b, H, W), the shape's own axes
        r, phi, square = u.hypot(v), torch.atan2(v, u), torch.maximum(u.abs(), v.abs())
        bar, upright = torch.maximum(u.abs() - 0.95, v.abs() - 0.25), torch.maximum(v.abs() - 0.95, u.abs() - 0.25)
        sides = [u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        distance = torch.stack(  # to the outline, in radii, negative inside; in the order of SHAPES
            [
                r - 0.85,
                (r - 0.7).abs() - 0.18,
                square - 0.75,
                (square - 0.62).abs() - 0.16,
                torch.stack(sides).amax(0) - 0.48,
                r - 0.62 - 0.3 * (5 * phi).cos(),
                torch.minimum(bar, upright),
                bar,
                torch.maximum(r - 0.9, 0.75 - (u - 0.45).hypot(v)),
                torch.minimum((u - 0.5).hypot(v), (u + 0.5).hypot(v)) - 0.36,
            ]
        )[label, torch.arange(b)]  # (b, H, W)
        inside = torch.sigmoid(-0.7 * W * radius * distance)[:, None]  # (b, 1, H, W), an edge one pixel soft
        angle, frequency, phase = (uniform(*span, b, 1, 1) for span in ((0, math.pi), (7, 10), (0, 2 * math.pi)))
        stripes = torch.sin((x * angle.cos() + y * angle.sin()) * frequency + phase)[:, None]  # (b, 1, H, W)
        ground, colour = uniform(0, 1, b, 3, 1, 1), uniform(0, 1, b, 3, 1, 1)
        alike = (colour - ground).norm(dim=1, keepdim=True) < 0.6
        colour = torch.where(alike, 1 - ground.round(), colour)
        image = inside * colour + (1 - inside) * (ground + 0.1 * stripes)  # (b, 3, H, W)
        image = image + 0.01 * torch.randn(image.shape, generator=g)
        images.append((image.clamp(0, 1) * 255).to(torch.uint8))
    return torch.cat(images), labels


def check_memory(n: int, size: tuple[int, int]):
    """Refuse n images of (H, W) pixels that cannot fit, before any is read."""
    need = 2 * n * 3 * size[0] * size[1]  # twice: shapes() joins its parts; for a folder half is left to the rest
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not tell
        return
    if need > have:
        fail(
            f"{n:,} images of {size[0]} x {size[1]} pixels take {need / 1e9:.1f} GB and this machine has "
            f"{have / 1e9:.1f} GB; use fewer (--images) or smaller ones (--image-size)"
        )


def list_folder(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Image files, labels (-1 if none) and class names of a folder: one sub-folder per class, or flat, no labels."""

    def images(path: Path, pattern: str) -> list[Path]:
        found = (p for p in path.glob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES)
        return sorted(p for p in found if p.is_file() and not p.name.startswith("."))

    flat = images(folder, "*")
    classes = {p.name: images(p, "**/*") for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "."}
    classes = {name: files for name, files in classes.items() if files}
    if flat and classes:
        fail(f"{folder} has {len(flat)} images beside folders of images ({', '.join(classes)}); it must be either")
    files = flat or [file for c in classes.values() for file in c]
    if not files:
        fail(f"no images in {folder}: expected {' '.join(sorted(IMAGE_SUFFIXES))}, flat or one sub-folder per class")
    labels = [-1] * len(flat) or [i for i, c in enumerate(classes.values()) for _ in c]
    return files, torch.tensor(labels), list(classes)


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Decode an image of any mode to RGB (3, H, W) uint8: resized to cover H x W, then cropped to its centre."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)  # photographs of a telephone are stored lying
        if image.mode.startswith("I"):  # 16 bits: convert() would clip them to white
            image = image.point(lambda value: value / 256).convert("L")
        image = image.convert("RGB")
    scale = max(size[0] / image.height, size[1] / image.width)
    cover = (round(image.height * scale), round(image.width * scale))
    image = functional.center_crop(functional.resize(image, cover, antialias=True), size)
    return functional.pil_to_tensor(image)


def read_images(files: list[Path], size: tuple[int, int], what: str) -> Tensor:
    """Decode files, in threads, to (N, 3, H, W) uint8."""
    check_memory(len(files), size)
    images = torch.empty(len(files), 3, *size, dtype=torch.uint8)

    def read(i: int) -> str | None:
        try:
            images[i] = read_image(files[i], size)
        except Exception as error:  # Pillow raises many kinds on broken files
            return f"cannot read the image {files[i]} ({error}); repair or remove it"

    with ThreadPoolExecutor() as pool:
        bad = [e for e in tqdm(pool.map(read, range(len(files))), f"decoding {what}", len(files), disable=None) if e]
    if bad:
        fail(bad[0] + (f"; {len(bad) - 1} more cannot be read" if len(bad) > 1 else ""))
    return images


def load_data(args: argparse.Namespace) -> Data:
    """Read what --data names. Images without a held-out split give up the last tenth of a fixed shuffle."""
    size, val, held = image_size(args), None, args.holdout
    wanted = args.images and args.images + held
    if args.data == "shapes":
        size, n = size or (32, 32), (args.images or 10_000) + held
        check_memory(n + 2_000, size)
        train, val = shapes(n, size, seed=1), shapes(2_000, size, seed=2)
        classes = SHAPES
    elif args.data in ("cifar10", "cifar100"):
        if size not in (None, (32, 32)):
            fail(f"--image-size {size[0]} {size[1]}: the images of {args.data} have 32 x 32 pixels")
        dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[args.data]
        try:
            parts = [dataset(args.data_dir, train=train, download=True) for train in (True, False)]
        except Exception as error:  # urllib, hashes, disk: whatever it was, the way out is the same
            fail(
                f"could not download {args.data} to {args.data_dir} ({error}); with its images on disk, in train/ and "
                f"test/, one sub-folder per class, use --data PATH"
            )
        train, val = ((torch.from_numpy(p.data).movedim(3, 1).contiguous(), torch.tensor(p.targets)) for p in parts)
        order = shuffled(len(train[0]))[:wanted]
        train, classes = (train[0][order], train[1][order]), parts[0].classes
    else:
        root = Path(args.data)
        if not root.is_dir():
            fail(f"--data {args.data} is neither shapes, cifar10, cifar100 nor a folder")
        train_dir = root / "train" if (root / "train").is_dir() else root
        val_dir = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        files, labels, classes = list_folder(train_dir)
        size = size or default_size(files[0], args.patch_size)
        order = shuffled(len(files))[:wanted]
        files, labels = [files[i] for i in order.tolist()], labels[order]
        train = read_images(files, size, "train"), labels
        if train_dir != root and val_dir and not held:
            files, labels, val_classes = list_folder(val_dir)
            if val_classes != classes:
                fail(f"{val_dir} and {train_dir} have different classes: {sorted({*classes} ^ {*val_classes})[:5]}")
            order = shuffled(len(files))  # the first images stand for all of them in figures and hardness
            val = read_images([files[i] for i in order.tolist()], size, "val"), labels[order]
    if val is None or held:
        n = len(train[0])
        held = held or n // 10
        if not 1 <= held < n:
            fail(f"{n} images in {args.data} are too few: {held or 'a tenth, at least 1,'} of them to be held out")
        train, val = [x[:-held] for x in train], [x[-held:] for x in train]
    return Data(*train, *val, classes)


def image_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """(height, width) asked for, None if left to the data."""
    if args.image_size and len(args.image_size) > 2:
        fail(f"--image-size {' '.join(map(str, args.image_size))}: one or two numbers")
    return (args.image_size[0], args.image_size[-1]) if args.image_size else None


def shuffled(n: int) -> Tensor:
    """The same random order of n things every time."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def default_patch(side: int) -> int:
    """Pixels: 64 tokens for small images, ViT's 16 for large ones."""
    return 4 if side < 64 else 8 if side < 128 else 16


def default_size(path: Path, patch_size: int | None) -> tuple[int, int]:
    """A square as large as this image allows, at most 224 pixels, that patches divide."""
    try:
        with Image.open(path) as image:
            side = min(224, *image.size)
    except Exception as error:
        fail(f"cannot read the image {path} ({error}); repair or remove it")
    patch_size = patch_size or default_patch(side)
    if side < patch_size:
        fail(f"{path} is only {side} pixels wide or high, less than a patch of {patch_size}; --image-size enlarges it")
    side -= side % patch_size
    return side, side


def augment(images: Tensor, mean: Tensor, std: Tensor, min_crop: float) -> Tensor:
    """Random-resized crop and flip of a whole batch at once: uint8 (B, 3, H, W) to standardised float (B, 3, H, W).

    The crop covers min_crop to 1 of the area, its side ratio is 3/4 to 4/3 as far as that fits, as in MAE's recipe.
    """
    B, _, H, W = images.shape
    u = torch.rand(5, B, device=images.device)
    area = min_crop + (1 - min_crop) * u[0]  # (B,), as a fraction
    widest = (-area.log()).clamp(max=math.log(4 / 3))  # log of the side ratio; a large crop has to be nearly square
    ratio = torch.exp(widest * (2 * u[1] - 1))
    h, w = (area / ratio).sqrt(), (area * ratio).sqrt()  # (B,), sides as fractions
    flip = (u[4] < 0.5).float() * 2 - 1
    theta = torch.zeros(B, 2, 3, device=images.device)  # output to input coordinates, both in [-1, 1]
    theta[:, 0, 0], theta[:, 0, 2] = w * flip, (1 - w) * (2 * u[2] - 1)
    theta[:, 1, 1], theta[:, 1, 2] = h, (1 - h) * (2 * u[3] - 1)
    grid = F.affine_grid(theta, [B, 1, H, W], align_corners=True)  # (B, H, W, 2)
    return F.grid_sample(standardise(images, mean, std), grid, align_corners=True)


def standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float with the training set's mean 0 and std 1, mean and std (3, 1, 1) in [0, 255]."""
    return (images.float() - mean) / std


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (3, 1, 1) in [0, 255] of the colours of uint8 images (N, 3, H, W), without a float copy of all."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)]).double()  # (3, 256)
    p, values = counts / counts.sum(1, keepdim=True), torch.arange(256, device=images.device)
    mean = (p * values).sum(1, keepdim=True)  # (3, 1)
    std = (p * (values - mean).square()).sum(1, keepdim=True).sqrt().clamp_min(1)
    return mean[..., None].float(), std[..., None].float()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation. Features are the mean of the patch tokens of the whole, unmasked image.


@torch.no_grad()
def features(model: CLMAE, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pooled features (N, D) of uint8 images (N, 3, H, W), in chunks."""
    tokens = 4_000 if mean.device.type == "cpu" else 64_000  # what a CPU's cache holds; enough for a GPU to be busy
    chunks = images.split(max(1, tokens // model.config.patches))
    return torch.cat([model.encode(standardise(x.to(mean.device), mean, std))[:, 1:].mean(1) for x in chunks])


def pixels(images: Tensor) -> Tensor:
    """What features must beat: the pixels (N, 3 * 32 * 32) of uint8 images (N, 3, H, W), shrunk if larger."""
    size = min(32, *images.shape[2:])
    return torch.cat([F.adaptive_avg_pool2d(x.cpu().float(), size).flatten(1) for x in images.split(500)])


def z_score(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D), each of the D with mean 0 and std 1 on the training images."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    return (train - mean) / std, (val - mean) / std


def knn_accuracy(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int = 20) -> float:
    """Accuracy in % of k nearest neighbours by cosine of z-scored features (N, D), votes exp(cosine / 0.07)."""
    train, val = (F.normalize(z) for z in z_score(train, val))
    labels, right = train_labels.to(train.device), 0
    for z, label in zip(val.split(1000), val_labels.to(train.device).split(1000), strict=True):
        cosine, ids = (z @ train.T).topk(min(k, len(train)), dim=1)  # (1000, k)
        votes = torch.zeros(len(z), int(labels.max()) + 1, device=z.device)
        votes.scatter_add_(1, labels[ids], (cosine / 0.07).exp())  # (1000, classes)
        right += int((votes.argmax(1) == label).sum())
    return 100 * right / len(val)


def linear_probe(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> float:
    """Accuracy in % of logistic regression on z-scored frozen features (N, D): full-batch L-BFGS, L2 penalty 1e-4."""
    train, val = z_score(train, val)
    labels = train_labels.to(train.device)
    head = nn.Linear(train.shape[1], int(labels.max()) + 1, device=train.device)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(head(val), val_labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In %, of logits (N, classes)."""
    return 100 * (logits.argmax(1).cpu() == labels).float().mean().item()


def on_features(score, model: CLMAE, data: Data, mean: Tensor, std: Tensor) -> float:
    """knn_accuracy or linear_probe of an encoder."""
    train, val = (features(model, images, mean, std) for images in (data.train, data.val))
    return score(train, data.train_labels, val, data.val_labels)


@torch.inference_mode()
def hardness(model: CLMAE, images: Tensor, kappa: Tensor | float | None = None) -> tuple[dict, Tensor]:
    """How hard the learned masks, at this kappa, are for the MAE as it stands, on standardised images (N, C, H, W).

    hardness = loss under the masker's masks / loss under random masks: below 1 the masker helps, above 1 it opposes.
    Both losses use the same noise, the same every time. Returns the figures and the scores (N, L).
    """
    outputs = []
    for scores in (images.new_zeros(len(images), model.config.patches), None):  # random, then the masker's
        generator = torch.Generator(images.device).manual_seed(0)
        outputs.append(model(images, kappa=kappa, scores=scores, generator=generator))
    random, learned = (((o.patch_loss * o.mask).sum() / o.mask.sum()).item() for o in outputs)
    diversity = mask_diversity(outputs[1].scores).item() if model.masker else None
    return {"loss_random": random, "hardness": learned / random, "diversity": diversity}, outputs[1].scores


def finetune(model: CLMAE, data: Data, mean: Tensor, std: Tensor, args: argparse.Namespace) -> float:
    """Train encoder and a linear head on its pooled tokens; held-out accuracy in % after the last epoch.

    AdamW, a learning rate that shrinks by 0.75 a block from the head down (MAE, appendix A.2), label smoothing 0.1.
    """
    device, encoder, B = mean.device, model.encoder, args.batch_size
    head = nn.Linear(model.config.dim, len(data.classes), device=device)
    nn.init.trunc_normal_(head.weight, std=0.02)
    stages = [[encoder.patch_embed], *([block] for block in encoder.blocks), [encoder.norm, head]]
    groups = [{"params": [p for part in stage for p in part.parameters()]} for stage in stages]
    groups[0]["params"].append(encoder.cls_token)
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    labels, steps = data.train_labels.to(device), len(data.train) // B
    for epoch in (bar := tqdm(range(args.epochs), "fine-tuning", disable=None)):
        order = torch.randperm(len(data.train)).to(data.train.device)
        for i, ids in enumerate(order[: steps * B].split(B)):
            lr = args.lr * B / 256 * lr_factor(epoch + i / steps, args.epochs, args.warmup_epochs)
            for depth, group in enumerate(reversed(optimizer.param_groups)):
                group["lr"] = lr * 0.75**depth
            images = augment(data.train[ids].to(device), mean, std, args.min_crop)
            with autocast(args, device):
                logits = head(model.encode(images)[:, 1:].mean(1))
            loss = F.cross_entropy(logits.float(), labels[ids.to(device)], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if not loss.isfinite():
            fail(f"the loss of fine-tuning became {loss.item()} in epoch {epoch + 1}; try a lower --lr")
    with torch.no_grad():
        return accuracy(head(features(model, data.val, mean, std)), data.val_labels)


def evaluate(mode: str, path: str, given: dict):
    """--knn, --linear-probe or --finetune on a finished run, and on a random encoder as the floor beside it."""
    model, checkpoint = load_run(path)
    own = {"epochs": 50, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 5.0, "min_crop": 0.3, "device": None}
    args = argparse.Namespace(**{**checkpoint["args"], **own, **given})
    height, width = model.config.image_size
    if "image_size" in given and image_size(args) != (height, width):
        fail(f"--image-size {' '.join(map(str, args.image_size))}: {path} was trained on {height} x {width} pixels")
    args.image_size = [height, width]
    device, data = pick_device(args.device), load_data(args)
    if not data.classes:
        fail(f"--{mode} needs class labels; the images of {args.data} have none")
    data = data._replace(train=to_device(data.train, device))
    mean, std = checkpoint["mean"].to(device), checkpoint["std"].to(device)
    result = {"pretrained_epochs": checkpoint["epoch"], "train_images": len(data.train), "held_out": len(data.val)}
    if mode == "finetune":
        check_batch(args.batch_size, data)
        result["finetune_epochs"] = args.epochs
    torch.manual_seed(args.seed)
    for name, m in (("pretrained", model), ("random_init", CLMAE(model.config))):
        m.to(device)
        if mode == "finetune":
            result[name] = finetune(m, data, mean, std, args)
        else:
            result[name] = on_features({"knn": knn_accuracy, "linear-probe": linear_probe}[mode], m, data, mean, std)
        print(f"{mode}, mean-pooled patch tokens, {name} encoder: {result[name]:.2f} %", flush=True)
    file = Path(path) / "evaluation.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**results, mode: result}, indent=2) + "\n")
    print(f"written to {file}")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is, made ready for use."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} cannot be used ({str(error).splitlines()[0]}); cuda, mps and cpu are known")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for all that takes no device: memory, random state, synchronize
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep the memory that a step frees for the next one.

    Otherwise it gives large blocks back to the system, which clears and maps them anew, page by page, at every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: all blocks on the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Images (N, 3, H, W) on the device, if they take less than half of the room there; otherwise as they are."""
    room = math.inf
    if device.type == "cuda":
        room = torch.cuda.mem_get_info()[0]
    elif device.type == "mps":
        room = torch.mps.recommended_max_memory()
    return images.to(device) if images.nbytes <= room / 2 else images


def autocast(args: argparse.Namespace, device: torch.device):
    """bfloat16 for the matmuls if --amp, which is the default on CUDA only."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" if args.amp is None else args.amp)


def lr_factor(epoch: float, epochs: int, warmup: float) -> float:
    """Fraction of the peak learning rate: linear warm-up, then half a cosine down to 0. MAE, appendix A.1."""
    warmup = min(warmup, epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def check_batch(batch_size: int, data: Data):
    """An epoch is a number of whole batches: there must be one."""
    if batch_size > len(data.train):
        fail(f"--batch-size {batch_size} is more than the {len(data.train)} training images; use at most that")


def load_run(path: str | Path) -> tuple[CLMAE, dict]:
    """The model, on the CPU, and the checkpoint of a run folder."""
    file = Path(path) / "checkpoint.pt"
    if not file.is_file():
        fail(f"{path} is no run: it has no checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        model = CLMAE(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        parts = {"args", "epoch", "optimizer", "rng", "rng_device", "mean", "std", "log", "history", "images", "N"}
        if missing := parts - checkpoint.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error).splitlines() or ["empty"])[0]
        fail(f"{file} is damaged or not a checkpoint of this program ({type(error).__name__}: {reason})")
    return model, checkpoint


def save(checkpoint: dict, run: Path):
    """Write checkpoint.pt so that at every moment a whole one, the old or the new, lies in the run folder."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    temporary = run / "checkpoint.tmp"
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, run / "checkpoint.pt")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {run / 'checkpoint.pt'} ({error.strerror}); an earlier one there is still whole")


def build(args: argparse.Namespace, size: tuple[int, int], device: torch.device) -> tuple[CLMAE, torch.optim.AdamW]:
    """Model and optimiser for images of (H, W) pixels: one loss, one backward, one AdamW for the MAE and its masker."""
    try:
        config = Config(
            image_size=size,
            patch_size=args.patch_size or default_patch(min(size)),
            mask_ratio=args.mask_ratio,
            kappa=args.kappa if args.masking == "curriculum" else 0.0,
            tau=args.tau,
            diversity=args.diversity,
            norm_pix=args.norm_pix,
            **MODELS[args.model],
        )
    except ValueError as error:
        fail(str(error))
    model = CLMAE(config).to(device)
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]  # biases, norms, tokens: no weight decay
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(args: argparse.Namespace, resumed: dict | None):
    """Train for args.epochs, from the start or from a checkpoint, and draw the figures."""
    device, run, B = pick_device(args.device), Path(args.out), args.batch_size

    data = load_data(args)
    check_batch(B, data)
    N, _, H, W = data.train.shape
    steps = N // B  # an epoch; the last, incomplete batch is dropped
    mean, std = (resumed["mean"], resumed["std"]) if resumed else statistics(data.train)
    mean, std = mean.to(device), std.to(device)
    data = data._replace(train=to_device(data.train, device))
    fixed = standardise(data.val[:500].to(device), mean, std)  # the held-out images that hardness is measured on

    torch.manual_seed(args.seed)
    model, optimizer = build(args, (H, W), device)
    config = model.config
    step_model = torch.compile(model) if args.compile else model

    first = 0  # epoch 0 trains nothing: it measures the untrained model, the floor of what follows
    log, history = [], []  # by epoch: the record in log.jsonl, the scores (8, L) of 8 held-out images
    if resumed:
        if (N, asdict(config)) != (resumed["N"], resumed["config"]):
            fail(
                f"{args.data} has changed: {run} was trained on {resumed['N']} images with {resumed['config']}, "
                f"now there are {N} and {asdict(config)}"
            )
        first, log, history = resumed["epoch"] + 1, resumed["log"], resumed["history"]
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        torch.set_rng_state(resumed["rng"])
        if device.type in resumed["rng_device"]:
            getattr(torch, device.type).set_rng_state(resumed["rng_device"][device.type])
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    if not resumed:  # what --overwrite replaces
        for name in ("checkpoint.pt", "evaluation.json"):
            (run / name).unlink(missing_ok=True)

    print(
        f"{args.data}: {N:,} training and {len(data.val):,} held-out images of {H} x {W} pixels, {len(data.classes)} "
        f"classes, {data.train.nbytes / 1e6:,.0f} MB; {config.patches} patches, {config.visible} visible; "
        f"{args.epochs} epochs of {steps} steps on {device}"
    )
    if not resumed and data.classes:
        raw = pixels(data.train[:20_000]), pixels(data.val[:20_000])
        raw_knn = knn_accuracy(raw[0], data.train_labels[:20_000], raw[1], data.val_labels[:20_000])
        print(f"kNN accuracy of raw pixels: {raw_knn:.1f} %", flush=True)
    trivial = model.target(fixed).var(-1, unbiased=False).mean().item()  # loss of predicting each patch's own mean
    lam = torch.tensor(args.lambda_start, device=device)
    kappa = args.kappa * lam.abs()
    loss, lr, speed = None, 0.0, None

    for epoch in range(first, args.epochs + 1):
        order, losses = torch.randperm(N).to(data.train.device), torch.zeros(steps, device=device)
        start = shown = time.perf_counter()
        for i in (bar := tqdm(range(steps if epoch else 0), f"epoch {epoch}/{args.epochs}", leave=False, disable=None)):
            step = (epoch - 1) * steps + i
            lam.fill_(curriculum_factor(step / max(1, args.epochs * steps - 1), args.lambda_start, args.lambda_end))
            kappa = args.kappa * lam.abs()  # AdamW divides the size of lambda out of a gradient: it acts through kappa
            lr = args.lr * B / 256 * lr_factor(step / steps, args.epochs, args.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = data.train[order[i * B : (i + 1) * B]].to(device)  # (B, 3, H, W) uint8
            images = augment(images, mean, std, args.min_crop)  # (B, 3, H, W)
            with autocast(args, device):
                output = step_model(images, lam, kappa)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = output.loss.detach()  # stays on the device: reading it makes a GPU wait, once a second will do
            if time.perf_counter() - shown > 1:
                shown = time.perf_counter()
                speed = (i + 1) * B / (shown - start)
                bar.set_postfix_str(f"loss {losses[i].item():.4f}, lambda {lam.item():+.2f}, {speed:.0f} images/s")
                if not losses[i].isfinite():
                    break
        if not losses.isfinite().all():
            i = int(losses.isfinite().logical_not().nonzero()[0])
            fail(
                f"the loss became {losses[i].item()} in epoch {epoch}, step {i + 1} of {steps}; try a lower --lr; "
                f"{run / 'checkpoint.pt'} still holds epoch {epoch - 1}"
            )
        if epoch:
            loss, speed = losses.mean().item(), steps * B / (time.perf_counter() - start)

        # What the epoch did: hardness, features, a line, a record, a checkpoint.
        measured, scores = hardness(model, fixed, kappa)
        if not math.isfinite(measured["loss_random"]):
            fail(f"the model is no longer finite after the last step of epoch {epoch}; try a lower --lr")
        history.append(scores[:8].cpu().clone())
        due = data.classes and (epoch % args.knn_every == 0 or epoch == args.epochs)
        knn = on_features(knn_accuracy, model, data, mean, std) if due else None
        log.append(
            {"epoch": epoch, "lambda": lam.item(), "loss": loss, "loss_trivial": trivial, **measured, "knn": knn}
            | {"lr": lr, "images_per_s": speed}
        )
        print("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items() if value is not None), flush=True)
        rng_device = {} if device.type == "cpu" else {device.type: getattr(torch, device.type).get_rng_state()}
        save(
            {"args": vars(args), "config": asdict(config), "N": N, "epoch": epoch, "log": log, "history": history}
            | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            | {"rng": torch.get_rng_state(), "rng_device": rng_device}
            | {"mean": mean.cpu(), "std": std.cpu(), "images": data.val[:8].clone()},
            run,
        )
        with open(run / "log.jsonl", "a") as file:
            file.write(json.dumps(log[-1]) + "\n")

    import visualize  # here, because it imports this file

    visualize.draw(run)


def benchmark(args: argparse.Namespace, repeats: int = 20):
    """--benchmark: time a step of plain MAE and of CL-MAE in turns, the latter on one batch and on new ones."""
    device, B = pick_device(args.device), args.batch_size
    steps_each = 1 if device.type == "cpu" else 10  # a GPU is timed over ten: to wait after each would stall it
    size = image_size(args) or (32, 32)
    images = torch.randint(0, 256, (B, 3, *size), dtype=torch.uint8, device=device)
    order = torch.randperm(B).to(device)  # train() has it once an epoch
    mean, std = torch.full((2, 3, 1, 1), 127.0, device=device)
    batch, lam, kappa = augment(images, mean, std, args.min_crop), *torch.tensor([-0.5, 1.0], device=device)

    def make_step(masking: str):
        model, optimizer = build(argparse.Namespace(**{**vars(args), "masking": masking}), size, device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        compiled = torch.compile(model) if args.compile else model

        def step(batch: Tensor, model: nn.Module = compiled):
            with autocast(args, device):
                loss = model(batch, lam, kappa).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with FlopCounterMode(display=False) as counter:
            step(batch, model)
        return step, counter.get_total_flops()

    def new_batch() -> Tensor:
        return augment(images[order], mean, std, args.min_crop)

    random, curriculum = make_step("random"), make_step("curriculum")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the operations were counted without --compile
    rows = {  # name: (a step, its floating-point operations)
        "random masks": (lambda: random[0](batch), random[1]),
        "curriculum": (lambda: curriculum[0](batch), curriculum[1]),
        "... new batches": (lambda: curriculum[0](new_batch()), curriculum[1]),
    }
    seconds = {name: [] for name in rows}
    for repeat in range(repeats + 3):  # three to warm up
        for name, (step, _) in rows.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps_each):
                step()
            synchronize(device)
            if repeat >= 3:
                seconds[name].append((time.perf_counter() - start) / steps_each)
    base = torch.tensor(seconds["random masks"])
    print(f"{args.model}, {size[0]} x {size[1]} pixels, batch {B}, {device}, torch {torch.__version__}, {repeats} x")
    print("                 ms (median)  against random (quartiles)  images/s   TFLOP/s")
    for name, (_, flops) in rows.items():
        t = torch.tensor(seconds[name])
        low, middle, high = (t / base).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        ms, rate = 1000 * t.median().item(), flops / t.median().item() / 1e12
        print(f"{name:<15}{ms:10.2f}   {middle:.3f} ({low:.3f} to {high:.3f}){1000 * B / ms:12.0f}{rate:10.2f}")
    if device.type == "cuda":
        print(f"peak memory, both models: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def synchronize(device: torch.device):
    """Wait until the device has done what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number between low and high."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when kind(text) fails
    return parse


def build_parser() -> argparse.ArgumentParser:
    """The command line: an option, its default, its help, how it is read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one line and status 2, without the usage

    def add(option: str, default, text: str, type=None, **kwargs):
        """An option of the `group` last named below."""
        if type is not None:
            kwargs = {"type": type, "metavar": "X"} | kwargs
        shown = "" if default is None or default is False else f" (default: {default})"
        group.add_argument(option, default=default, help=text + shown, **kwargs)

    # fmt: off
    group = parser.add_argument_group("data")
    add("--data", "shapes", "shapes (generated), cifar10, cifar100 (downloaded once), or the path of an image folder: "
        "with train/ and val/ or test/, or one sub-folder per class, or flat, without labels")
    add("--data-dir", "data", "where downloads go")
    add("--images", None, "use only so many of the training images", number(int, 1), metavar="N")
    add("--image-size", None, "height and width or one for both; default 32, or of a folder the first image's smaller "
        "side, up to 224", number(int, 1), nargs="+", metavar="PIXELS")
    add("--holdout", 0, "evaluate on so many other training images, not on val/ or test/: for tuning",
        number(int, 0), metavar="N")
    group = parser.add_argument_group("model")
    add("--model", "nano", "nano (a CPU in minutes), tiny (ViT-Tiny), small (ViT-Small)", choices=list(MODELS))
    add("--patch-size", None, "pixels; default 4 for images below 64 pixels, 8 below 128, else 16", number(int, 1))
    add("--norm-pix", True, "predict patches standardised each by itself", action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("masking")
    add("--masking", "curriculum", "masks learned, or random: plain MAE", choices=["curriculum", "random"])
    add("--mask-ratio", 0.75, "fraction of the patches that is masked", number(float, 0, 1))
    add("--lambda-start", 1.0, "curriculum factor at the first step: 1 partner, -1 adversary", number(float, -1, 1))
    add("--lambda-end", -1.0, "curriculum factor at the last step", number(float, -1, 1))
    add("--kappa", 2.0, "std of the masker's scores at |lambda| = 1; the noise has 1.28", number(float, 1e-6))
    add("--tau", 1.0, "temperature of the straight-through gradient", number(float, 1e-6))
    add("--diversity", 0.0, "weight of the loss against one mask for all images", number(float, 0))
    group = parser.add_argument_group("training")
    add("--epochs", 15, "passes over the training images", number(int, 1))
    add("--batch-size", 64, "images a step", number(int, 1))
    add("--lr", 4e-3, "peak learning rate for 256 images a step; it scales with the batch", number(float, 0))
    add("--weight-decay", 0.05, "of matrices; biases, norms and tokens have none", number(float, 0))
    add("--warmup-epochs", 2.0, "epochs in which the learning rate rises", number(float, 0))
    add("--min-crop", 0.2, "smallest area of the random-resized crop; 1: no crop", number(float, 0.01, 1))
    add("--seed", 0, "of weights, order, crops and masks", number(int, 0, 2**63 - 1))
    group = parser.add_argument_group("machine and output")
    add("--device", None, "cuda, mps or cpu; default the first that is there")
    add("--amp", None, "bfloat16 matmuls; default on CUDA only", action=argparse.BooleanOptionalAction)
    add("--compile", False, "torch.compile the model", action="store_true")
    add("--knn-every", 5, "epochs from one kNN evaluation to the next", number(int, 1))
    add("--out", None, "run folder; default runs/ and the name of the data")
    add("--overwrite", False, "replace the run in that folder", action="store_true")
    group = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    add("--resume", None, "go on with an interrupted run", metavar="RUN")
    add("--benchmark", False, "time training steps of this --model, --batch-size ...", action="store_true")
    add("--knn", None, "evaluate a run by 20 nearest neighbours", metavar="RUN")
    add("--linear-probe", None, "evaluate a run by a linear classifier on its frozen encoder", metavar="RUN")
    add("--finetune", None, "evaluate a run by training encoder and classifier; its own defaults are --epochs 50 "
        "--batch-size 128 --lr 2e-3 --warmup-epochs 5 --min-crop 0.3", metavar="RUN")
    # fmt: on
    return parser


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = object()  # parsed a second time over this: what is still unset was not typed
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    given = {name: value for name, value in typed.items() if value is not unset}

    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    try:
        for mode in ("knn", "linear-probe", "finetune"):
            if run := given.get(mode.replace("-", "_")):
                return evaluate(mode, run, given)
        if args.benchmark:
            return benchmark(args)
        start(args, given)
    except OSError as error:  # no room, no right to write
        fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def start(args: argparse.Namespace, given: dict):
    """A new run, or --resume."""
    resumed = None
    if args.resume:
        _, resumed = load_run(args.resume)
        saved = resumed["args"] | {"resume": args.resume, "out": args.resume}
        for name in given.keys() - {"device", "compile", "knn_every", "data", "data_dir"}:
            if given[name] != saved[name]:
                fail(f"--{name.replace('_', '-')} {given[name]}: {args.resume} has {saved[name]}, and keeps it")
        args = argparse.Namespace(**saved | given)
    else:
        name = Path(args.data).resolve().name if os.path.isdir(args.data) else args.data
        args.out = args.out or f"runs/{name}" + ("-random" if args.masking == "random" else "")
        if args.masking == "random":
            args.lambda_start = args.lambda_end = 0.0  # there is no masker: neutral in the log and the figures
        if os.path.exists(args.out) and not args.overwrite:
            fail(
                f"{args.out} exists: --resume {args.out} goes on with it, --overwrite replaces it, --out names another"
            )
    try:
        train(args, resumed)
    except KeyboardInterrupt:
        if os.path.exists(f"{args.out}/checkpoint.pt"):
            print(f"\nto go on from the last whole epoch: python train.py --resume {args.out}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()

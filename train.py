"""Train a CL-MAE, or a plain MAE with --masking random, on one device, and evaluate its features.

    python train.py                                  # generated shapes: no download, no GPU, minutes
    python train.py --data cifar10 --model tiny      # for a GPU; or cifar100, imagenette, the path of an image folder
    python train.py --resume runs/cifar10            # go on after an interruption
    python train.py --evaluate runs/cifar10          # kNN and linear probe; --finetune trains the encoder as well

An image folder is flat, without labels, or has a sub-folder per class; so do its train/ and val/ or test/, if any.
A run is a folder: checkpoint.pt, replaced after each epoch; log.jsonl; the figures of visualize.py; evaluation.json.
"""

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import visualize
from clmae import CLMAE, Config, curriculum_factor, load, patchify

MODELS = {
    "nano": dict(dim=96, depth=4, decoder_dim=48, decoder_depth=1, masker_dim=32),
    "tiny": {},  # ViT-Tiny: the defaults of Config
    "small": dict(dim=384, heads=6, decoder_dim=128, decoder_heads=4, masker_dim=64),
}
# What is downloaded: a name, and how torchvision opens its training or held-out part.
DATASETS = {
    "cifar10": lambda root, train: datasets.CIFAR10(root, train, download=True),
    "cifar100": lambda root, train: datasets.CIFAR100(root, train, download=True),
    "imagenette": lambda root, train: datasets.Imagenette(root, "train" if train else "val", "160px", download=True),
}
SUFFIXES = (*IMG_EXTENSIONS, ".gif")
FINETUNE = {"epochs": 50, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 5.0, "min_crop": 0.3}  # --finetune's defaults


def train(args: argparse.Namespace, record: dict | None = None):
    """Train for args.epochs, from the start or on from a record of `load`, and draw the figures."""
    device = pick_device(args)
    data = load_data(args, device)
    torch.manual_seed(args.seed)
    model, optimizer = build(args, data.train.shape[2:], device)
    log, scores = begin(args, data, model, optimizer, record)  # by epoch: figures, scores (8, L) of 8 held-out images
    step_model = torch.compile(model) if args.compile else model
    steps = len(data.train) // args.batch_size  # of an epoch; the last, incomplete batch is dropped
    lam = torch.tensor(args.lambda_start, device=device)  # a tensor: see CLMAE.forward
    for epoch in range(len(log), args.epochs + 1):  # epoch 0 trains nothing: it measures where the others start
        losses, start = torch.zeros(steps, device=device), time.perf_counter()
        for i, (_, images) in enumerate(bar := batches(args, data, model, optimizer, epoch)):  # (B, 3, H, W)
            progress = ((epoch - 1) * steps + i) / max(1, args.epochs * steps - 1)
            lam.fill_(curriculum_factor(progress, args.lambda_start, args.lambda_end))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                output = step_model(images, lam)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = output.mae_loss.detach()  # stays on the device: reading it makes a GPU wait
            if i % 50 == 49:
                bar.set_postfix_str(f"loss {output.mae_loss.item():.4f}, lambda {lam.item():+.2f}")
        losses = losses.cpu()
        rate = steps * args.batch_size / (time.perf_counter() - start)
        if len(bad := losses.isfinite().logical_not().nonzero()):
            raise ValueError(
                f"the loss became {losses[bad[0]].item()} in epoch {epoch}, step {bad[0].item() + 1} of {steps}; "
                f"try a lower --lr; the checkpoint in {args.out} still holds epoch {epoch - 1}"
            )

        # What the epoch did: a record, a line, a checkpoint.
        figures = {"epoch": epoch, "lambda": lam.item()}
        if epoch:
            figures |= {"loss": losses.mean().item(), "lr": optimizer.param_groups[0]["lr"], "images_per_s": rate}
        knn = epoch % args.knn_every == 0 or epoch == args.epochs
        measured, now = measure(model, data, lam, first=epoch == 0, knn=knn)
        log.append(figures | measured)
        scores.append(now[:8].cpu().clone())  # (8, L); a view would save all 500
        print("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items()), flush=True)
        save(args, data, model, optimizer, log, scores)
    visualize.draw(args.out)


# ----------------------------------------------------------------------------------------------------------------------
# Data: the whole set is one uint8 tensor, a batch is an index into it. No worker processes, nothing to wait for.


class Data(NamedTuple):
    """A data set in memory. `val` is held out: never trained on."""

    train: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor  # (N,) class indices; -1 where the images have no classes
    classes: list[str]  # names; empty where the images have no classes
    val: Tensor  # (M, 3, H, W) uint8
    val_labels: Tensor  # (M,)
    objects: Tensor | None = None  # (M, H, W), True where `val` shows a shape; None where that is not known


def load_data(args: argparse.Namespace, device: torch.device | str = "cpu") -> Data:
    """Read what --data names, and set args.patch_size. Without a held-out part, a tenth is held out."""
    held, wanted = args.holdout, args.images and args.images + args.holdout
    parts = [] if args.data == "shapes" else open_data(args.data, args.data_dir)
    first = parts[0][0][0].size if parts else (32, 32)  # of an image
    side = min(args.image_size or (224, *first))
    args.patch_size = args.patch_size or default_patch_size(side)
    if side < args.patch_size:
        raise ValueError(f"the images are only {side} pixels wide or high, less than a patch; see --image-size")
    size = args.image_size or ((side - side % args.patch_size,) * 2 if parts else first)
    if not parts:
        classes, train = SHAPES, shapes(wanted or 10_000 + held, size, seed=1)
        val = None if held else shapes(2_000, size, seed=2)
    else:
        classes = list(parts[0].classes)
        if differ := {*classes} ^ {*parts[-1].classes}:
            raise ValueError(f"the parts of {args.data} have different classes: {sorted(differ)[:5]}")
        train = read_images(parts[0], size, wanted)
        val = read_images(parts[1], size) if len(parts) > 1 and not held else None
    if val is None:
        n = len(train[0])
        held = held or n // 10
        if not 1 <= held < n:
            raise ValueError(f"{n} images in {args.data} are too few: {held or 'a tenth, at least 1,'} to be held out")
        train, val = [x[:-held] for x in train], [x[-held:] for x in train]
    if args.batch_size > len(train[0]):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(train[0])} training images")
    room = torch.cuda.mem_get_info()[0] / 2 if torch.device(device).type == "cuda" else math.inf
    place = device if train[0].nbytes + val[0].nbytes < room else "cpu"  # from where each batch is moved
    return Data(train[0].to(place), train[1].to(place), classes, val[0].to(place), *val[1:])


def default_patch_size(side: int) -> int:
    return 4 if side < 64 else 8 if side < 128 else 16


SHAPES = ["disc", "ring", "square", "frame", "triangle", "cross", "bar", "pair"]


def shapes(n: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw n images (n, 3, H, W) uint8 of four shapes of a kind on stripes; kind, colour, place, angle at random.

    Returns the images, their kinds (n,) and where the shapes are, (n, H, W). The same seed gives the same images.
    """
    (H, W), g = size, torch.Generator().manual_seed(seed)
    images, covered = torch.empty(n, 3, H, W, dtype=torch.uint8), torch.empty(n, H, W, dtype=torch.bool)
    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")  # (H, W)
    quadrant = (x > 0).long() + 2 * (y > 0).long()  # (H, W), one shape in each
    kinds = torch.randint(len(SHAPES), (n,), generator=g)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    for ids in torch.arange(n).split(1000):
        b = len(ids)
        radius, turn = uniform(0.36, 0.44, b, 4)[:, quadrant], uniform(0, 2 * math.pi, b, 4)[:, quadrant]  # (b, H, W)
        dx, dy = ((axis - axis.sign() / 2 - uniform(-0.22, 0.22, b, 4)[:, quadrant]) / radius for axis in (x, y))
        u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()  # (b, H, W), the shape's own axes
        r, square = u.hypot(v), torch.maximum(u.abs(), v.abs())
        bar, upright = torch.maximum(u.abs() - 0.95, v.abs() - 0.25), torch.maximum(v.abs() - 0.95, u.abs() - 0.25)
        sides = torch.stack([u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)])
        pair = torch.minimum((u - 0.5).hypot(v), (u + 0.5).hypot(v))
        outlines = [r - 0.85, (r - 0.7).abs() - 0.18, square - 0.75, (square - 0.62).abs() - 0.16, sides.amax(0) - 0.48]
        outlines += [torch.minimum(bar, upright), bar, pair - 0.36]  # distances, in radii, negative inside
        outline = torch.stack(outlines)[kinds[ids], torch.arange(b)]  # (b, H, W)
        inside = torch.sigmoid(-0.7 * W * radius * outline)[:, None]  # (b, 1, H, W)
        angle, frequency, phase = (uniform(*span, b, 1, 1) for span in ((0, math.pi), (7, 10), (0, 2 * math.pi)))
        stripes = torch.sin((x * angle.cos() + y * angle.sin()) * frequency + phase)[:, None]  # (b, 1, H, W)
        ground, colour = uniform(0, 1, b, 3, 1, 1), uniform(0, 1, b, 3, 1, 1)
        alike = (colour - ground).norm(dim=1, keepdim=True) < 0.6
        colour = torch.where(alike, 1 - ground.round(), colour)
        image = inside * colour + (1 - inside) * (ground + 0.1 * stripes)  # (b, 3, H, W)
        image = image + 0.01 * torch.randn(image.shape, generator=g)
        images[ids], covered[ids] = (image.clamp(0, 1) * 255).to(torch.uint8), inside[:, 0] > 0.5
    return images, kinds, covered


def open_data(name: str, root: str) -> list:
    """The training part and, where there is one, the held-out part, as torchvision's data sets of pictures."""
    if name in DATASETS:
        try:
            return [DATASETS[name](root, train) for train in (True, False)]
        except Exception as error:  # urllib, hashes, disk: whatever it was, the way out is the same
            raise ValueError(f"cannot get {name} ({error}); --data PATH reads images on disk, see --help") from error
    if not os.path.isdir(name):
        raise ValueError(f"--data {name} is neither shapes, {', '.join(DATASETS)} nor a folder")
    folders = {entry.name.lower(): entry.path for entry in os.scandir(name) if entry.is_dir() and entry.name[0] != "."}
    held = [folders[part] for part in ("val", "valid", "validation", "test") if part in folders][:1]
    if held and "train" not in folders:
        raise ValueError(f"{held[0]} has no train/ beside it")
    if "train" in folders and not held and len(folders) > 1:
        raise ValueError(f"{name} has train/ without val/ or test/; if it is no class: --data {folders['train']}")
    paths = [folders["train"], *held] if "train" in folders else [name]
    return [Folder(path, None, None, open_image, lambda file, path=path: is_image(file, path)) for path in paths]


class Folder(datasets.ImageFolder):
    """A folder of images: one sub-folder per class or, unlike torchvision's, flat and without classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        flat = [entry for entry in os.scandir(directory) if is_image(entry.path, directory)]
        if flat and classes:
            raise ValueError(f"{directory} has {len(flat)} images beside folders ({', '.join(classes)[:99]})")
        if not flat and not classes:
            raise ValueError(f"no images in {directory}: expected {' '.join(SUFFIXES)}, flat or a sub-folder per class")
        return classes, {name: i for i, name in enumerate(classes)} or {"": -1}


def is_image(path: str, folder: str) -> bool:
    hidden = any(name.startswith(".") for name in Path(os.path.relpath(path, folder)).parts)  # as .thumbnails/a.jpg
    return path.lower().endswith(SUFFIXES) and not hidden


def open_image(path: str) -> Image.Image:
    """A picture of any mode as RGB, upright."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # photographs of a telephone are stored lying
            if image.mode in ("I", "F"):
                raise ValueError("its 32-bit values have no known range: save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits: convert() would clip them to white
                image = image.point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on broken files
        raise ValueError(f"cannot read the image {path} ({error}); repair or remove it") from error


def read_images(part, size: tuple[int, int], n: int | None = None) -> tuple[Tensor, Tensor]:
    """The first n, or all, of a fixed shuffle: images (n, 3, H, W) uint8, cut to the shape and resized, labels (n,)."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:n].tolist()
    images, labels = torch.empty(len(order), 3, *size, dtype=torch.uint8), torch.empty(len(order), dtype=torch.long)

    def read(i: int):
        image, labels[i] = part[order[i]]
        images[i] = pil_to_tensor(ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.BILINEAR))

    thread_map(read, range(len(order)), desc="decoding", leave=False, disable=None)
    return images, labels


def batches(args: argparse.Namespace, data: Data, model: CLMAE, optimizer: torch.optim.Optimizer, epoch: int) -> tqdm:
    """An epoch's batches: indices (B,) and standardised crops (B, 3, H, W); sets the learning rate for each of them."""
    N, B = len(data.train), args.batch_size
    order = torch.randperm(N).to(data.train.device).split(B)
    steps = N // B if epoch else 0

    def batch(i: int) -> tuple[Tensor, Tensor]:
        lr = args.lr * B / 256 * lr_factor(epoch - 1 + i / steps, args.epochs, args.warmup_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return order[i], augment(model.standardise(data.train[order[i]]), args.min_crop)

    return tqdm(map(batch, range(steps)), f"epoch {epoch}/{args.epochs}", steps, leave=False, disable=None)


def augment(images: Tensor, min_crop: float) -> Tensor:
    """Random-resized crop and flip of each of a batch of images (B, 3, H, W), all at once.

    The crop covers min_crop to 1 of the area, its side ratio is 3/4 to 4/3 as far as that fits, as in MAE's recipe.
    """
    B = len(images)
    u = torch.rand(5, B, device=images.device)
    area = min_crop + (1 - min_crop) * u[0]  # (B,), as a fraction
    widest = (-area.log()).clamp(max=math.log(4 / 3))  # log of the side ratio; a large crop has to be nearly square
    ratio = torch.exp(widest * (2 * u[1] - 1))
    h, w = (area / ratio).sqrt(), (area * ratio).sqrt()  # (B,), sides as fractions
    flip = (u[4] < 0.5).float() * 2 - 1
    theta = torch.zeros(B, 2, 3, device=images.device)  # output to input coordinates, both in [-1, 1]
    theta[:, 0, 0], theta[:, 0, 2] = w * flip, (1 - w) * (2 * u[2] - 1)
    theta[:, 1, 1], theta[:, 1, 2] = h, (1 - h) * (2 * u[3] - 1)
    grid = F.affine_grid(theta, images.shape, align_corners=True)  # (B, H, W, 2)
    return F.grid_sample(images, grid, align_corners=True)


# ----------------------------------------------------------------------------------------------------------------------
# Model, optimiser, device


def build(args: argparse.Namespace, size: tuple[int, int], device: torch.device) -> tuple[CLMAE, torch.optim.AdamW]:
    """Model and optimiser for images of (H, W) pixels: one loss, one backward, one AdamW for the MAE and its masker."""
    own = {name: getattr(args, name) for name in ("patch_size", "mask_ratio", "tau", "norm_pix")} | MODELS[args.model]
    kappa = args.kappa if args.masking == "curriculum" else 0.0
    model = CLMAE(Config(size, kappa=kappa, **own)).to(device)
    return model, torch.optim.AdamW(decayed(model.parameters(), args.weight_decay), betas=(0.9, 0.95), fused=True)


def decayed(parameters: Iterable[Tensor], weight_decay: float, **more) -> list[dict]:
    """Groups for AdamW: matrices have weight decay; biases, norms and tokens have none. MAE, appendix A."""
    matrices, others = [], []
    for p in parameters:
        (matrices if p.ndim in (2, 4) else others).append(p)
    return [{"params": matrices, "weight_decay": weight_decay, **more}, {"params": others, "weight_decay": 0.0, **more}]


def begin(args: argparse.Namespace, data: Data, model: CLMAE, optimizer: torch.optim.Optimizer, record: dict | None):
    """Make a run's folder, or put everything back to where its checkpoint was saved. Returns log and scores so far."""
    c, (N, _, H, W), out = model.config, data.train.shape, Path(args.out)
    if record is None:
        model.std[:], model.mean[:] = torch.std_mean(data.train[:5_000].float(), dim=(0, 2, 3), keepdim=True)
        model.std.clamp_(min=1)  # of images of one colour
        out.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint.pt", "evaluation.json", "step.png"):  # what --overwrite replaces
            (out / name).unlink(missing_ok=True)
    elif (N, c) != (record["N"], saved := Config(**record["config"])):
        raise ValueError(f"{args.data} has changed: {out} has {record['N']} images and {saved}, now {N} and {c}")
    else:
        model.load_state_dict(record["model"])
        optimizer.load_state_dict(record["optimizer"])
        torch.set_rng_state(record["rng"]["cpu"])
        if (kind := model.mean.device.type) != "cpu" and kind in record["rng"]:
            torch.get_device_module(kind).set_rng_state(record["rng"][kind])
    print(
        f"{args.data}: {N:,} training and {len(data.val):,} held-out images of {H} x {W} pixels, {len(data.classes)} "
        f"classes; {c.patches} patches, {c.visible} visible; {args.epochs} epochs on {model.mean.device}"
    )
    return (record["log"], record["scores"]) if record else ([], [])


def pick_device(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the best there is. bfloat16 matmuls, --amp, are the default on CUDA only."""
    name = args.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]})") from error
    device = torch.device(name)
    if device.index:
        torch.get_device_module(device).set_device(device)  # for all that takes no device: memory, random state
    args.amp = device.type == "cuda" if args.amp is None else args.amp
    return device


def lr_factor(epoch: float, epochs: int, warmup: float) -> float:
    """Fraction of the peak learning rate: linear warm-up, then half a cosine down to 0. MAE, appendix A.1."""
    warmup = min(warmup, epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation. Features are the mean of the patch tokens of the whole, unmasked image.


@torch.inference_mode()
def measure(model: CLMAE, data: Data, lam: Tensor | float, first: bool, knn: bool) -> tuple[dict, Tensor]:
    """A log's figures on held-out images at this lambda, and the scores (500, L) of the first of them.

    hardness = loss under the learned masks / loss under random masks, with the same noise: below 1 the masker helps,
    above 1 it opposes. The first record has floors as well: loss_trivial, of predicting each patch's own mean;
    knn_pixels, of raw pixels; objects_contrast, of hiding patches of high contrast.
    """
    images, p = model.standardise(data.val[:500]), model.config.patch_size
    random, learned = (model(images, x, torch.Generator(images.device).manual_seed(0)) for x in (0.0, lam))
    losses = [((o.patch_loss * o.mask).sum() / o.mask.sum()).item() for o in (random, learned)]
    figures = {"loss_random": losses[0], "hardness": losses[1] / losses[0]}
    if not math.isfinite(figures["loss_random"]):
        raise ValueError("the model is no longer finite after the last step of the epoch; try a lower --lr")
    if model.masker:
        figures["diversity"] = diversity(learned.scores)
    if model.masker and data.objects is not None:
        figures["objects"] = objects(learned.scores, data.objects[:500], p)
    if knn and data.classes:
        figures["knn"] = knn_accuracy(*vectors(model, data), data)
    if first:
        figures["loss_trivial"] = model.target(images).var(-1, unbiased=False).mean().item()
        if data.objects is not None:
            figures["objects_contrast"] = objects(-patchify(images, p).std(-1), data.objects[:500], p)
        if data.classes:
            figures["knn_pixels"] = knn_accuracy(*vectors(None, data), data)
    return figures, learned.scores


def diversity(scores: Tensor) -> float:
    """The share of the variance over tokens, of scores (B, L), that differs from image to image.

    0: one mask for all images. B unrelated images have 1 - 1/B. 1 where there is no variance, as at lambda = 0.
    """
    scores = scores - scores.mean(1, keepdim=True)
    common = scores.mean(0).square().mean()  # what all images share
    return 1 - (common / scores.square().mean().clamp_min(1e-12)).item()


def objects(scores: Tensor, where: Tensor, patch_size: int) -> float:
    """How well "hidden more often", a low score (N, L), tells the patches that show an object.

    where: (N, H, W), True on objects; a patch shows one if a fifth of it does. Area under the ROC curve per image,
    averaged: the chance that of two patches, one of each kind, the object's is hidden more often. 0.5 is chance; above
    it masks hide the objects, below it they show them.
    """
    shown = patchify(where[:, None].to(scores.device).float(), patch_size).mean(-1) >= 0.2  # (N, L)
    pairs = shown[:, :, None] & ~shown[:, None, :]  # (N, L, L)
    wins = ((scores[:, None, :] - scores[:, :, None]).sign() + 1) / 2  # (N, L, L), 1/2 for a tie
    return ((wins * pairs).sum((1, 2)) / pairs.sum((1, 2))).nanmean().item()


@torch.no_grad()
def encode(model: CLMAE | None, images: Tensor) -> Tensor:
    """Features (n, D) of uint8 images (n, 3, H, W); without a model their pixels, shrunk to 32 x 32 if larger."""
    device = (images if model is None else model.mean).device  # the images' may be another, see load_data
    parts = images.split(64 if device.type == "cpu" else 1000)  # as many as a CPU's cache holds
    if model is None:
        small = [min(32, side) for side in images.shape[2:]]
        return torch.cat([F.adaptive_avg_pool2d(x.float(), small).flatten(1) for x in parts])
    return torch.cat([model.features(model.standardise(x)) for x in parts])


def vectors(model: CLMAE | None, data: Data) -> tuple[Tensor, Tensor]:
    """`encode` of the training (N, D) and the held-out images (M, D), each of the D z-scored on the former."""
    train, val = encode(model, data.train), encode(model, data.val)
    mean, std = train.mean(0), train.std(0) + 1e-6
    return (train - mean) / std, (val - mean) / std


def knn_accuracy(train: Tensor, val: Tensor, data: Data, k: int = 20) -> float:
    """Accuracy in % of k nearest neighbours by cosine of features (N, D), votes exp(cosine / 0.07)."""
    train, val = F.normalize(train), F.normalize(val)
    labels = data.train_labels.to(train.device)
    votes = torch.zeros(len(val), len(data.classes), device=val.device)  # (M, classes)
    for z, vote in zip(val.split(1000), votes.split(1000), strict=True):
        cosine, ids = (z @ train.T).topk(min(k, len(train)), dim=1)  # (1000, k)
        vote.scatter_add_(1, labels[ids], (cosine / 0.07).exp())
    return accuracy(votes, data)


def linear_probe(train: Tensor, val: Tensor, data: Data) -> float:
    """Accuracy in % of logistic regression on frozen features (N, D): full-batch L-BFGS, L2 penalty 1e-4."""
    labels = data.train_labels.to(train.device)
    head = nn.Linear(train.shape[1], len(data.classes), device=train.device)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(head(val), data)


def accuracy(logits: Tensor, data: Data) -> float:
    """In %, of logits (M, classes) for the held-out images."""
    return 100 * (logits.argmax(1).cpu() == data.val_labels).double().mean().item()


def finetune(model: CLMAE, data: Data, args: argparse.Namespace) -> float:
    """Train encoder and a linear head on its pooled tokens; held-out accuracy in % after the last epoch.

    AdamW, a learning rate that shrinks by 0.75 a block from the head down (MAE, appendix A.2), label smoothing 0.1.
    """
    torch.manual_seed(args.seed)  # each encoder gets the same head, order and crops
    device, encoder = model.mean.device, model.encoder
    head = nn.Linear(model.config.dim, len(data.classes), device=device)
    nn.init.trunc_normal_(head.weight, std=0.02)
    stages = [nn.ModuleList([head, encoder.norm]), *reversed(encoder.blocks), encoder.patch_embed]
    groups = decayed([encoder.cls_token], args.weight_decay, lr_scale=0.75 ** (len(stages) - 1))
    for depth, stage in enumerate(stages):
        groups += decayed(stage.parameters(), args.weight_decay, lr_scale=0.75**depth)
    optimizer = torch.optim.AdamW(groups, fused=True)
    features = torch.compile(model.features) if args.compile else model.features
    for epoch in range(1, args.epochs + 1):
        for ids, images in batches(args, data, model, optimizer, epoch):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = head(features(images))  # (B, classes)
            loss = F.cross_entropy(logits.float(), data.train_labels[ids].to(device), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not loss.isfinite():
            raise ValueError(f"the loss of fine-tuning became {loss.item()} in epoch {epoch}; try a lower --lr")
    return accuracy(head(encode(model, data.val)), data)


def evaluate(args: argparse.Namespace, model: CLMAE, record: dict):
    """--evaluate, or --finetune: a run's encoder, and beside it the floors."""
    file = Path(args.out, "evaluation.json")
    results = json.loads(file.read_text()) if file.exists() else {}  # before the work: if it fails, nothing is lost
    device = pick_device(args)
    data = load_data(args, device)
    if not data.classes:
        raise ValueError(f"an evaluation needs class labels; the images of {args.data} have none")
    torch.manual_seed(args.seed)
    untrained = CLMAE(model.config)
    untrained.mean, untrained.std = model.mean, model.std
    encoders = {"pretrained": model.to(device), "random_init": untrained.to(device)}
    told = {"pretrained_epochs": record["epoch"], "train_images": len(data.train), "held_out": len(data.val)}
    if args.finetune is None:
        encoders["pixels"] = None
    else:
        told["finetune_epochs"] = args.epochs
    for name, encoder in encoders.items():
        if args.finetune is None:
            both = vectors(encoder, data)
            found = {"knn": knn_accuracy(*both, data), "linear_probe": linear_probe(*both, data)}
        else:
            found = {"finetune": finetune(encoder, data, args)}
        for what, value in found.items():
            results.setdefault(what, {}).update(told | {name: value})
            print(f"{what}, {name}: {value:.2f} %", flush=True)
    replace(file, (json.dumps(results, indent=2) + "\n").encode())
    print(f"written to {file}")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint


def save(args: argparse.Namespace, data: Data, model: CLMAE, optimizer: torch.optim.Optimizer, log: list, scores: list):
    """Write checkpoint.pt, the RECORD that clmae.py describes, and the log as log.jsonl."""
    rng = {"cpu": torch.get_rng_state()}
    if (kind := model.mean.device.type) != "cpu":
        rng[kind] = torch.get_device_module(kind).get_rng_state()
    told = {"options": vars(args), "config": asdict(model.config), "N": len(data.train), "epoch": len(log) - 1}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}
    told |= {"log": log, "scores": scores, "images": data.val[:8].cpu().clone()}
    torch.save(told | state, buffer := io.BytesIO())
    replace(Path(args.out, "checkpoint.pt"), buffer.getbuffer())
    replace(Path(args.out, "log.jsonl"), "".join(json.dumps(figures) + "\n" for figures in log).encode())


def replace(file: Path, content: bytes):
    """Write a file so that at every moment a whole one, the old or the new, is there."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the earlier one is still whole" if file.exists() else ""
        raise OSError(f"cannot write {file} ({error.strerror}){kept}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def benchmark(args: argparse.Namespace, repeats: int = 20):
    """--benchmark: time steps of plain MAE and of CL-MAE in turns, a new batch each."""
    from torch.utils.benchmark import Timer  # slow to import

    device, size, B = pick_device(args), args.image_size or (32, 32), args.batch_size
    args.patch_size = args.patch_size or default_patch_size(min(size))
    images = torch.randint(0, 256, (B, 3, *size), dtype=torch.uint8, device=device)
    lam, timers, flops = torch.tensor(-0.5, device=device), {}, {}

    def step(forward, model: CLMAE, optimizer: torch.optim.Optimizer):
        x = augment(model.standardise(images), args.min_crop)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            loss = forward(x, lam).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for args.masking in ("random", "curriculum"):
        model, optimizer = build(args, size, device)
        with FlopCounterMode(display=False) as counter:
            step(model, model, optimizer)
        flops[args.masking] = counter.get_total_flops()
        used = {"step": step, "all": (torch.compile(model) if args.compile else model, model, optimizer)}
        timers[args.masking] = Timer("step(*all)", globals=used, num_threads=torch.get_num_threads())
    turns = [[t.timeit(1 if device.type == "cpu" else 10).mean for t in timers.values()] for _ in range(repeats)]
    seconds = torch.tensor(turns).T  # (2, repeats)
    ratios = (seconds / seconds[0]).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1).T.tolist()
    print(f"{args.model}, {size[0]} x {size[1]} pixels, batch {B}, {device}, torch {torch.__version__}")
    print("             ms (median)  against random (quartiles)  images/s  TFLOP/s")
    for name, t, (low, middle, high) in zip(timers, seconds.median(1).values.tolist(), ratios, strict=True):
        against, speed = f"{middle:.3f} ({low:.3f} to {high:.3f})", flops[name] / t / 1e12
        print(f"{name:12}{1000 * t:12.2f}  {against}{B / t:15.0f}{speed:9.2f}")
    if device.type == "cuda":
        print(f"peak memory, both models: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def pixels(text: str) -> tuple[int, int]:
    """An argparse type: height and width, as in 48x64, or one for both."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = visualize.fail

    def add(option: str, default, text: str, low: float | None = None, high: float = math.inf, **more):
        """An option of the `group` last named below; with low, a finite number between low and high."""
        kind = float if isinstance(default, float) else int

        def number(text: str) -> float:
            value = kind(text)
            if not low <= value <= high or math.isinf(value):
                raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
            return value

        number.__name__ = kind.__name__  # argparse names it when kind(text) fails
        more |= {} if low is None else {"type": number, "metavar": "X"}
        shown = "" if default is None or isinstance(default, bool) else f" (default: {default})"
        group.add_argument(option, default=default, help=text + shown, **more)

    toggle, own = argparse.BooleanOptionalAction, " ".join(f"--{k.replace('_', '-')} {v}" for k, v in FINETUNE.items())
    group = parser.add_argument_group("data")
    add("--data", "shapes", f"shapes (generated), {', '.join(DATASETS)} (downloaded), or the path of an image folder")
    add("--data-dir", "data", "where downloads go")
    add("--images", None, "use so many of the training images; shapes: draw so many, by default 10,000", 1)
    add("--image-size", None, "HxW or a side; default: square, the first image's smaller side, up to 224", type=pixels)
    add("--holdout", 0, "evaluate on so many other training images, not on val/ or test/: for tuning", 0)
    group = parser.add_argument_group("model")
    add("--model", "nano", "nano (a CPU in minutes), tiny (ViT-Tiny), small (ViT-Small)", choices=list(MODELS))
    add("--patch-size", None, "pixels; default 4 for images below 64 pixels, 8 below 128, else 16", 1)
    add("--norm-pix", True, "predict patches standardised each by itself; on by default", action=toggle)
    group = parser.add_argument_group("masking")
    add("--masking", "curriculum", "masks learned, or random: plain MAE", choices=["curriculum", "random"])
    add("--mask-ratio", 0.75, "fraction of the patches that is masked", 0, 1)
    add("--lambda-start", 1.0, "curriculum factor at the first step: 1 partner, -1 adversary", -1, 1)
    add("--lambda-end", -1.0, "curriculum factor at the last step", -1, 1)
    add("--kappa", 2.0, "strength of the masks at |lambda| = 1; the sampler's noise has a std of 1.28", 1e-6)
    add("--tau", 1.0, "temperature of the straight-through gradient", 1e-6)
    group = parser.add_argument_group("training")
    add("--epochs", 10, "passes over the training images", 1)
    add("--batch-size", 64, "images a step", 1)
    add("--lr", 4e-3, "peak learning rate for 256 images a step; it scales with the batch", 0)
    add("--weight-decay", 0.05, "of matrices; biases, norms and tokens have none", 0)
    add("--warmup-epochs", 2.0, "epochs in which the learning rate rises", 0)
    add("--min-crop", 0.2, "smallest area of the random-resized crop; 1: no crop", 0.01, 1)
    add("--seed", 0, "of weights, order, crops and masks", 0, 2**63 - 1)
    group = parser.add_argument_group("machine and output")
    add("--device", None, "cuda, mps or cpu; default the first that is there")
    add("--amp", None, "bfloat16 matmuls; default on CUDA only", action=toggle)
    add("--compile", False, "torch.compile the model", action="store_true")
    add("--knn-every", 5, "epochs from one kNN evaluation to the next", 1)
    add("--out", None, "run folder; default runs/ and the name of the data, with -random if masks are")
    add("--overwrite", False, "replace the run in that folder", action="store_true")
    group = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    add("--resume", None, "go on with an interrupted run", metavar="RUN")
    add("--evaluate", None, "kNN and linear probe of a run's frozen encoder", metavar="RUN")
    add("--finetune", None, f"train encoder and classifier; its own defaults are {own}", metavar="RUN")
    add("--benchmark", False, "time training steps of this --model, --batch-size ...", action="store_true")
    return parser


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    parser = build_parser()
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.backends.cudnn.deterministic = True  # the same seed, the same result
    with visualize.one_line_errors():
        args, record = parser.parse_args(argv), None
        if args.benchmark:
            return benchmark(args)
        run = next((run for run in (args.resume, args.evaluate, args.finetune) if run is not None), None)
        if run is not None:
            model, record = load(run)
            # The run's options, today's default for one that is newer; typed ones are laid over them.
            saved = vars(parser.parse_args([])) | record["options"] | {"out": run, "resume": None}
            free = {"device", "compile", "data", "data_dir", "knn_every", "resume", "evaluate", "finetune"}
            if args.resume is None:
                saved |= {"device": None, "amp": None, "image_size": model.config.image_size}
                saved |= FINETUNE if args.finetune is not None else {}
                free |= {"amp", "seed", "weight_decay", *FINETUNE}
            args = parser.parse_args(argv, argparse.Namespace(**saved))
            for name in sorted(saved.keys() - free):
                if (given := getattr(args, name)) != saved[name]:
                    raise ValueError(f"--{name.replace('_', '-')} {given}: {run} has {saved[name]}, and keeps it")
            if args.resume is None:
                return evaluate(args, model, record)
        else:
            if args.masking == "random":
                args.lambda_start = args.lambda_end = 0.0  # there is no masker: neutral in the log and the figures
            name = Path(args.data).resolve().name if os.path.isdir(args.data) else args.data
            args.out = args.out or f"runs/{name}" + ("-random" if args.masking == "random" else "")
            if Path(args.out, "checkpoint.pt").exists() and not args.overwrite:
                raise ValueError(f"{args.out} exists: --resume {args.out} goes on with it, --overwrite replaces it")
        try:
            train(args, record)
        except KeyboardInterrupt:
            if Path(args.out, "checkpoint.pt").exists():
                print(f"\nto go on from the last whole epoch: python train.py --resume {args.out}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()

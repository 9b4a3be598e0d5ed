"""Train a CL-MAE, or a plain MAE with --masking random, on one device, and measure its features.

    python train.py                                  # generated shapes: minutes on two CPU cores, kNN about 43 %
    python train.py --data cifar10 --model tiny      # for a GPU; or cifar100, imagenette, the path of an image folder
    python train.py --resume runs/cifar10            # go on after an interruption, or with more --epochs
    python train.py --finetune runs/cifar10          # train the encoder as a classifier, beside one from scratch

An image folder is flat, without labels, or has a sub-folder per class; so do its train/ and val/ or test/, if any.
A run is a folder: checkpoint.pt, replaced after each epoch; log.jsonl; the figures of visualize.py.
"""

import argparse
import io
import json
import math
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor, nn
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


def train(args: argparse.Namespace, model: CLMAE | None = None, record: dict | None = None):
    """Train for args.epochs from the start, or on from the model and the record of `load`, and draw the figures."""
    device = pick_device(args.device)
    data = load_data(args, device)
    N, B = len(data.images), args.batch_size
    steps = N // B  # of an epoch; the last, incomplete batch is dropped

    torch.manual_seed(args.seed)
    model, optimizer = build(args, data, device, model)
    lam = torch.tensor(args.lambda_start, device=device)  # a tensor: see CLMAE.forward
    forward = Losses(args, model, (B, *data.images.shape[1:]), lam)
    means = image_means(data)  # once: they stay what they are
    log, scores = [], []  # by epoch: figures; scores (8, L) of 8 held-out images
    if record is not None:
        log, scores = record["log"], record["scores"]
        restore(args, data, means, optimizer, record)
    c = model.config
    kinds = f"{len(data.classes)} classes ({', '.join(data.classes[:3])}, ...)"
    if not data.labelled:
        kinds = f"no labels ({', '.join(data.classes) or 'no'} class alone)"
    print(f"{args.data}: {N:,} training and {len(data.val_images):,} held-out images, {kinds}")
    sizes = f"{c.image_size} pixels, {c.patches} patches, {c.visible} visible"
    print(f"{sizes}; {args.epochs} epochs on {device}", flush=True)

    for epoch in range(len(log), args.epochs + 1):  # epoch 0 has no batches: it measures where the others start
        order = torch.randperm(N).to(data.images.device).split(B)
        bar = tqdm(range(min(epoch, 1) * steps), f"epoch {epoch}/{args.epochs}", leave=False, disable=None)
        losses = torch.zeros(len(bar), device=device)
        start = time.perf_counter()
        for i in bar:
            progress = ((epoch - 1) * steps + i) / max(1, args.epochs * steps - 1)
            lam.fill_(curriculum_factor(progress, args.lambda_start, args.lambda_end))
            set_learning_rate(optimizer, args, epoch - 1 + i / steps)

            images = augment(model.standardise(data.images[order[i]]), args.min_crop)  # (B, 3, H, W)
            loss, mae_loss = forward(images, lam)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            losses[i] = mae_loss.detach()  # stays on the device: reading it makes a GPU wait
            if i % 50 == 49:
                bar.set_postfix_str(f"loss {mae_loss.item():.4f}, lambda {lam.item():+.2f}")
        losses = losses.cpu()
        rate = len(bar) * B / (time.perf_counter() - start)
        if not losses.isfinite().all():
            i = losses.isfinite().int().argmin().item()  # the first that is not
            where = f"{losses[i].item()} in epoch {epoch}, step {i + 1} of {steps}"
            raise ValueError(f"the loss became {where}; try a lower --lr; {args.out} still holds epoch {epoch - 1}")

        # What the epoch did: a record, a line, a checkpoint.
        figures = {"epoch": epoch, "lambda": lam.item()}
        if epoch:
            figures |= {"loss": losses.mean().item(), "lr": optimizer.param_groups[0]["lr"], "images_per_s": rate}
        due = epoch % args.evaluate_every == 0 or epoch == args.epochs
        measured, now = measure(model, data, lam, floors=epoch == 0, features=due)
        log.append(figures | measured)
        scores.append(now[:8].cpu().clone())  # (8, L); a view would save all 500
        print("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items()), flush=True)
        save(args, data, means, model, optimizer, log, scores)
    visualize.draw(args.out)


# ---- Data ------------------------------------------------------------------------------------------------------------
SHAPES = ["disc", "ring", "square", "frame", "triangle", "cross", "bar", "pair"]
IMAGENETTE = [9469, 3925]  # images of its two parts: torchvision takes a download that was cut short for the whole
# What is downloaded: a name, and how torchvision opens its training or held-out part.
DATASETS = {
    "cifar10": lambda root, train: datasets.CIFAR10(root, train, download=True),
    "cifar100": lambda root, train: datasets.CIFAR100(root, train, download=True),
    "imagenette": lambda root, train: datasets.Imagenette(root, "train" if train else "val", "160px", download=True),
}
SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".heic", ".heif", ".avif")  # some need a plugin of Pillow's
Image.MAX_IMAGE_PIXELS = None  # telephones reach 200 million, which Pillow takes for an attack
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # what editors write about a picture can be long


class Data(NamedTuple):
    """A data set in memory: no worker processes, a batch is an index. `val` is held out: never trained on."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) class indices
    classes: list[str]  # names
    patch_size: int  # pixels
    val_images: Tensor  # (M, 3, H, W) uint8
    val_labels: Tensor  # (M,)
    covered: Tensor | None = None  # (M, H, W), True where val_images show a shape; None where that is not known

    @property
    def labelled(self) -> bool:
        return len(self.classes) > 1  # of one there is nothing to tell


def load_data(args: argparse.Namespace, device: torch.device | str = "cpu") -> Data:
    """Read what --data names. Without a held-out part, a tenth is held out."""
    first = (32, 32)  # width and height of an image
    if args.data != "shapes":
        parts = open_data(args.data, args.data_dir)
        first = open_image(parts[0][0][0][0]).size
    size = args.image_size or min(224, *first)
    if isinstance(size, int):  # an older run may have a height and a width
        size = (size, size)
    patch_size = args.patch_size or 4 * 2 ** ((min(size) >= 64) + (min(size) >= 128))
    if args.image_size is None:
        size = tuple(side - side % patch_size for side in size)
    if min(size) < patch_size:
        raise ValueError(f"the images are only {min(*first)} pixels wide or high, less than a patch; see --image-size")

    wanted = args.images and args.images + args.holdout
    val = None
    if args.data == "shapes":
        known = shapes(wanted or 10_000 + args.holdout, size, seed=1)
        classes = SHAPES
        if not args.holdout:
            val = shapes(2_000, size, seed=2)
    else:
        known = read_images(parts[0][0], size, wanted)
        classes = parts[0][1]
        if classes is None:
            classes = [str(label) for label in range(int(known[1].max()) + 1)]
        if len(parts) > 1 and not args.holdout:
            val = read_images(parts[1][0], size)

    if val is None:
        n = len(known[0])
        held = args.holdout or n // 10
        if not 1 <= held < n:
            raise ValueError(f"{n} images in {args.data} are too few: {held or 'a tenth, at least 1,'} to be held out")
        val = [x[-held:] for x in known]
        known = [x[:-held] for x in known]
    if args.batch_size > len(known[0]):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(known[0])} training images")
    if torch.device(device).type == "cuda" and known[0].nbytes + val[0].nbytes > torch.cuda.mem_get_info()[0] / 2:
        device = "cpu"  # from where each batch is moved
    return Data(known[0].to(device), known[1].to(device), list(classes), patch_size, val[0].to(device), *val[1:])


def shapes(n: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, H, W) uint8 of four shapes of a kind on stripes, their kinds (n,), where shapes are (n, H, W)."""
    (H, W), g = size, torch.Generator().manual_seed(seed)
    images, covered = torch.empty(n, 3, H, W, dtype=torch.uint8), torch.empty(n, H, W, dtype=torch.bool)
    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")  # (H, W)
    quadrant = (x > 0).long() + 2 * (y > 0).long()  # (H, W), one shape in each
    kinds = torch.randint(len(SHAPES), (n,), generator=g)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    for ids in torch.arange(n).split(1000):
        b = len(ids)
        radius = uniform(0.36, 0.44, b, 4)[:, quadrant]  # (b, H, W)
        turn = uniform(0, 2 * math.pi, b, 4)[:, quadrant]
        dx, dy = ((axis - axis.sign() / 2 - uniform(-0.22, 0.22, b, 4)[:, quadrant]) / radius for axis in (x, y))
        u = dx * turn.cos() + dy * turn.sin()  # (b, H, W), the shape's own axes, in radii
        v = dy * turn.cos() - dx * turn.sin()

        r, square = u.hypot(v), torch.maximum(u.abs(), v.abs())
        bar = torch.maximum(u.abs() - 0.95, v.abs() - 0.25)
        upright = torch.maximum(v.abs() - 0.95, u.abs() - 0.25)
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
        images[ids] = (image.clamp(0, 1) * 255).to(torch.uint8)
        covered[ids] = inside[:, 0] > 0.5
    return images, kinds, covered


def open_data(name: str, root: str) -> list[tuple]:
    """The training part and, where there is one, the held-out part: pictures with labels, and names of the classes."""
    if name in DATASETS:
        try:
            parts = [DATASETS[name](root, train) for train in (True, False)]
            if name == "imagenette" and [len(part) for part in parts] != IMAGENETTE:
                raise ValueError(f"{root}/imagenette2-160 is incomplete: delete it, to have it downloaded anew")
            return [(part, getattr(part, "classes", None)) for part in parts]
        except Exception as error:  # urllib, hashes, disk: whatever it was, the way out is the same
            raise ValueError(f"cannot get {name} ({error}); --data PATH reads images on disk, see --help") from error
    if not os.path.isdir(name):
        raise ValueError(f"--data {name} is neither shapes, {', '.join(DATASETS)} nor a folder")

    folders = {folder[:-1].lower(): os.path.join(name, folder[:-1]) for folder in glob("*/", root_dir=name)}
    known = [folders[part] for part in ("train", "training") if part in folders][:1]
    held = [folders[part] for part in ("val", "valid", "validation", "test", "testing") if part in folders][:1]
    if held and not known:
        raise ValueError(f"{held[0]} has no train/ beside it")
    if known and not held and len(folders) > 1:
        raise ValueError(f"{name} has train/ without val/ or test/; if it is no class: --data {known[0]}")
    seen = set()
    parts = [open_folder(path, seen) for path in (known + held or [name])]
    differ = ", ".join(sorted({*parts[0][1]} ^ {*parts[-1][1]})[:3])
    if differ:
        way = f"--data {known[0]} reads the first alone and holds out a tenth of it"
        raise ValueError(f"{known[0]} and {held[0]} have different classes, such as {differ}; {way}")
    return parts


def open_folder(path: str, seen: set[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Files with labels, and names of the classes, of a folder of pictures, flat or a sub-folder per class.

    A class has its pictures in one place, each once: not thumbnails beside originals, nor parts, nor links to the same.
    """
    classes = sorted(name[:-1] for name in glob("*/", root_dir=path))  # glob does not see what is hidden
    classes = [name for name in classes if name not in ("@eaDir", "__MACOSX")]  # nor is this anybody's class
    flat = pictures(path)
    if flat and classes:
        raise ValueError(f"{path} has {len(flat)} images beside folders ({', '.join(classes)[:99]})")
    if not flat and not classes:
        raise ValueError(f"no images in {path}: expected {' '.join(SUFFIXES)}, flat or a sub-folder per class")

    samples = []
    for label, folder in enumerate([os.path.join(path, name) for name in classes] or [path]):
        os.listdir(folder)  # glob would take one that may not be read for empty
        deep = pictures(folder, "*/*/*")
        files = pictures(folder) + pictures(folder, "*/*") + deep
        places = sorted({os.path.dirname(file) for file in files})
        if deep or len(places) != 1:
            why = f"its images lie in it or in one folder below; here in {', '.join(places)[:99] or 'none'}"
            raise ValueError(f"{folder} is no class: {why}; --data takes the folder of classes, or of train/ and val/")
        real = {os.path.realpath(file) for file in files}
        if len(real) < len(files) or seen & real:
            raise ValueError(f"a link in {folder} leads to a picture that is there already: none may be there twice")
        seen |= real
        samples += [(file, label) for file in files]
    return samples, classes


def pictures(folder: str, pattern: str = "*") -> list[str]:
    """The paths of the picture files in a folder, in order."""
    return [os.path.join(folder, n) for n in sorted(glob(pattern, root_dir=folder)) if n.lower().endswith(SUFFIXES)]


def open_image(image: str | Image.Image) -> Image.Image:
    """A picture, or that of a file, as RGB, upright (a telephone stores photographs lying), transparent parts white."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = image
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}: save it with 8")
            if image.has_transparency_data:
                image = image.convert("RGBA")
            with suppress(Exception):  # damaged metadata are no reason to do without the picture
                image.getexif()  # stays; other metadata, which exif_transpose may stumble over, go
                image.info.clear()
                image = ImageOps.exif_transpose(image)
            if image.mode == "RGBA":  # what is transparent has any colour, mostly black, as the figure on it may have
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"Pillow cannot read {path}: save it as JPEG or PNG, or remove it") from error
    except Exception as error:  # Pillow raises many kinds on broken files
        raise ValueError(f"cannot read the image {path} ({error}); repair or remove it") from error


def read_images(samples, size: tuple[int, int], n: int | None = None) -> tuple[Tensor, Tensor]:
    """The first n, or all, of a fixed shuffle: images (n, 3, H, W) uint8, cut to the shape and resized, labels (n,)."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:n].tolist()
    images = torch.empty(len(order), 3, *size, dtype=torch.uint8)
    labels = torch.empty(len(order), dtype=torch.long)

    def read(i: int):
        image, labels[i] = samples[order[i]]
        images[i] = pil_to_tensor(ImageOps.fit(open_image(image), size[::-1], Image.Resampling.BILINEAR))

    thread_map(read, range(len(order)), desc="decoding", leave=False, disable=None)
    return images, labels


def augment(images: Tensor, min_crop: float) -> Tensor:
    """Crop and flip each of images (B, 3, H, W) as MAE's recipe: min_crop to 1 of the area, side ratio 3/4 to 4/3."""
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


# ---- Model, optimiser, device ----------------------------------------------------------------------------------------
def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is."""
    if name is None and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not there; without the option the best that is there is taken") from error


def build(args: argparse.Namespace, data: Data, device: torch.device, model: CLMAE | None = None) -> tuple:
    """Model, if there is none yet, and optimiser: one loss, one backward, one AdamW for the MAE and its masker."""
    if model is None:
        own = {name: getattr(args, name) for name in ("mask_ratio", "tau", "norm_pix")} | MODELS[args.model]
        kappa = args.kappa if args.masking == "curriculum" else 0.0
        model = CLMAE(Config(tuple(data.images.shape[2:]), data.patch_size, kappa=kappa, **own))
        model.std[:], model.mean[:] = torch.std_mean(data.images[:5_000].float(), dim=(0, 2, 3), keepdim=True)
        model.std.clamp_(min=1)  # of images of one colour
    model = model.to(device)
    return model, torch.optim.AdamW(decayed(model.parameters(), args.weight_decay), betas=(0.9, 0.95), fused=True)


def decayed(parameters, weight_decay: float, **more) -> list[dict]:
    """Groups for AdamW: matrices have weight decay; biases, norms and tokens have none. MAE, appendix A."""
    matrices, others = [], []
    for p in parameters:
        (matrices if p.ndim in (2, 4) else others).append(p)
    return [{"params": matrices, "weight_decay": weight_decay, **more}, {"params": others, "weight_decay": 0.0, **more}]


class Losses(nn.Module):
    """loss and mae_loss of a model, only the first with a gradient; with --graph each pass is one CUDA graph."""

    def __init__(self, args: argparse.Namespace, model: CLMAE, shape: tuple, lam: Tensor):
        super().__init__()
        if args.compile and args.graph:
            raise ValueError("--compile and --graph exclude each other: leave one out, or say --no-compile, --no-graph")
        if args.compile:
            print("compiling: the first step takes a minute or more", flush=True)
            model = torch.compile(model)
        self.args = args
        self.model = model
        if args.graph and lam.device.type == "cuda":
            state = torch.cuda.get_rng_state()
            images = torch.zeros(shape, device=lam.device)
            torch.cuda.make_graphed_callables(self, (images, lam), allow_unused_input=True)
            torch.cuda.set_rng_state(state)  # capturing has drawn masks
        elif args.graph:
            print(f"--graph does nothing on {lam.device}: it is for CUDA")

    def forward(self, images: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.args, images.device):
            output = self.model(images, lam)
        return output.loss, output.mae_loss.detach()


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """bfloat16 matmuls under --amp, the default on CUDA only."""
    enabled = device.type == "cuda" if args.amp is None else args.amp
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False)  # CUDA graphs refuse the cache


def set_learning_rate(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: float):
    """Linear warm-up to --lr, which is for 256 images, then half a cosine down to 0. MAE, appendix A.1."""
    warmup = min(args.warmup_epochs, args.epochs / 2)
    factor = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))
    if epoch < warmup:
        factor = epoch / warmup
    for group in optimizer.param_groups:
        group["lr"] = args.lr * args.batch_size / 256 * factor * group.get("lr_scale", 1.0)


# ---- Evaluation ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(model: CLMAE, data: Data, lam: Tensor | float, floors: bool, features: bool) -> tuple[dict, Tensor]:
    """A log's figures on held-out images at this lambda, and the scores (500, L) of the first of them.

    hardness = loss under the learned masks / loss under random masks, with the same noise: below 1 the masker helps,
    above 1 it opposes. features: kNN and linear probe. floors: loss_trivial, of predicting each patch's own mean;
    knn_pixels, of raw pixels; objects_contrast, of hiding patches of high contrast.
    """
    images = model.standardise(data.val_images[:500])
    p = model.config.patch_size
    random, learned = (model(images, x, torch.Generator(images.device).manual_seed(0)) for x in (0.0, lam))
    loss_random, loss_learned = (((o.patch_loss * o.mask).sum() / o.mask.sum()).item() for o in (random, learned))
    if not math.isfinite(loss_random):
        raise ValueError("the model is no longer finite after the last step of the epoch; try a lower --lr")

    figures = {"loss_random": loss_random, "hardness": loss_learned / loss_random}
    if model.masker:
        figures["diversity"] = diversity(learned.scores)
    if model.masker and data.covered is not None:
        figures["objects"] = objects(learned.scores, data.covered[:500], p)
    if features and data.labelled:
        z, z_val = encode(model, data.images), encode(model, data.val_images)
        figures |= evaluate(z, data.labels, z_val, data.val_labels)
    if floors:
        figures["loss_trivial"] = model.target(images).var(-1, unbiased=False).mean().item()
    if floors and data.covered is not None:
        figures["objects_contrast"] = objects(-patchify(images, p).std(-1), data.covered[:500], p)
    if floors and data.labelled:
        z, z_val = encode(None, data.images), encode(None, data.val_images)
        figures["knn_pixels"] = evaluate(z, data.labels, z_val, data.val_labels, probe=False)["knn"]
    return figures, learned.scores


def diversity(scores: Tensor) -> float:
    """The share of the variance of scores (B, L) that images do not share: 0 for one mask, 1 for nothing in common."""
    scores = scores - scores.mean(1, keepdim=True)
    common = scores.mean(0).square().mean()  # what all images share
    return 1 - (common / scores.square().mean().clamp_min(1e-12)).item()  # 1 at lambda = 0: no variance


def objects(scores: Tensor, covered: Tensor, patch_size: int) -> float:
    """The chance that of two patches, one that shows an object and one that does not, the first is hidden more often.

    The area under the ROC curve of low scores (N, L), by image, averaged. covered: (N, H, W), True on objects; a patch
    shows one if a fifth of it does. Above 0.5 masks hide the objects, below it they show them.
    """
    shown = patchify(covered[:, None].to(scores.device).float(), patch_size).mean(-1) >= 0.2  # (N, L)
    pairs = shown[:, :, None] & ~shown[:, None, :]  # (N, L, L)
    wins = ((scores[:, None, :] - scores[:, :, None]).sign() + 1) / 2  # (N, L, L), 1/2 for a tie
    return ((wins * pairs).sum((1, 2)) / pairs.sum((1, 2))).nanmean().item()


@torch.no_grad()
def encode(model: CLMAE | None, images: Tensor) -> Tensor:
    """Features (n, D) of whole uint8 images (n, 3, H, W); without a model their pixels, shrunk to 32 x 32 if larger."""
    device = (images if model is None else model.mean).device  # the images' may be another, see load_data
    parts = images.split(64 if device.type == "cpu" else 1000)  # as many as a CPU's cache holds
    if model is None:
        small = [min(32, side) for side in images.shape[2:]]
        return torch.cat([F.adaptive_avg_pool2d(x.float(), small).flatten(1) for x in parts])
    return torch.cat([model.features(model.standardise(x)) for x in parts])


@torch.no_grad()
def evaluate(z: Tensor, labels: Tensor, z_val: Tensor, val_labels: Tensor, probe: bool = True) -> dict[str, float]:
    """Accuracy in % of kNN and of a linear probe: learned from features z (N, D), labels (N,); scored on the others."""
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, z_val = (z - mean) / std, (z_val - mean) / std
    labels = labels.to(z.device)
    figures = {"knn": knn_accuracy(z, labels, z_val, val_labels)}
    if probe:
        figures["linear_probe"] = linear_probe(z, labels, z_val, val_labels)
    return figures


def knn_accuracy(z: Tensor, labels: Tensor, z_val: Tensor, val_labels: Tensor, k: int = 20) -> float:
    """Accuracy in % of k nearest neighbours by cosine, votes exp(cosine / 0.07)."""
    z, z_val = F.normalize(z), F.normalize(z_val)
    votes = torch.zeros(len(z_val), int(labels.max()) + 1, device=z.device)  # (M, classes)
    for query, vote in zip(z_val.split(1000), votes.split(1000), strict=True):
        cosine, ids = (query @ z.T).topk(min(k, len(z)), dim=1)  # (1000, k)
        vote.scatter_add_(1, labels[ids], (cosine / 0.07).exp())
    return accuracy(votes, val_labels)


def linear_probe(z: Tensor, labels: Tensor, z_val: Tensor, val_labels: Tensor) -> float:
    """Accuracy in % of logistic regression: full-batch L-BFGS from zeros, L2 penalty 1e-4."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(z.shape[1], classes, device=z.device, requires_grad=True)
    bias = torch.zeros(classes, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight + bias, labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(z_val @ weight + bias, val_labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In %, of logits (M, classes) for labels (M,)."""
    return 100 * (logits.argmax(1).cpu() == labels.cpu()).double().mean().item()


def finetune(args: argparse.Namespace, model: CLMAE, record: dict):
    """Train a run's encoder and a linear head on its pooled tokens, and beside it the same from scratch.

    AdamW, a learning rate that shrinks by 0.75 a block from the head down (MAE, appendix A.2), label smoothing 0.1.
    """
    device = pick_device(args.device)
    data = load_data(args, device)
    if not data.labelled:
        raise ValueError(f"fine-tuning needs class labels; the images of {args.data} have none")
    if args.data == record["options"]["data"]:
        check_data(args, data, image_means(data), record)
    N, B = len(data.images), args.batch_size
    print(f"{args.data}: fine-tuning on {N:,} images, {len(data.val_images):,} held out", flush=True)
    torch.manual_seed(args.seed)
    scratch = CLMAE(model.config)
    scratch.mean, scratch.std = model.mean, model.std

    for name, tuned in (("pretrained", model.to(device)), ("from scratch", scratch.to(device))):
        torch.manual_seed(args.seed)  # each encoder gets the same head, order and crops
        encoder = tuned.encoder
        head = nn.Linear(model.config.dim, len(data.classes), device=device)
        nn.init.trunc_normal_(head.weight, std=0.02)
        stages = [nn.ModuleList([head, encoder.norm]), *reversed(encoder.blocks), encoder.patch_embed]
        groups = decayed([encoder.cls_token], args.weight_decay, lr_scale=0.75 ** (len(stages) - 1))
        for depth, stage in enumerate(stages):
            groups += decayed(stage.parameters(), args.weight_decay, lr_scale=0.75**depth)
        optimizer = torch.optim.AdamW(groups, fused=True)
        features = torch.compile(tuned.features) if args.compile else tuned.features

        for epoch in range(args.epochs):
            order = torch.randperm(N).to(data.images.device).split(B)
            for i in tqdm(range(N // B), f"{name}, epoch {epoch + 1}/{args.epochs}", leave=False, disable=None):
                set_learning_rate(optimizer, args, epoch + i / (N // B))
                images = augment(tuned.standardise(data.images[order[i]]), args.min_crop)  # (B, 3, H, W)
                with autocast(args, device):
                    logits = head(features(images))  # (B, classes)
                loss = F.cross_entropy(logits.float(), data.labels[order[i]].to(device), label_smoothing=0.1)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if not loss.isfinite():
                raise ValueError(f"the loss of fine-tuning became {loss.item()} in epoch {epoch + 1}; try a lower --lr")
        result = accuracy(head(encode(tuned, data.val_images)), data.val_labels)
        print(f"fine-tuned for {args.epochs} epochs, {name}: {result:.2f} %", flush=True)


# ---- Checkpoint ------------------------------------------------------------------------------------------------------
def save(args: argparse.Namespace, data: Data, means: Tensor, model: CLMAE, optimizer, log: list, scores: list):
    """Write checkpoint.pt and log.jsonl, so that at every moment a whole file, the old or the new, is there."""
    kind = model.mean.device.type
    rng = {"cpu": torch.get_rng_state()}
    if kind != "cpu":
        rng[kind] = torch.get_device_module(kind).get_rng_state()
    record = {
        "options": vars(args),  # of the command
        "config": asdict(model.config),
        "N": len(data.images),
        "means": means,  # of `image_means`
        "epoch": len(log) - 1,
        "log": log,  # figures by epoch
        "scores": scores,  # (8, L) by epoch, of these
        "images": data.val_images[:8].cpu().clone(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng,  # states of the random numbers
    }
    buffer = io.BytesIO()
    torch.save(record, buffer)
    lines = "".join(json.dumps(figures) + "\n" for figures in log)

    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, content in (("checkpoint.pt", buffer.getbuffer()), ("log.jsonl", lines.encode())):
        file, temporary = Path(args.out, name), Path(args.out, f"{name}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            kept = "; the earlier one is still whole" if file.exists() else ""
            raise OSError(f"cannot write {file} ({error.strerror}){kept}") from None


def restore(args: argparse.Namespace, data: Data, means: Tensor, optimizer: torch.optim.Optimizer, record: dict):
    """Put optimiser and random numbers back to where a record was saved, and say from where lambda goes on."""
    check_data(args, data, means, record)
    optimizer.load_state_dict(record["optimizer"])
    torch.set_rng_state(record["rng"]["cpu"])
    kind = optimizer.param_groups[0]["params"][0].device.type
    if kind != "cpu" and kind in record["rng"]:
        torch.get_device_module(kind).set_rng_state(record["rng"][kind])
    if record["epoch"] < args.epochs:
        lam = curriculum_factor(record["epoch"] / args.epochs, args.lambda_start, args.lambda_end)
        changed = record["options"]["epochs"] != args.epochs
        note = f": not the same as a run of {args.epochs} epochs from the start" if changed else ""
        print(f"lambda goes on from {lam:+.2f}{note}")


def image_means(data: Data) -> Tensor:
    """The mean (N + M,) of every image, training and held out, of every fourth value: tells one set from another."""
    parts = (*data.images.split(1000), *data.val_images.split(1000))
    return torch.cat([x.flatten(1)[:, ::4].float().mean(1) for x in parts]).cpu()


def check_data(args: argparse.Namespace, data: Data, means: Tensor, record: dict):
    """Refuse images that are not those of a run: one that it was trained on could be held out now."""
    saved, now = record["images"].float(), data.val_images[:8].cpu().float()  # all that an older run kept
    if "means" in record:
        saved, now = record["means"], means
    alike = saved.shape == now.shape and (saved - now).abs().max() < 0.5  # levels: processors round differently
    if not alike or record["N"] != len(data.images):
        way = f"put back the images that {args.out} began with, or take a new --out"
        raise ValueError(f"{args.data} has changed: {way}")


# ---- Command line ----------------------------------------------------------------------------------------------------
FINETUNE = {"epochs": 50, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 5.0, "min_crop": 0.3}  # --finetune's defaults
RANGES = {  # of options, both ends included
    **dict.fromkeys(("image_size", "patch_size", "epochs", "batch_size", "evaluate_every"), (1, math.inf)),
    **dict.fromkeys(("holdout", "lr", "weight_decay", "warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("kappa", "tau"), (1e-6, math.inf)),
    **dict.fromkeys(("lambda_start", "lambda_end"), (-1, 1)),
    **{"images": (2, math.inf), "mask_ratio": (0, 1), "min_crop": (0.01, 1), "seed": (0, 2**63 - 1)},
}


def benchmark(args: argparse.Namespace, turns: int = 20):
    """Time steps of plain MAE and of CL-MAE in turns."""
    device = pick_device(args.device)
    args.images, args.holdout = args.batch_size, 1
    data = load_data(args, device)
    lam = torch.tensor(-0.5, device=device)
    inner = 1 if device.type == "cpu" else 10  # steps between two looks at the clock
    arms = []
    for args.masking in ("random", "curriculum"):
        model, optimizer = build(args, data, device)
        arms.append((Losses(args, model, data.images.shape, lam), optimizer, []))

    for _ in range(turns + 1):  # the first warms up
        for forward, optimizer, times in arms:
            start = time.perf_counter()
            for _ in range(inner):
                images = augment(model.standardise(data.images), args.min_crop)
                loss, mae_loss = forward(images, lam)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            mae_loss.item()  # waits for the device
            times.append(1000 * (time.perf_counter() - start) / inner)

    random, learned = (torch.tensor(times[1:]) for _, _, times in arms)  # milliseconds
    low, middle, high = (learned / random).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    print(f"{args.model}, images {tuple(data.images.shape)}, {device}, torch {torch.__version__}; median step:")
    print(f"random {random.median():.2f} ms, curriculum {learned.median():.2f} ms")
    print(f"curriculum / random, turn by turn: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="train.py [options]", description=__doc__, formatter_class=shape)

    def add(option: str, default, text: str, **more):
        """An option of the `group` last named below."""
        if default is not None and "action" not in more:
            more["type"] = type(default)
            text += f" (default: {default})"
        group.add_argument(option, default=default, help=text, **more)

    toggle = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    add("--data", "shapes", f"shapes (generated), {', '.join(DATASETS)} (downloaded), or the path of an image folder")
    add("--data-dir", "data", "where downloads go")
    add("--images", None, "use so many of the training images; shapes: draw so many, by default 10,000", type=int)
    add("--image-size", None, "side in pixels; default: the first image's smaller side, up to 224", type=int)
    add("--holdout", 0, "evaluate on so many other training images, not on val/ or test/: for tuning")
    group = parser.add_argument_group("model")
    add("--model", "nano", "nano (a CPU in minutes), tiny (ViT-Tiny), small (ViT-Small)", choices=list(MODELS))
    add("--patch-size", None, "pixels; default 4 for images below 64 pixels, 8 below 128, else 16", type=int)
    add("--norm-pix", True, "predict patches standardised each by itself; on by default", action=toggle)
    group = parser.add_argument_group("masking")
    add("--masking", "curriculum", "masks learned, or random: plain MAE", choices=["curriculum", "random"])
    add("--mask-ratio", 0.75, "fraction of the patches that is masked")
    add("--lambda-start", 1.0, "curriculum factor at the first step: 1 partner, -1 adversary")
    add("--lambda-end", -1.0, "curriculum factor at the last step")
    add("--kappa", 2.0, "strength of the masks at |lambda| = 1; the sampler's noise has a std of 1.28")
    add("--tau", 1.0, "temperature of the straight-through gradient")
    group = parser.add_argument_group("training")
    add("--epochs", 10, "passes over the training images")
    add("--batch-size", 64, "images a step")
    add("--lr", 4e-3, "peak learning rate for 256 images a step; it scales with the batch")
    add("--weight-decay", 0.05, "of matrices; biases, norms and tokens have none")
    add("--warmup-epochs", 2.0, "epochs in which the learning rate rises")
    add("--min-crop", 0.2, "smallest area of the random-resized crop; 1: no crop")
    add("--seed", 0, "of weights, order, crops and masks")
    group = parser.add_argument_group("machine and output")
    add("--device", None, "cuda, mps or cpu; default the first that is there")
    add("--amp", None, "bfloat16 matmuls; default on CUDA only", action=toggle)
    add("--compile", False, "torch.compile the model", action=toggle)
    add("--graph", False, "forward and backward of a step as CUDA graphs: less waiting for the CPU", action=toggle)
    add("--evaluate-every", 5, "epochs from one kNN and linear probe to the next")
    add("--out", None, "run folder; default runs/ and the name of the data, with -random if masks are")
    add("--overwrite", False, "replace the run in that folder", action="store_true")
    group = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    own = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in FINETUNE.items())
    add("--resume", None, "go on with a run, for as long as --epochs says", metavar="RUN")
    add("--finetune", None, f"train a run's encoder as a classifier; its own defaults are {own}", metavar="RUN")
    add("--benchmark", False, "time training steps of this --data, --model, --batch-size ...", action="store_true")
    return parser


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, CLMAE | None, dict | None]:
    """Options; for --resume and --finetune also the run's model and record: what is typed is laid over its options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and value != math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value} is not between {low:g} and {high:g}")
    run = args.finetune if args.resume is None else args.resume
    if run is None and not args.benchmark:
        name = Path(args.data).resolve().name if os.path.isdir(args.data) else args.data
        if args.masking == "random":  # without a masker a run is neutral, in the log and the figures
            args.lambda_start = args.lambda_end = 0.0
            name += "-random"
        args.out = args.out or f"runs/{name}"
        if os.path.isdir(args.data) and Path(args.data).resolve() in Path(args.out).resolve().parents:
            raise ValueError(f"--out {args.out} lies in --data {args.data}, of whose images its pictures would be some")
        if Path(args.out, "checkpoint.pt").exists() and not args.overwrite:
            raise ValueError(f"{args.out} exists: --resume {args.out} goes on with it, --overwrite replaces it")
    if run is None:
        return args, None, None

    model, record = load(run)
    height, width = model.config.image_size
    saved = vars(parser.parse_args([]))  # today's default where the run is older than an option
    saved |= {name: value for name, value in record["options"].items() if name in saved}
    saved |= {"out": str(record["run"]), "resume": None, "patch_size": model.config.patch_size}
    saved["image_size"] = height if height == width else (height, width)
    free = {"device", "amp", "compile", "graph", "data", "data_dir", "evaluate_every", "epochs", "resume", "finetune"}
    if args.finetune is not None:
        saved |= {"device": None, "amp": None} | FINETUNE
        free |= {"seed", "weight_decay", *FINETUNE}
        if parser.parse_args(argv, argparse.Namespace(**saved)).data != saved["data"]:  # other images: all of them
            saved |= {"images": None, "holdout": 0}
            free |= {"images", "holdout"}
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for name in sorted(saved.keys() - free):
        if getattr(args, name) != saved[name]:
            typed = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ValueError(f"{typed}: {run} has {saved[name]}, and keeps it")
    if args.resume is not None and args.epochs < record["epoch"]:
        raise ValueError(f"--epochs {args.epochs}: {run} has {record['epoch']} already")
    return args, model, record


def main(argv: list[str] | None = None):
    """The command, with the words after its name. What the user can mend is told in one line."""
    visualize.mend_streams()
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.backends.cudnn.deterministic = True  # the same seed, the same result
    out = None
    try:
        args, model, record = read_options(argv)
        if args.benchmark:
            benchmark(args)
        elif args.finetune is not None:
            finetune(args, model, record)
        else:
            out = args.out
            train(args, model, record)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        if out and Path(out, "checkpoint.pt").exists():
            print(f"to go on from the last whole epoch: python train.py --resume {out}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError | ValueError):
            place = traceback.extract_tb(error.__traceback__)[-1]
            text += f" ({Path(place.filename).name}:{place.lineno})"
        elif isinstance(error, MemoryError) or re.search("(out of|allocate|enough) memory", text):
            calls = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            text = "out of memory: a smaller --batch-size needs less, and the learning rate follows by itself"
            if calls & {"load_data", "measure"}:
                text = "out of memory: fewer --images or a smaller --image-size need less"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = f"--compile failed: say --no-compile, or install a C++ compiler ({text[:99]})"
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

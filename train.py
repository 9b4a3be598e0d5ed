"""Train a CL-MAE, or a plain MAE with --masking random, on one device, and measure its features.

    python train.py                              # generated shapes: minutes on two CPU cores, kNN about 43 %
    python train.py --data cifar10 --model tiny  # for a GPU; or cifar100, imagenette, the path of an image folder
    python train.py --resume runs/cifar10        # go on after an interruption, or with more --epochs

The experiment is `train`: read it first. What it calls follows in the order in which the data flow.
An image folder is flat, without labels, or has a sub-folder per class; so do its train/ and val/ or test/, if any.
A run is a folder: checkpoint.pt, replaced after each epoch; log.jsonl; the figures of visualize.py.
"""

import argparse
import json
import math
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import visualize
from clmae import CLMAE, Config, curriculum_factor, load_record, patchify

MODELS = {
    "nano": dict(dim=96, depth=4, decoder_dim=48, decoder_depth=1, masker_dim=32),
    "tiny": {},  # ViT-Tiny: the defaults of Config
    "small": dict(dim=384, heads=6, decoder_dim=128, decoder_heads=4, masker_dim=64),
}


def train(args: argparse.Namespace, record: dict | None = None):
    """Train for args.epochs from the start, or on from the checkpoint `record`, and draw the figures."""
    plain = json.dumps(vars(args), default=lambda x: x.item() if hasattr(x, "item") else str(x))
    args = argparse.Namespace(**json.loads(plain))  # numpy's numbers and paths could not be loaded again
    if record is None and Path(args.out, "checkpoint.pt").exists():
        raise ValueError(f"{args.out} has a run: go on with --resume {args.out}, or take another --out")
    device, bfloat16 = find_device(args.device)
    data = load_data(args, device)
    N, B = len(data.images), args.batch_size
    steps = N // B  # of an epoch; the last, incomplete batch is dropped

    torch.manual_seed(args.seed)
    model = build(args, data).to(device)
    optimizer = build_optimizer(model, args.weight_decay)
    log, scores = [], []  # by epoch: figures; scores (8, L) of 8 held-out images
    if record is not None:
        log, scores = restore(args, data, model, optimizer, record)
    if args.compile:
        model.compile()  # in place; the first step takes a minute or more

    curriculum = (0.0, 0.0) if args.masking == "random" else (args.lambda_start, args.lambda_end)
    lam = torch.tensor(curriculum[0], device=device)  # a tensor: see CLMAE.forward
    print(f"{model.config.visible} of {model.config.patches} patches visible; {args.epochs} epochs on {device}")

    for epoch in range(len(log), args.epochs + 1):  # epoch 0 has no batches: it measures the start
        order = torch.randperm(N).to(data.images.device).split(B)
        batches = tqdm(range(steps if epoch else 0), f"epoch {epoch}/{args.epochs}", leave=False, disable=None)
        losses = torch.zeros(len(batches), device=device)
        start = time.perf_counter()
        for i in batches:
            progress = ((epoch - 1) * steps + i) / max(1, args.epochs * steps - 1)
            lam.fill_(curriculum_factor(progress, *curriculum))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch - 1 + i / steps)

            images = augment(model.standardise(data.images[order[i]]), args.min_crop)  # (B, 3, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                output = model(images, lam)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            losses[i] = output.mae_loss.detach()  # stays on the device: reading it makes a GPU wait
            if i % 50 == 49:
                batches.set_postfix_str(f"loss {output.mae_loss.item():.4f}, lambda {lam.item():+.2f}")

        # What the epoch did: a record, a line, a checkpoint.
        figures = {"lambda": lam.item()}
        if epoch:
            figures |= {"loss": losses.mean().item(), "lr": group["lr"]}  # item() waits for a GPU
            figures["images_per_s"] = steps * B / (time.perf_counter() - start)
        measured, images_scores = measure_masks(model, data, lam)
        figures |= measured
        if not math.isfinite(figures.get("loss", 0.0) + figures["loss_random"]):
            raise ValueError(
                f"the loss of epoch {epoch} is not finite: try a lower --lr; {args.out} has the one before"
            )
        if epoch == 0:
            figures |= measure_floors(model, data)
        if len(data.classes) > 1 and (epoch % args.evaluate_every == 0 or epoch == args.epochs):
            z, z_val = encode(model, data.images), encode(model, data.val_images)
            figures |= evaluate(z, data.labels, z_val, data.val_labels)

        log.append({"epoch": epoch} | {name: float(value) for name, value in figures.items()})
        scores.append(images_scores[:8].cpu().clone())  # (8, L); a view would save all 500
        print("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items()), flush=True)
        save(args, data, model, optimizer, log, scores)
    visualize.draw(args.out)


def find_device(name: str | None) -> tuple[torch.device, bool]:
    """The device of that name, or the best there is; and whether matmuls are in bfloat16: on CUDA that has it."""
    if name is None and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # torch's refusals
        raise ValueError(f"--device {name}: {error}") from error
    return device, device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# ---- Data --------------------------------------------------------------------------------------------------
DATASETS = {  # how torchvision opens the training or the held-out part of what it downloads
    "cifar10": lambda root, train: datasets.CIFAR10(root, train, download=True),
    "cifar100": lambda root, train: datasets.CIFAR100(root, train, download=True),
    "imagenette": lambda root, train: datasets.Imagenette(root, "train" if train else "val", "160px", download=True),
}
PARTS = ["train", "training"], ["val", "valid", "validation", "test", "testing"]  # folders of a data set, in any case
Image.MAX_IMAGE_PIXELS = None  # telephones reach 200 million, which Pillow takes for an attack


class Data(NamedTuple):
    """A data set in memory: no worker processes, a batch is an index. `val` is held out: never trained on."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) class indices
    classes: list[str]  # names; of a single class there is nothing to tell
    checksum: int  # of N and the files' names: another picture under an old name is not noticed
    val_images: Tensor  # (M, 3, H, W) uint8
    val_labels: Tensor  # (M,)
    covered: Tensor | None = None  # (M, H, W), True where val_images show a shape, if that is known


def load_data(args: argparse.Namespace, device: torch.device | str = "cpu") -> Data:
    """Read what --data names. Without a held-out part a tenth is held out, or as many images as --holdout says."""
    wanted = args.images and args.images + args.holdout  # None: all
    if args.data == "shapes":
        classes, files = list(SHAPES), ["shapes"]
        parts = [shapes(wanted or 10_000 + args.holdout, args.image_size, seed=1)]
        if not args.holdout:
            parts.append(shapes(2_000, args.image_size, seed=2))
    else:
        pairs, classes, files = open_data(args.data, args.data_dir)
        parts = [read_images(pairs[0], args.image_size, wanted)]
        if len(pairs) > 1 and not args.holdout:
            parts.append(read_images(pairs[1], args.image_size))

    if len(parts) == 1:
        n = args.holdout or max(1, len(parts[0][1]) // 10)
        parts = [[x[:-n] for x in parts[0]], [x[-n:] for x in parts[0]]]
    (images, labels, *_), (val_images, val_labels, *covered) = parts  # shapes know what they cover
    if len(images) < args.batch_size:  # or none, where n is too many
        many = f"{len(images)} training, {len(val_images)} held-out images"
        raise ValueError(f"{many}: --batch-size is {args.batch_size}")

    classes = classes or [str(label) for label in range(int(labels.max()) + 1)]  # not all name theirs
    kinds = f"{len(classes)} classes: {', '.join(classes[:3])}, ..." if len(classes) > 1 else "no labels"
    print(f"{args.data}: {len(images):,} training and {len(val_images):,} held-out images, {kinds}", flush=True)
    if torch.device(device).type == "cuda" and images.nbytes + val_images.nbytes > torch.cuda.mem_get_info()[0] / 2:
        device = "cpu"  # from where each batch is moved
    images, labels, val_images, val_labels = (x.to(device) for x in (images, labels, val_images, val_labels))
    checksum = zlib.crc32("\n".join([*files, str(len(images))]).encode(errors="surrogateescape"))
    return Data(images, labels, classes, checksum, val_images, val_labels, *covered)


def open_data(name: str, root: str) -> tuple[list, list[str], list[str]]:
    """The training and, if any, the held-out part, as (picture or file, label) pairs; names of classes and files."""
    if name in DATASETS:
        parts = [DATASETS[name](root, train) for train in (True, False)]
        classes = getattr(parts[0], "classes", [])  # of Imagenette tuples: a name and its synonyms
        return parts, [words if isinstance(words, str) else words[0] for words in classes], [name]

    folder = Path(name)
    if not name or not folder.is_dir():
        raise ValueError(f"--data {name} is neither shapes, {', '.join(DATASETS)} nor a folder")
    inner = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    paths = [next((inner[part] for part in names if part in inner), None) for names in PARTS]
    if None in paths:
        paths = [folder]
    parts, classes = zip(*map(open_folder, paths), strict=True)
    differ = {*classes[0]} ^ {*classes[-1]}
    if differ:
        raise ValueError(f"{paths[1]} has other classes ({min(differ)}): --data {paths[0]} reads the first alone")

    files = [Path(file) for part in parts for file, _ in part]
    real, times = Counter(file.resolve() for file in files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{real} is in {name} {times} times, by links: leave one")
    return parts, classes[0], [file.relative_to(folder).as_posix() for file in files]


def open_folder(path: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """(File, label) pairs and names of classes of a folder of pictures: flat, or with a sub-folder per class.

    Left out is what programs leave behind: files that begin with a dot, folders that do not with a letter or digit.
    """
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    classes = [name for name in folders if name[0].isalnum()]
    left_out = {*folders} - {*classes}
    for name in classes:
        if name.lower() in PARTS[0] + PARTS[1]:
            raise ValueError(f"{path / name} is no class: --data takes it alone, or a folder with train/ and val/")

    def is_picture(file: str) -> bool:
        *inner, name = Path(file).relative_to(path).parts
        strange = {folder for folder in inner if not folder[0].isalnum()}
        left_out.update(strange)
        return not strange and name[0] != "." and name.lower().endswith(IMG_EXTENSIONS)

    places = classes or [""]
    pairs = make_dataset(path, {name: i for i, name in enumerate(places)}, None, is_picture, allow_empty=True)
    if left_out:
        print(f"{path}: left out for their names: {', '.join(sorted(left_out))}")
    empty = {*places} - {places[label] for _, label in pairs}
    if empty:
        raise ValueError(f"no images in {path / min(empty)}: expected {' '.join(IMG_EXTENSIONS)}")
    if classes and any(file.is_file() and is_picture(file) for file in path.iterdir()):
        raise ValueError(f"{path} has images beside folders ({classes[0]}): each class has a folder, or all are flat")
    return pairs, classes


def read_images(pairs: list, side: int, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The first n, or all, of a fixed shuffle: images (n, 3, side, side) uint8, cropped square; labels (n,)."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:n].tolist()
    images = torch.empty(len(order), 3, side, side, dtype=torch.uint8)
    labels = torch.empty(len(order), dtype=torch.long)

    def read(i: int):
        picture, labels[i] = pairs[order[i]]
        image = ImageOps.fit(open_image(picture), (side, side), Image.Resampling.BILINEAR)
        images[i] = transforms.functional.pil_to_tensor(image)

    thread_map(read, range(len(order)), desc="decoding", leave=False, disable=None)
    return images, labels


def open_image(picture: str | Image.Image) -> Image.Image:
    """A picture, or that of a file, as RGB: upright, on white where it is transparent."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        with Image.open(picture) as image:
            if image.mode[0] in "IF":  # convert would turn it white
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel: save it with 8")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # mostly stored as black, as the figure on it may be
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"cannot read {picture} ({error}): repair or remove it") from error


def bar(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs() - 0.95, v.abs() - 0.25)


TURNS = (0, 2 * math.pi / 3, 4 * math.pi / 3)  # of a triangle's sides
SHAPES = {  # how far points (u, v) lie outside of a shape's outline, in its own axes; inside it is negative
    "disc": lambda u, v: u.hypot(v) - 0.85,
    "ring": lambda u, v: (u.hypot(v) - 0.7).abs() - 0.18,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.75,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.62).abs() - 0.16,
    "triangle": lambda u, v: torch.stack([u * math.cos(a) + v * math.sin(a) for a in TURNS]).amax(0) - 0.48,
    "cross": lambda u, v: torch.minimum(bar(u, v), bar(v, u)),
    "bar": bar,
    "pair": lambda u, v: torch.minimum((u - 0.5).hypot(v), (u + 0.5).hypot(v)) - 0.36,
}


def shapes(n: int, side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, H, W) uint8 of four shapes of a kind on stripes; kinds (n,); where shapes are (n, H, W)."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(SHAPES), (n,), generator=g)
    images, covered = zip(*(draw_shapes(some, side, g) for some in kinds.split(1000)), strict=True)
    return torch.cat(images), kinds, torch.cat(covered)


def draw_shapes(kinds: Tensor, side: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (b, 3, H, W) uint8 of shapes of these kinds (b,), and where they are (b, H, W)."""
    b = len(kinds)
    y, x = torch.meshgrid(2 * [torch.linspace(-1, 1, side)], indexing="ij")  # (H, W)
    quadrant = (x > 0).long() + 2 * (y > 0).long()  # (H, W), one shape in each

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    radius = uniform(0.36, 0.44, b, 4)[:, quadrant]  # (b, H, W)
    turn = uniform(0, 2 * math.pi, b, 4)[:, quadrant]
    dx, dy = ((axis - axis.sign() / 2 - uniform(-0.22, 0.22, b, 4)[:, quadrant]) / radius for axis in (x, y))
    u = dx * turn.cos() + dy * turn.sin()  # (b, H, W), the shape's own axes, in radii
    v = dy * turn.cos() - dx * turn.sin()
    outside = torch.stack([distance(u, v) for distance in SHAPES.values()])[kinds, torch.arange(b)]  # (b, H, W)
    inside = torch.sigmoid(-0.7 * side * radius * outside)[:, None]  # (b, 1, H, W)

    angle = uniform(0, math.pi, b, 1, 1)
    frequency = uniform(7, 10, b, 1, 1)
    phase = uniform(0, 2 * math.pi, b, 1, 1)
    stripes = torch.sin((x * angle.cos() + y * angle.sin()) * frequency + phase)[:, None]  # (b, 1, H, W)
    ground = uniform(0, 1, b, 3, 1, 1)
    colour = uniform(0, 1, b, 3, 1, 1)
    alike = (colour - ground).norm(dim=1, keepdim=True) < 0.6
    colour = torch.where(alike, 1 - ground.round(), colour)

    image = inside * colour + (1 - inside) * (ground + 0.1 * stripes)  # (b, 3, H, W)
    image = image + 0.01 * torch.randn(image.shape, generator=g)
    return (image.clamp(0, 1) * 255).to(torch.uint8), inside[:, 0] > 0.5


def augment(images: Tensor, min_crop: float) -> Tensor:
    """Crop and flip each of images (B, 3, H, W) as MAE: min_crop to 1 of the area, side ratio 3/4 to 4/3."""
    u = torch.rand(5, len(images), device=images.device)
    area = min_crop + (1 - min_crop) * u[0]  # (B,), as a fraction
    widest = (-area.log()).clamp(max=math.log(4 / 3))  # log of the ratio; a large crop is nearly square
    ratio = torch.exp(widest * (2 * u[1] - 1))
    h = (area / ratio).sqrt()  # (B,), sides as fractions
    w = (area * ratio).sqrt()
    flip = (u[4] < 0.5).float() * 2 - 1

    theta = torch.zeros(len(images), 2, 3, device=images.device)  # output to input coordinates, both in [-1, 1]
    theta[:, 0, 0] = w * flip
    theta[:, 0, 2] = (1 - w) * (2 * u[2] - 1)
    theta[:, 1, 1] = h
    theta[:, 1, 2] = (1 - h) * (2 * u[3] - 1)
    grid = F.affine_grid(theta, images.shape, align_corners=True)  # (B, H, W, 2)
    return F.grid_sample(images, grid, align_corners=True)


# ---- Model and optimiser -----------------------------------------------------------------------------------
def build(args: argparse.Namespace, data: Data) -> CLMAE:
    """A new model for these data. Random masks need no masker: its kappa is 0."""
    own = {"mask_ratio": args.mask_ratio, "tau": args.tau, "norm_pix": args.norm_pix} | MODELS[args.model]
    kappa = args.kappa if args.masking == "curriculum" else 0.0
    model = CLMAE(Config(args.image_size, args.patch_size or args.image_size // 8, kappa=kappa, **own))
    model.std[:], model.mean[:] = torch.std_mean(data.images[:5_000].float(), dim=(0, 2, 3), keepdim=True)
    model.std.clamp_(min=1)  # of images of one colour
    return model


def build_optimizer(model: CLMAE, weight_decay: float) -> torch.optim.Optimizer:
    """One AdamW for the MAE and its masker. Biases, norms and tokens have no weight decay; in MAE's code tokens do."""
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(args: argparse.Namespace, epoch: float) -> float:
    """Linear warm-up to --lr, which is for 256 images, then half a cosine down to 0. MAE, appendix A.1."""
    warmup = min(args.warmup_epochs, args.epochs / 2)
    factor = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))
    if epoch < warmup:
        factor = epoch / warmup
    return args.lr * args.batch_size / 256 * factor


# ---- What is measured --------------------------------------------------------------------------------------
@torch.no_grad()
def measure_masks(model: CLMAE, data: Data, lam: Tensor) -> tuple[dict[str, float], Tensor]:
    """Figures of the masks at this lambda, on the first 500 held-out images, and their scores (500, L)."""
    images = model.standardise(data.val_images[:500])
    losses = []
    for factor in (0.0, lam):  # random masks, learned ones
        generator = torch.Generator(images.device).manual_seed(0)  # the same noise
        output = model.forward(images, factor, generator)  # model() may be compiled
        losses.append(((output.patch_loss * output.mask).sum() / output.mask.sum()).item())
    figures = {"loss_random": losses[0], "hardness": losses[1] / losses[0]}  # below 1 the masker helps
    if model.masker:
        figures["diversity"] = diversity(output.scores)
    if model.masker and data.covered is not None:
        figures["objects"] = objects(output.scores, data.covered[:500], model.config.patch_size)
    return figures, output.scores


def diversity(scores: Tensor) -> float:
    """The share of the variance of scores (B, L) that is an image's own: 0 for one mask, 1 for nothing in common."""
    scores = scores - scores.mean(1, keepdim=True)
    common = scores.mean(0).square().mean()  # what all images share
    return 1 - (common / scores.square().mean().clamp_min(1e-12)).item()  # 1 at lambda = 0: no variance


def objects(scores: Tensor, covered: Tensor, patch_size: int) -> float:
    """The chance that of two patches, one that shows an object and one that does not, the first is hidden more.

    The area under the ROC curve of low scores (N, L), by image, averaged: above 0.5 masks hide the objects.
    covered: (N, H, W), True on objects; a patch shows one if a fifth of it does.
    """
    shown = patchify(covered[:, None].to(scores.device).float(), patch_size).mean(-1) >= 0.2  # (N, L)
    pairs = shown[:, :, None] & ~shown[:, None, :]  # (N, L, L)
    wins = ((scores[:, None, :] - scores[:, :, None]).sign() + 1) / 2  # (N, L, L), 1/2 for a tie
    return ((wins * pairs).sum((1, 2)) / pairs.sum((1, 2))).nanmean().item()


@torch.no_grad()
def measure_floors(model: CLMAE, data: Data) -> dict[str, float]:
    """What a model has to beat: the loss of predicting each patch's own mean; kNN of pixels, shrunk to 32 x 32."""
    target = model.target(model.standardise(data.val_images[:500]))  # (500, L, p*p*C)
    figures = {"loss_trivial": target.var(-1, unbiased=False).mean().item()}
    if len(data.classes) > 1:
        side = min(32, data.images.shape[2])
        z, z_val = (
            torch.cat([F.adaptive_avg_pool2d(x.cpu().float(), side).flatten(1) for x in images.split(1000)])
            for images in (data.images, data.val_images)  # on the CPU: MPS does not pool all sizes
        )
        figures["knn_pixels"] = evaluate(z, data.labels, z_val, data.val_labels, probe=False)["knn"]
    return figures


@torch.no_grad()
def encode(model: CLMAE, images: Tensor) -> Tensor:
    """Features (n, D) of whole uint8 images (n, 3, H, W)."""
    size = 64 if model.mean.device.type == "cpu" else 1000  # as many as a CPU's cache holds
    return torch.cat([model.features(model.standardise(x)) for x in images.split(size)])


@torch.no_grad()
def evaluate(z: Tensor, labels: Tensor, z_val: Tensor, val_labels: Tensor, probe: bool = True) -> dict[str, float]:
    """Accuracy in % of kNN and linear probe: learned from features z (N, D), labels (N,), scored on the others."""
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


# ---- Checkpoint --------------------------------------------------------------------------------------------
def save(args: argparse.Namespace, data: Data, model: CLMAE, optimizer: torch.optim.AdamW, log: list, scores: list):
    """Write checkpoint.pt, so that at every moment the old or the new is there, whole; and log.jsonl."""
    record = {
        "options": vars(args),  # of the command
        "config": vars(model.config),
        "checksum": data.checksum,
        "epoch": len(log) - 1,
        "log": log,  # figures by epoch
        "scores": scores,  # (8, L) by epoch, of these
        "images": data.val_images[:8].cpu().clone(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {kind: module.get_rng_state() for kind, module in rng_modules(model).items()},
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(record, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
    (out / "log.jsonl").write_text("".join(json.dumps(figures) + "\n" for figures in log))


def restore(args: argparse.Namespace, data: Data, model: CLMAE, optimizer: torch.optim.AdamW, record: dict) -> tuple:
    """Put weights, optimiser and random numbers back to where a record was saved. Its log and scores."""
    if data.checksum != record["checksum"]:
        raise ValueError(f"--data {args.data} is not what {args.out} began with: names of files differ")
    model.load_state_dict(record["model"])
    optimizer.load_state_dict(record["optimizer"])
    for kind, module in rng_modules(model).items():
        if kind in record["rng"]:  # not so if it was saved on another device
            module.set_rng_state(record["rng"][kind])
    return record["log"], record["scores"]


def rng_modules(model: CLMAE) -> dict:
    """By device, who draws random numbers: the CPU weights and orders, the model's device crops and masks."""
    kind = model.mean.device.type
    return {"cpu": torch} | ({} if kind == "cpu" else {kind: torch.get_device_module(kind)})


# ---- Command line ------------------------------------------------------------------------------------------
LOWEST = dict.fromkeys(["image_size", "patch_size", "epochs", "batch_size", "evaluate_every"], 1) | {"images": 2}
LOWEST |= dict.fromkeys(["holdout", "lr", "weight_decay", "warmup_epochs", "mask_ratio", "seed"], 0)
LOWEST |= {"kappa": 1e-6, "tau": 1e-6, "min_crop": 0.01, "lambda_start": -1, "lambda_end": -1}
HIGHEST = {"mask_ratio": 1, "min_crop": 1, "lambda_start": 1, "lambda_end": 1, "kappa": 1e9, "tau": 1e9, "seed": 2**63}
FREE = {"resume", "epochs", "evaluate_every", "data", "data_dir", "device", "compile"}  # may change on --resume


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="train.py [options]", description=__doc__, formatter_class=raw)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="shapes", help=f"shapes (the default), {', '.join(DATASETS)}, or path of an image folder")
    add("--data-dir", default="data", help="where downloads go (%(default)s)")
    add("--images", type=int, help="use so many of the training images (all; of shapes 10,000)")
    add("--image-size", type=int, default=32, help="side in pixels (%(default)s)")
    add("--holdout", type=int, default=0, help="evaluate on so many training images, to tune on (%(default)s)")
    add("--model", choices=list(MODELS), default="nano", help="nano (the default), tiny: ViT-Tiny, small: ViT-Small")
    add("--patch-size", type=int, help="side in pixels (an eighth of the image's)")
    add("--norm-pix", action=switch, default=True, help="predict patches standardised each by itself")
    add("--masking", choices=["curriculum", "random"], default="curriculum", help="learned, or as in plain MAE")
    add("--mask-ratio", type=float, default=0.75, help="fraction of the patches that is masked (%(default)s)")
    add("--lambda-start", type=float, default=1.0, help="first factor: 1 partner, -1 adversary (%(default)s)")
    add("--lambda-end", type=float, default=-1.0, help="last factor (%(default)s)")
    add("--kappa", type=float, default=2.0, help="strength of the masks; their noise has std 1.28 (%(default)s)")
    add("--tau", type=float, default=1.0, help="temperature of the straight-through gradient (%(default)s)")
    add("--epochs", type=int, default=10, help="passes over the training images (%(default)s)")
    add("--batch-size", type=int, default=64, help="images a step (%(default)s)")
    add("--lr", type=float, default=4e-3, help="peak rate for 256 images; scales with the batch (%(default)s)")
    add("--weight-decay", type=float, default=0.05, help="of matrices (%(default)s)")
    add("--warmup-epochs", type=float, default=2.0, help="epochs in which the rate rises (%(default)s)")
    add("--min-crop", type=float, default=0.2, help="smallest area of a crop; 1: no crop (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks (%(default)s)")
    add("--device", help="cuda, mps, cpu, ... (the best that is there)")
    add("--compile", action=switch, default=False, help="torch.compile the model: for long runs")
    add("--evaluate-every", type=int, default=5, help="epochs from one kNN and probe to the next (%(default)s)")
    add("--out", help="run folder (runs/ and the name of the data, with -random if masks are)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, for as long as --epochs says")
    return parser


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """Options; for --resume also the run's record: what is typed is laid over the run's own options."""
    parser = build_parser()
    args, record = parser.parse_args(argv), None
    if args.resume is not None:
        record = load_record(args.resume)
        saved = record["options"] | {"out": str(record["run"])}
        args = parser.parse_args(argv, argparse.Namespace(**saved))
        for name in saved.keys() - FREE:
            if getattr(args, name) != saved[name]:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: the run keeps {saved[name]}")
        if args.epochs < record["epoch"]:
            raise ValueError(f"--epochs {args.epochs}: {args.resume} has {record['epoch']} already")

    for name, low in LOWEST.items():
        value, high = getattr(args, name), HIGHEST.get(name, math.inf)
        if value is not None and not (low <= value <= high and value < math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    if args.out is None:
        args.out = f"runs/{Path(args.data).resolve().name}{'-random' if args.masking == 'random' else ''}"
    return args, record


def main(argv: list[str] | None = None):
    """The command, with the words after its name. What the user can mend is told in one line."""
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.backends.cudnn.deterministic = True  # the same seed, the same result
    try:
        args, record = read_options(argv)
        train(args, record)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; from the last whole epoch on: python train.py --resume {args.out}") from None
    except (OSError, ValueError) as error:
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]  # for who changes the code
        raise SystemExit(f"error: {' '.join(str(error).split())} ({Path(file).name}:{line})") from None


if __name__ == "__main__":
    main()

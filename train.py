"""Train a CL-MAE, or a plain MAE with --masking random, on one device, and evaluate its features.

    python train.py                                  # generated shapes: no download, no GPU, minutes
    python train.py --data cifar10 --model tiny      # or cifar100, or the path of an image folder
    python train.py --resume runs/cifar10            # go on after an interruption
    python train.py --linear-probe runs/cifar10      # or --knn, --finetune

A run is one folder: checkpoint.pt (everything, replaced after each epoch), log.jsonl (one record an epoch) and, at the
end, the figures of visualize.py.
"""

import argparse
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
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional
from tqdm import tqdm

from clmae import CLMAE, Config, curriculum_factor, mask_diversity

# The masker reads all L tokens, the encoder only K of them: it has to be small to cost little.
MODELS = {
    "nano": dict(
        dim=96, depth=4, heads=3, decoder_dim=48, decoder_depth=1, decoder_heads=2, masker_dim=32, masker_heads=2
    ),
    "tiny": dict(
        dim=192, depth=12, heads=3, decoder_dim=64, decoder_depth=2, decoder_heads=2, masker_dim=48, masker_heads=2
    ),
    "small": dict(
        dim=384, depth=12, heads=6, decoder_dim=128, decoder_depth=2, decoder_heads=4, masker_dim=64, masker_heads=2
    ),
}
SHAPES = "disc ring square frame triangle star cross bar crescent pair".split()
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
    """Draw n images (n, 3, H, W) uint8 of ten shapes on striped grounds, colour, size, place and angle at random."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    labels = torch.randint(len(SHAPES), (n,), generator=g)
    (H, W), images = size, []
    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")  # (H, W)
    for label in labels.split(1000):
        b = len(label)
        centre, radius, turn = rand(b, 2, 1, 1) * 0.7 - 0.35, rand(b, 1, 1) * 0.25 + 0.4, rand(b, 1, 1) * 2 * math.pi
        dx, dy = (x - centre[:, 0]) / radius, (y - centre[:, 1]) / radius  # (b, H, W)
        u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
        r, phi, square = u.hypot(v), torch.atan2(v, u), torch.maximum(u.abs(), v.abs())
        bar = torch.maximum(u.abs() - 0.95, v.abs() - 0.25)
        inside = torch.stack(
            [  # negative inside
                r - 0.85,  # disc
                (r - 0.7).abs() - 0.18,  # ring
                square - 0.75,  # square
                (square - 0.62).abs() - 0.16,  # frame
                torch.stack([u * math.cos(a) + v * math.sin(a) for a in (0, 2.0944, 4.1888)]).amax(0)
                - 0.48,  # triangle
                r - 0.62 - 0.3 * (5 * phi).cos(),  # star
                torch.minimum(bar, torch.maximum(v.abs() - 0.95, u.abs() - 0.25)),  # cross
                bar,  # bar
                torch.maximum(r - 0.9, 0.75 - (u - 0.45).hypot(v)),  # crescent
                torch.minimum((u - 0.5).hypot(v), (u + 0.5).hypot(v)) - 0.36,  # pair
            ]
        )
        shape = torch.sigmoid(-inside[label, torch.arange(b)] * radius * W * 0.7)[:, None]  # (b, 1, H, W), soft edge
        angle, frequency, phase = rand(3, b, 1, 1) * torch.tensor([math.pi, 12, 2 * math.pi])[:, None, None, None]
        stripes = torch.sin((x * angle.cos() + y * angle.sin()) * (frequency + 4) + phase)[:, None]  # (b, 1, H, W)
        ground, colour = rand(2, b, 3, 1, 1)
        colour = torch.where((colour - ground).norm(dim=1, keepdim=True) < 0.6, 1 - ground.round(), colour)
        image = shape * colour + (1 - shape) * (ground + 0.15 * stripes)  # (b, 3, H, W)
        image = image + 0.03 * torch.randn(image.shape, generator=g)
        images.append((image.clamp(0, 1) * 255).to(torch.uint8))
    return torch.cat(images), labels


def check_memory(n: int, size: tuple[int, int]):
    """Refuse n images of (H, W) pixels that cannot fit, before any is read."""
    need = n * 3 * size[0] * size[1]
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not tell
        return
    if need > 0.8 * have:
        fail(
            f"{n:,} images of {size[0]} x {size[1]} pixels take {need / 1e9:.1f} GB and this machine has "
            f"{have / 1e9:.1f} GB; use fewer (--images) or smaller ones (--image-size)"
        )


def list_folder(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Image files, labels (-1 if none) and class names of a folder: one sub-folder per class, or flat, no labels."""

    def images(path: Path, pattern: str) -> list[Path]:
        return sorted(p for p in path.glob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES)

    classes = {p.name: images(p, "**/*") for p in sorted(folder.iterdir()) if p.is_dir()}
    classes = {name: files for name, files in classes.items() if files} or {"": images(folder, "*")}
    files = sum(classes.values(), [])
    if not files:
        fail(f"no images in {folder}; expected {' '.join(sorted(IMAGE_SUFFIXES))}, flat or one sub-folder per class")
    if "" in classes:
        return files, torch.full((len(files),), -1), []
    return files, torch.tensor([i for i, c in enumerate(classes.values()) for _ in c]), list(classes)


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Decode an image of any mode to RGB (3, H, W) uint8: resized to cover H x W, then cropped to its centre."""
    with Image.open(path) as image:
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
    """Read what --data names. Images without a held-out split give up every tenth of a fixed shuffle for one."""
    size = args.image_size and (args.image_size[0], args.image_size[-1])
    val = None
    if args.data == "shapes":
        size, n = size or (32, 32), args.images or 10_000
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
                f"could not download {args.data} to {args.data_dir} ({error}); with its images on disk, give their folder, "
                f"one sub-folder per class in train/ and test/: --data PATH"
            )
        train, val = [
            (torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts
        ]
        order = shuffled(len(train[0]))[: args.images]
        train, classes = (train[0][order], train[1][order]), parts[0].classes
    else:
        root = Path(args.data)
        if not root.is_dir():
            fail(f"--data {args.data} is neither shapes, cifar10, cifar100 nor a folder")
        train_dir = root / "train" if (root / "train").is_dir() else root
        val_dir = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        files, labels, classes = list_folder(train_dir)
        order = shuffled(len(files))[: args.images]
        files, labels = [files[i] for i in order.tolist()], labels[order]
        if size is None:
            size = default_size(files[0], args.patch_size)
        train = read_images(files, size, "train"), labels
        if train_dir != root and val_dir and not args.holdout:
            files, labels, val_classes = list_folder(val_dir)
            if val_classes != classes:
                fail(f"{val_dir} and {train_dir} have different classes: {sorted({*classes} ^ {*val_classes})[:5]}")
            val = read_images(files, size, "val"), labels
    if val is None or args.holdout:
        held = torch.arange(len(train[0])) % 10 == 9
        if not held.any():
            fail(f"{len(train[0])} images in {args.data} are too few: at least 10, a tenth is held out")
        train, val = (train[0][~held], train[1][~held]), (train[0][held], train[1][held])
    return Data(*train, *val, classes)


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
    except OSError as error:
        fail(f"cannot read the image {path} ({error}); repair or remove it")
    side -= side % (patch_size or default_patch(side))
    return side, side


def augment(images: Tensor, mean: Tensor, std: Tensor, min_crop: float) -> Tensor:
    """Random-resized crop and flip of a whole batch at once: uint8 (B, 3, H, W) to standardised float (B, 3, H, W).

    The crop covers min_crop to 1 of the area with a side ratio of 3/4 to 4/3, as in MAE's recipe.
    """
    B, _, H, W = images.shape
    u = torch.rand(5, B, device=images.device)
    area, ratio = min_crop + (1 - min_crop) * u[0], torch.exp(math.log(4 / 3) * (2 * u[1] - 1))
    h, w = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)  # (B,), sides as fractions
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


@torch.inference_mode()
def features(model: CLMAE, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pooled features (N, D) of uint8 images (N, 3, H, W), in large chunks."""
    chunks = (
        model.encode(standardise(x.to(mean.device), mean, std)) for x in images.split(1000)
    )  # (1000, 1+L, D) each
    return torch.cat([z[:, 1:].mean(1) for z in chunks])


@torch.inference_mode()
def knn_accuracy(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int = 20) -> float:
    """Accuracy in percent of k nearest neighbours by cosine, votes weighted exp(cosine / 0.07). Features are (N, D)."""
    train, labels, right = F.normalize(train), train_labels.to(train.device), 0
    for z, label in zip(F.normalize(val).split(1000), val_labels.to(train.device).split(1000), strict=True):
        cosine, ids = (z @ train.T).topk(min(k, len(train)), dim=1)  # (1000, k)
        votes = torch.zeros(len(z), int(labels.max()) + 1, device=z.device)
        votes.scatter_add_(1, labels[ids], (cosine / 0.07).exp())  # (1000, classes)
        right += int((votes.argmax(1) == label).sum())
    return 100 * right / len(val)


def model_knn(model: CLMAE, data: Data, mean: Tensor, std: Tensor) -> float | None:
    """kNN accuracy of an encoder on the held-out images, None without labels."""
    if not data.classes:
        return None
    parts = [features(model, images, mean, std) for images in (data.train, data.val)]
    return knn_accuracy(parts[0], data.train_labels, parts[1], data.val_labels)


@torch.inference_mode()
def hardness(model: CLMAE, images: Tensor) -> tuple[dict, Tensor]:
    """How hard the learned masks are for the MAE as it stands, on standardised images (N, C, H, W).

    hardness = loss under the masker's masks / loss under random masks: below 1 the masker helps, above 1 it opposes.
    Both losses use the same noise, the same every time. Returns the figures and the scores (N, L).
    """
    outputs = []
    for scores in (images.new_zeros(len(images), model.config.patches), None):  # random, then the masker's
        outputs.append(model(images, scores=scores, generator=torch.Generator(images.device).manual_seed(0)))
    random, learned = (o.loss.item() for o in outputs)
    diversity = mask_diversity(outputs[1].scores).item() if model.masker else None
    return {"loss_random": random, "hardness": learned / random, "diversity": diversity}, outputs[1].scores


def linear_probe(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> float:
    """Accuracy in percent of logistic regression on frozen features (N, D), each standardised; L2 1e-4, full-batch L-BFGS."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val = (train - mean) / std, (val - mean) / std
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
    return 100 * (head(val).argmax(1).cpu() == val_labels).float().mean().item()


def finetune(model: CLMAE, data: Data, mean: Tensor, std: Tensor, args: argparse.Namespace) -> float:
    """Train the whole encoder with a linear head on the pooled tokens; held-out accuracy in percent after the last epoch.

    AdamW with a learning rate that decays by 0.75 a block from the head down (MAE, appendix A.2), label smoothing 0.1.
    """
    device, encoder = mean.device, model.encoder
    head = nn.Linear(model.config.dim, len(data.classes), device=device)
    nn.init.trunc_normal_(head.weight, std=0.02)
    stages = [nn.ModuleList([encoder.patch_embed]), *encoder.blocks, nn.ModuleList([encoder.norm, head])]
    peak = args.lr * args.batch_size / 256
    groups = [
        {"params": list(s.parameters()), "peak": peak * 0.75 ** (len(stages) - 1 - i)} for i, s in enumerate(stages)
    ]
    groups[0]["params"].append(encoder.cls_token)
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    steps = len(data.train) // args.batch_size
    for epoch in (bar := tqdm(range(args.epochs), "fine-tuning", disable=None)):
        for i, ids in enumerate(torch.randperm(len(data.train))[: steps * args.batch_size].split(args.batch_size)):
            factor = lr_factor(epoch + i / steps, args.epochs, args.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            images = augment(data.train[ids].to(device), mean, std, args.min_crop)
            with autocast(args, device):
                logits = head(model.encode(images)[:, 1:].mean(1))
            loss = F.cross_entropy(logits.float(), data.train_labels[ids].to(device), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.inference_mode():
        predicted = head(features(model, data.val, mean, std)).argmax(1).cpu()
    return 100 * (predicted == data.val_labels).float().mean().item()


def evaluate(mode: str, path: str, given: dict):
    """The command --knn, --linear-probe or --finetune on a finished run, with the same on a random encoder as the floor."""
    model, checkpoint = load_run(path)
    defaults = dict(epochs=50, batch_size=128, lr=1e-3, weight_decay=0.05, warmup_epochs=5, min_crop=0.3, device=None)
    args = argparse.Namespace(**{**checkpoint["args"], **defaults, **given})
    device, data = pick_device(args.device), load_data(args)
    if not data.classes:
        fail(f"--{mode.replace('_', '-')}: the images of {args.data} have no class labels")
    mean, std = checkpoint["mean"].to(device), checkpoint["std"].to(device)
    torch.manual_seed(args.seed)
    result = {"epoch": checkpoint["epoch"], "train_images": len(data.train), "held_out_images": len(data.val)}
    if mode == "finetune":
        check_batch(args.batch_size, data)
        result["epochs_of_finetuning"] = args.epochs
    for name, m in (("pretrained", model), ("random_init", CLMAE(model.config))):
        m.to(device)
        if mode == "knn":
            result[name] = model_knn(m, data, mean, std)
        elif mode == "linear_probe":
            parts = [features(m, images, mean, std).clone() for images in (data.train, data.val)]
            result[name] = linear_probe(parts[0], data.train_labels, parts[1], data.val_labels)
        else:
            result[name] = finetune(m, data, mean, std, args)
        print(
            f"{mode} accuracy, {name.replace('_', ' ')} encoder, mean-pooled patch tokens: {result[name]:.2f} %",
            flush=True,
        )
    file = Path(path) / "evaluation.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**results, mode: result}, indent=2) + "\n")
    print(f"written to {file}")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} cannot be used ({str(error).splitlines()[0]}); cuda, mps and cpu are known")
    return torch.device(name)


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
    except Exception as error:  # a damaged file fails in many ways
        fail(
            f"{file} is damaged or no checkpoint of this program ({type(error).__name__}: {str(error).splitlines()[0]})"
        )
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
        fail(f"cannot write {run / 'checkpoint.pt'} ({error.strerror}); the last checkpoint there is whole")


def train(args: argparse.Namespace, resumed: dict | None):
    """Train for args.epochs, from the start or from a checkpoint, and draw the figures."""
    device, run = pick_device(args.device), Path(args.out)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)

    # Data, on the device if there is room for it twice over.
    data = load_data(args)
    check_batch(args.batch_size, data)
    if device.type != "cuda" or data.train.nbytes < torch.cuda.mem_get_info()[0] / 2:
        data = data._replace(train=data.train.to(device))
    N, _, H, W = data.train.shape
    steps = N // args.batch_size  # per epoch; the last, incomplete batch is dropped
    mean, std = (resumed["mean"].to(device), resumed["std"].to(device)) if resumed else statistics(data.train)
    fixed = standardise(data.val[:500].to(device), mean, std)  # the held-out images that hardness is measured on

    # Model and optimiser: one loss, one backward, one AdamW for MAE and masker.
    try:
        config = Config(
            image_size=(H, W),
            patch_size=args.patch_size or default_patch(min(H, W)),
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
    decayed = [
        p for p in model.parameters() if p.ndim in (2, 4)
    ]  # matrices and the convolution, not biases, norms, tokens
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device.type in ("cuda", "cpu"),
    )
    peak = args.lr * args.batch_size / 256

    step_model = torch.compile(model) if args.compile else model

    epoch, log, history = (
        0,
        [],
        [],
    )  # log: the records of log.jsonl; history: by epoch, scores (8, L) of 8 held-out images
    if resumed:
        epoch, log, history = resumed["epoch"] + 1, resumed["log"], resumed["history"]
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        torch.set_rng_state(resumed["rng"])
        if device.type == "cuda" and resumed["rng_cuda"] is not None:
            torch.cuda.set_rng_state(resumed["rng_cuda"])
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))

    print(
        f"{args.data}: {N:,} training and {len(data.val):,} held-out images of {H} x {W}, {len(data.classes)} classes, "
        f"{data.train.nbytes / 1e6:,.0f} MB; {config.patches} patches, {config.visible} visible; "
        f"{args.epochs} epochs of {steps} steps on {device}",
        flush=True,
    )
    trivial = model.target(fixed).var(-1, unbiased=False).mean().item()  # loss of predicting each patch's own mean
    lam, loss, lr, speed = torch.tensor(args.lambda_start, device=device), None, 0.0, None

    for epoch in range(epoch, args.epochs + 1):  # epoch 0 trains nothing: it measures the untrained model, the floor
        order, losses = torch.randperm(N, device=data.train.device), torch.zeros(steps, device=device)
        start = time.perf_counter()
        for i in (bar := tqdm(range(steps if epoch else 0), f"epoch {epoch}/{args.epochs}", leave=False, disable=None)):
            step = (epoch - 1) * steps + i
            lam.fill_(curriculum_factor(step / max(1, args.epochs * steps - 1), args.lambda_start, args.lambda_end))
            lr = peak * lr_factor(step / steps, args.epochs, args.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = data.train[order[i * args.batch_size : (i + 1) * args.batch_size]].to(device)  # (B, 3, H, W) uint8
            images = augment(images, mean, std, args.min_crop)
            with autocast(args, device):
                output = step_model(images, lam)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = output.loss.detach()  # stays on the device: reading it would make the GPU wait
            if i % 20 == 0 or i == steps - 1:
                speed = (i + 1) * args.batch_size / (time.perf_counter() - start)
                bar.set_postfix(loss=f"{losses[i].item():.4f}", lam=f"{lam.item():+.2f}", images_s=f"{speed:.0f}")
        if not losses.isfinite().all():
            i = int((~losses.isfinite()).nonzero()[0])
            fail(
                f"the loss is {losses[i].item()} at epoch {epoch}, step {i + 1}; a lower --lr may help; {run / 'checkpoint.pt'} "
                f"is the model after epoch {epoch - 1}"
            )
        if epoch:
            loss, speed = losses.mean().item(), steps * args.batch_size / (time.perf_counter() - start)

        measured, scores = hardness(model, fixed)
        knn = model_knn(model, data, mean, std) if epoch % args.knn_every == 0 or epoch == args.epochs else None
        log.append(
            {
                "epoch": epoch,
                "lambda": lam.item(),
                "loss": loss,
                "loss_trivial": trivial,
                **measured,
                "knn": knn,
                "lr": lr,
                "images_per_s": speed,
            }
        )
        history.append(scores[:8].cpu())
        save(
            {
                "args": vars(args),
                "config": asdict(config),
                "epoch": epoch,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "mean": mean.cpu(),
                "std": std.cpu(),
                "log": log,
                "history": history,
                "images": data.val[:8],
            },
            run,
        )
        with open(run / "log.jsonl", "a") as file:
            file.write(json.dumps(log[-1]) + "\n")
        print("  ".join(f"{k} {v:.4g}" for k, v in log[-1].items() if v is not None), flush=True)
        if epoch == 0 and data.classes:
            pixels = [x.flatten(1).float().to(device) - mean.mean() for x in (data.train, data.val)]
            floor = knn_accuracy(pixels[0], data.train_labels, pixels[1], data.val_labels)
            print(f"floors of the kNN accuracy: untrained encoder {knn:.1f} %, raw pixels {floor:.1f} %", flush=True)

    import visualize  # here, because it imports this file

    visualize.draw(run)


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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one line, no usage

    def add(group, name, default, text, **kwargs):
        shown = "" if default in (None, False) else f" (default: {default})"
        group.add_argument(name, default=default, help=text.replace("%", "%%") + shown, **kwargs)

    g = parser.add_argument_group("data")
    add(
        g,
        "--data",
        "shapes",
        "shapes (generated), cifar10, cifar100 (downloaded once), or the path of an image folder: "
        "train/ and val/ or test/ with a sub-folder per class, one tree with a sub-folder per class, or flat, without labels",
    )
    add(g, "--data-dir", "data", "where downloads are kept")
    add(g, "--images", None, "use only this many of the training images", type=number(int, 1), metavar="N")
    add(
        g,
        "--image-size",
        None,
        "height and width, or one for both, pixels (default: 32; for a folder the first image's, at most 224)",
        type=number(int, 1),
        nargs="+",
        metavar="PIXELS",
    )
    add(
        g,
        "--holdout",
        False,
        "evaluate on a tenth of the training images instead of val/ or test/: for tuning",
        action="store_true",
    )
    g = parser.add_argument_group("model")
    add(g, "--model", "nano", "size: nano (CPU, minutes), tiny (ViT-Tiny), small (ViT-Small)", choices=list(MODELS))
    add(
        g,
        "--patch-size",
        None,
        "pixels (default: 4 for images below 64 pixels, 8 below 128, else 16)",
        type=number(int, 1),
    )
    add(g, "--norm-pix", True, "predict patches standardised each by itself", action=argparse.BooleanOptionalAction)
    g = parser.add_argument_group("masking")
    add(g, "--masking", "curriculum", "learned masks, or random ones: plain MAE", choices=["curriculum", "random"])
    add(g, "--mask-ratio", 0.75, "fraction of the patches that is hidden", type=number(float, 0, 1))
    add(
        g, "--lambda-start", 1.0, "curriculum factor at the first step: +1 partner, 0 neutral, -1 adversary", type=float
    )
    add(g, "--lambda-end", -1.0, "curriculum factor at the last step", type=float)
    add(
        g,
        "--kappa",
        1.0,
        "std of the masker's scores, against 1.28 of the noise: how far masks may depart from random",
        type=number(float, 1e-6),
    )
    add(g, "--tau", 1.0, "temperature of the straight-through gradient", type=number(float, 1e-6))
    add(g, "--diversity", 0.0, "weight of the loss against one mask for all images", type=number(float, 0))
    g = parser.add_argument_group("training")
    add(g, "--epochs", 20, "passes over the training images", type=number(int, 1))
    add(g, "--batch-size", 128, "images per step", type=number(int, 1))
    add(g, "--lr", 1e-3, "peak learning rate per 256 images of a batch", type=number(float, 0))
    add(g, "--weight-decay", 0.05, "of matrices; 0 for biases, norms, tokens", type=number(float, 0))
    add(g, "--warmup-epochs", 2.0, "epochs in which the learning rate rises", type=number(float, 0))
    add(g, "--min-crop", 0.2, "smallest area of the random-resized crop; 1 for none", type=number(float, 0.01, 1))
    add(g, "--seed", 0, "of the weights, the order of the images, crops and masks", type=int)
    g = parser.add_argument_group("machine and output")
    add(g, "--device", None, "cuda, mps or cpu (default: the first of them that is there)")
    add(g, "--amp", None, "bfloat16 matmuls (default: on CUDA only)", action=argparse.BooleanOptionalAction)
    add(g, "--compile", False, "torch.compile the training step", action="store_true")
    add(g, "--knn-every", 5, "epochs between kNN evaluations while training", type=number(int, 1))
    add(g, "--out", None, "run folder (default: runs/ and the name of the data)")
    add(g, "--overwrite", False, "replace an existing run", action="store_true")
    g = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    add(g, "--resume", None, "go on with an interrupted run, with its options", metavar="RUN")
    for mode, text in (
        ("knn", "20 nearest neighbours"),
        ("linear-probe", "a linear classifier on the frozen encoder"),
        (
            "finetune",
            "training encoder and classifier; has its own --epochs 50, --batch-size 128, --lr 1e-3, "
            "--warmup-epochs 5, --min-crop 0.3",
        ),
    ):
        add(g, f"--{mode}", None, f"evaluate a run: {text}", metavar="RUN")
    return parser


def main():
    """The command."""
    parser = build_parser()
    args = parser.parse_args()
    typed = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), parser))))
    given = {name: value for name, value in typed.items() if value is not parser}  # without the defaults

    for mode in ("knn", "linear_probe", "finetune"):
        if mode in given:
            return evaluate(mode, given[mode], given)

    resumed = None
    if args.resume:
        _, resumed = load_run(args.resume)
        saved = {**resumed["args"], "resume": args.resume, "out": args.resume}
        for name in given.keys() - {"resume", "device", "compile", "knn_every", "data", "data_dir"}:
            if given[name] != saved[name]:
                fail(
                    f"--{name.replace('_', '-')} {given[name]}: the run in {args.resume} has {saved[name]}; "
                    f"a resumed run keeps its options"
                )
        args = argparse.Namespace(**{**saved, **given})
    else:
        name = Path(args.data).resolve().name if os.path.isdir(args.data) else args.data
        args.out = args.out or f"runs/{name}" + ("-random" if args.masking == "random" else "")
        if os.path.exists(args.out) and not args.overwrite:
            fail(
                f"{args.out} exists; --resume {args.out} goes on with it, --overwrite replaces it, --out names another folder"
            )
    try:
        train(args, resumed)
    except KeyboardInterrupt:
        if not (Path(args.out) / "checkpoint.pt").exists():
            fail("interrupted before the first checkpoint")
        print(
            f"\ninterrupted; go on from the last whole epoch with: python train.py --resume {args.out}", file=sys.stderr
        )
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

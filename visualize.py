"""Draw a run of train.py into its folder: masks.png, masks.gif, reconstructions.png, curves.png.

python visualize.py runs/shapes
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a screen

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from torch import Tensor

from clmae import CLMAE, gumbel_top_k, patchify, unpatchify
from train import load_run, standardise

SAMPLES = 1000  # masks drawn to estimate a probability
# Okabe and Ito's colours: the colour-blind tell them apart.
COLOURS = {"untrained": "black", "partner": "#0072B2", "neutral": "#666666", "adversary": "#D55E00"}


def mask_probability(scores: Tensor, visible: int) -> Tensor:
    """The probability (N, L) of being masked given scores (N, L), by sampling; its mean is the mask ratio."""
    repeated = scores.expand(SAMPLES, -1, -1).flatten(0, 1)  # (SAMPLES * N, L)
    _, kept, _ = gumbel_top_k(repeated, visible, generator=torch.Generator().manual_seed(0))
    return 1 - kept.reshape(SAMPLES, *scores.shape).mean(0)


def show(ax: Axes, image: Tensor, probability: Tensor | None = None, ratio: float = 0.0):
    """An image (3, H, W) in [0, 255]; with a probability (h, w) of being masked over it, in colour on a grey image.

    Red is masked more often than by a random mask, blue less often.
    """
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    extent = (0, image.shape[2], image.shape[1], 0)  # in pixels, so that a grid of patches covers the image
    if probability is None:
        return ax.imshow(image.clamp(0, 255).byte().permute(1, 2, 0).numpy(), extent=extent)
    ax.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=-40, vmax=295, extent=extent)  # pale, under colours
    width = min(ratio, 1 - ratio)  # white at the ratio, full colour where the nearer of 0 and 1 is reached
    return ax.imshow(
        probability.numpy(), cmap="RdBu_r", vmin=ratio - width, vmax=ratio + width, alpha=0.6, extent=extent
    )


def masks_by_epoch(checkpoint: dict, model: CLMAE, most: int) -> list[tuple[int, float, str, Tensor]]:
    """Epoch, lambda, what the masker is and its masks' probabilities (8, h, w), for at most `most` epochs."""
    c, log, history, result = model.config, checkpoint["log"], checkpoint["history"], []
    for epoch in torch.linspace(0, len(log) - 1, min(most, len(log))).round().int().tolist():
        lam = log[epoch]["lambda"]
        role = "partner" if lam > 0.1 else "adversary" if lam < -0.1 else "neutral"
        role = role if epoch else "untrained"
        result.append((epoch, lam, role, mask_probability(history[epoch], c.visible).reshape(-1, *c.grid)))
    return result


def draw_masks(checkpoint: dict, model: CLMAE, file: Path, rows: int = 6, columns: int = 9):
    """masks.png: held-out images down, epochs across."""
    images, ratio = checkpoint["images"][:rows], 1 - model.config.visible / model.config.patches
    masks = masks_by_epoch(checkpoint, model, columns)
    size = (1 + len(masks), len(images) + 1.2)
    fig, axes = plt.subplots(len(images), 1 + len(masks), figsize=size, squeeze=False, layout="constrained")
    axes[0, 0].set_title("image\n", fontsize=10)
    for ax, image in zip(axes[:, 0], images, strict=True):
        show(ax, image)
    for column, (epoch, lam, role, probability) in zip(axes.T[1:], masks, strict=True):
        column[0].set_title(f"epoch {epoch}\n$\\lambda$ = {lam:+.2f}\n{role}", fontsize=10, color=COLOURS[role])
        for ax, image, p in zip(column, images, probability, strict=False):
            drawn = show(ax, image, p, ratio)
    bar = fig.colorbar(drawn, ax=axes, location="bottom", fraction=0.03, aspect=60)
    label = f"probability of being masked (blue: less than by a random mask, {ratio:.2f}; red: more)"
    bar.set_label(label, fontsize=10)
    bar.ax.tick_params(labelsize=9)
    fig.savefig(file, dpi=110, bbox_inches="tight", pad_inches=0.05)
    plt.close(fig)


def draw_gif(checkpoint: dict, model: CLMAE, file: Path, most: int = 40):
    """masks.gif: the same over time, a frame an epoch, at most `most` of them, two a second."""
    images, ratio = checkpoint["images"][:6], 1 - model.config.visible / model.config.patches
    fig, axes = plt.subplots(2, len(images), figsize=(1.2 * len(images), 2.8), squeeze=False, layout="constrained")
    for ax, image in zip(axes[0], images, strict=True):
        show(ax, image)

    def frame(mask: tuple[int, float, str, Tensor]):
        epoch, lam, role, probability = mask
        title = f"epoch {epoch:3d}  $\\lambda$ = {lam:+.2f}  {role:9}"
        fig.suptitle(title, color=COLOURS[role], family="monospace")
        for ax, image, p in zip(axes[1], images, probability, strict=False):
            ax.clear()
            show(ax, image, p, ratio)

    FuncAnimation(fig, frame, masks_by_epoch(checkpoint, model, most)).save(file, PillowWriter(fps=2), dpi=80)
    plt.close(fig)


@torch.inference_mode()
def draw_reconstructions(checkpoint: dict, model: CLMAE, file: Path, rows: int = 4):
    """reconstructions.png: what the MAE sees and makes of it, under random and under learned masks."""
    c, raw = model.config, checkpoint["images"][:rows]
    images = standardise(raw, checkpoint["mean"], checkpoint["std"])
    shown = patchify(raw.float(), c.patch_size)  # (N, L, p*p*3)

    choices = {"random": images.new_zeros(len(images), c.patches)}
    if model.masker:
        choices["learned"] = checkpoint["history"][-1][:rows]
    columns = [("original", raw)]
    for name, scores in choices.items():
        output = model(images, scores=scores, generator=torch.Generator().manual_seed(0))  # the same noise for both
        mask = output.mask[..., None]  # (N, L, 1)
        pred = model.reconstruct(output.pred, images) * checkpoint["std"] + checkpoint["mean"]  # (N, 3, H, W)
        seen, filled = (shown * (1 - mask) + x * mask for x in (160, patchify(pred, c.patch_size)))  # 160: grey
        columns.append((f"{name} mask", unpatchify(seen, c.patch_size, c.grid)))
        columns.append(("reconstruction", unpatchify(filled, c.patch_size, c.grid)))
    fig, axes = plt.subplots(
        len(raw), len(columns), figsize=(1.5 * len(columns), 1.5 * len(raw) + 0.6), squeeze=False, layout="constrained"
    )
    for column, (title, pictures) in zip(axes.T, columns, strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, picture in zip(column, pictures, strict=True):
            show(ax, picture)
    note = "Visible patches are the real pixels: the decoder is trained on the masked ones only."
    if c.norm_pix:
        note += "\nMasked patches take mean and contrast from the original (norm_pix predicts neither)."
    fig.supxlabel(note, fontsize=8)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw_curves(checkpoint: dict, file: Path):
    """curves.png: lambda, hardness, loss and kNN by epoch."""
    log = checkpoint["log"]
    fig, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained")
    axes = axes.flat

    def line(ax: Axes, key: str, label: str | None = None, **style):
        points = [(r["epoch"], r[key]) for r in log if r[key] is not None]
        if points:
            ax.plot(*zip(*points, strict=True), label=label, **style)

    line(axes[0], "lambda", color="black")
    axes[0].set(title="curriculum factor $\\lambda$", ylabel="$\\lambda$ (+1 partner, $-$1 adversary)")
    axes[0].axhline(0, color="grey", lw=0.8, ls=":")
    line(axes[1], "hardness", color=COLOURS["adversary"], marker="o", ms=3)
    axes[1].axhline(1, color="grey", lw=0.8, ls=":")
    axes[1].set(title="hardness of the learned masks", ylabel="loss, learned / random masks")
    line(axes[2], "loss", "training, the run's masks", color=COLOURS["adversary"])
    line(axes[2], "loss_random", "held out, random masks", color=COLOURS["partner"], ls="--")
    line(axes[2], "loss_trivial", "predicting the patch mean", color="grey", ls=":")
    top = 1.3 * max([log[0]["loss_trivial"], *(r["loss_random"] for r in log[1:])])  # the untrained loss is far above
    axes[2].set(title="reconstruction loss", ylabel="mean squared error", ylim=(0, top))
    axes[2].legend(fontsize=9)
    line(axes[3], "knn", color=COLOURS["partner"], marker="o", ms=3)
    axes[3].set(title="kNN accuracy of the features", ylabel="% of held-out images")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw(run: str | Path):
    """Draw all figures of a run folder."""
    model, checkpoint = load_run(run)
    run = Path(run)
    draw_masks(checkpoint, model, run / "masks.png")
    draw_gif(checkpoint, model, run / "masks.gif")
    draw_reconstructions(checkpoint, model, run / "reconstructions.png")
    draw_curves(checkpoint, run / "curves.png")
    print(f"figures: {run / 'masks.png'}, masks.gif, reconstructions.png, curves.png")


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder written by train.py")
    draw(parser.parse_args(argv).run)


if __name__ == "__main__":
    main()

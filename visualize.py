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

from clmae import CLMAE, Output, gumbel_top_k, patchify, unpatchify
from train import load_run, standardise

SAMPLES = 1000  # masks drawn to estimate a probability
COLOURS = {"partner": "#0072B2", "neutral": "#666666", "adversary": "#D55E00"}  # Okabe and Ito's colour-blind safe set


def mask_probability(scores: Tensor, visible: int) -> Tensor:
    """The probability (N, L) of being masked given scores (N, L), by sampling; its mean is the mask ratio."""
    generator = torch.Generator().manual_seed(0)
    kept = sum(gumbel_top_k(scores, visible, generator=generator)[1] for _ in range(SAMPLES))
    return 1 - kept / SAMPLES


def phase(lam: float) -> str:
    """What the masker is at this lambda."""
    return "partner" if lam > 0.1 else "adversary" if lam < -0.1 else "neutral"


def show(ax: Axes, image: Tensor, probability: Tensor | None = None, ratio: float = 0.0):
    """An image (3, H, W) in [0, 255]; with a probability (h, w) of being masked over it, in colour on a grey image.

    Red is masked more often than by a random mask, blue less often.
    """
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    extent = (0, image.shape[2], image.shape[1], 0)
    if probability is None:
        return ax.imshow(image.clamp(0, 255).byte().permute(1, 2, 0).numpy(), extent=extent)
    ax.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=-40, vmax=295, extent=extent)
    width = min(ratio, 1 - ratio)
    return ax.imshow(
        probability.numpy(), cmap="RdBu_r", vmin=ratio - width, vmax=ratio + width, alpha=0.6, extent=extent
    )


def probabilities(checkpoint: dict, model: CLMAE) -> list[Tensor]:
    """By epoch, the probability of being masked as images (8, h, w)."""
    c = model.config
    return [mask_probability(scores, c.visible).reshape(-1, *c.grid) for scores in checkpoint["history"]]


def draw_masks(checkpoint: dict, model: CLMAE, file: Path, rows: int = 6, columns: int = 9):
    """masks.png: held-out images down, epochs across."""
    p, images, ratio = (
        probabilities(checkpoint, model),
        checkpoint["images"],
        1 - model.config.visible / model.config.patches,
    )
    epochs = torch.linspace(0, len(p) - 1, min(columns, len(p))).round().int().tolist()
    rows = min(rows, len(images))
    size = (1 + len(epochs), rows + 1.1)
    fig, axes = plt.subplots(rows, 1 + len(epochs), figsize=size, squeeze=False, layout="constrained")
    for row, image in zip(axes, images, strict=False):
        show(row[0], image)
    axes[0, 0].set_title("image\n", fontsize=8)
    for column, epoch in zip(axes.T[1:], epochs, strict=True):
        lam = checkpoint["log"][epoch]["lambda"]
        title = f"epoch {epoch}\n$\\lambda$ = {lam:+.2f}\n{phase(lam)}"
        column[0].set_title(title, fontsize=8, color=COLOURS[phase(lam)])
        for ax, image, probability in zip(column, images, p[epoch], strict=False):
            drawn = show(ax, image, probability, ratio)
    bar = fig.colorbar(drawn, ax=axes, location="bottom", fraction=0.03, aspect=60)
    bar.set_label(f"probability of being masked (blue: less than by a random mask, {ratio:.2f}; red: more)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw_gif(checkpoint: dict, model: CLMAE, file: Path, most: int = 50):
    """masks.gif: the same over time, one frame an epoch, at most `most` frames."""
    p, images, ratio = (
        probabilities(checkpoint, model),
        checkpoint["images"],
        1 - model.config.visible / model.config.patches,
    )
    frames = torch.linspace(0, len(p) - 1, min(most, len(p))).round().int().tolist()
    fig, axes = plt.subplots(2, 4, figsize=(5, 3.1), layout="constrained")

    def frame(epoch: int):
        lam = checkpoint["log"][epoch]["lambda"]
        title = f"epoch {epoch}   $\\lambda$ = {lam:+.2f}   {phase(lam)}"
        fig.suptitle(title, color=COLOURS[phase(lam)], family="monospace")
        for ax, image, probability in zip(axes.flat, images, p[epoch], strict=False):
            ax.clear()
            show(ax, image, probability, ratio)

    for ax in axes.flat[len(images) :]:
        ax.axis("off")
    FuncAnimation(fig, frame, frames).save(file, PillowWriter(fps=3), dpi=80)
    plt.close(fig)


@torch.inference_mode()
def draw_reconstructions(checkpoint: dict, model: CLMAE, file: Path, rows: int = 4):
    """reconstructions.png: what the MAE sees and makes of it, under random and under learned masks."""
    c, raw = model.config, checkpoint["images"][:rows]
    images = standardise(raw, checkpoint["mean"], checkpoint["std"])
    shown = patchify(raw.float(), c.patch_size)  # (N, L, p*p*3)

    def panels(output: Output) -> list[Tensor]:
        pred, mask = output.pred, output.mask[..., None]
        if c.norm_pix:  # the prediction has no brightness and contrast of its own: take the true patch's
            true = patchify(images, c.patch_size)
            pred = pred * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        pred = unpatchify(pred, c.patch_size, c.grid) * checkpoint["std"] + checkpoint["mean"]
        pasted = shown * (1 - mask) + patchify(pred, c.patch_size) * mask
        return [unpatchify(x, c.patch_size, c.grid) for x in (shown * (1 - mask) + 160 * mask, pasted)]

    def sample(scores: Tensor | None) -> list[Tensor]:
        return panels(model(images, scores=scores, generator=torch.Generator().manual_seed(0)))

    columns = {"original": raw}
    columns["random mask"], columns["reconstruction"] = sample(images.new_zeros(len(images), c.patches))
    if model.masker:
        columns["learned mask"], columns["reconstruction "] = sample(None)
    fig, axes = plt.subplots(
        len(raw), len(columns), figsize=(1.5 * len(columns), 1.5 * len(raw) + 0.6), squeeze=False, layout="constrained"
    )
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
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
    fig, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")

    def line(ax: Axes, key: str, label: str | None = None, **style):
        points = [(r["epoch"], r[key]) for r in log if r[key] is not None]
        ax.plot(*zip(*points, strict=True), label=label, **style) if points else None

    line(axes[0], "lambda", color="black")
    axes[0].set(title="curriculum factor $\\lambda$", ylabel="$\\lambda$ (+1 partner, $-$1 adversary)")
    axes[0].axhline(0, color="grey", lw=0.8, ls=":")
    line(axes[1], "hardness", color=COLOURS["adversary"], marker="o", ms=3)
    axes[1].axhline(1, color="grey", lw=0.8, ls=":")
    axes[1].set(title="hardness of the learned masks", ylabel="loss under learned / random masks")
    line(axes[2], "loss", "training, the run's masks", color=COLOURS["adversary"])
    line(axes[2], "loss_random", "held out, random masks", color=COLOURS["partner"], ls="--")
    line(axes[2], "loss_trivial", "predicting the patch mean", color="grey", ls=":")
    axes[2].set(title="reconstruction loss", ylabel="mean squared error", ylim=(0, 1.3 * log[0]["loss_trivial"]))
    axes[2].legend(fontsize=7)
    line(axes[3], "knn", color=COLOURS["partner"], marker="o", ms=3)
    axes[3].set(title="kNN accuracy of the features", ylabel="% of held-out images")
    for ax in axes:
        ax.set_xlabel("epoch")
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

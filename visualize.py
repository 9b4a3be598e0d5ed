"""Draw a run of train.py into its folder: step.png, masks.png, masks.gif, reconstructions.png, curves.png.

python visualize.py runs/shapes
python visualize.py runs/random runs/curriculum  # several: only compare.png, into the first one's folder
"""

import argparse
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a screen

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from torch import Tensor

from clmae import CLMAE, gumbel_noise, load, patchify, unpatchify

# Okabe and Ito's colours: the colour-blind tell them apart.
COLOURS = {"untrained": "black", "partner": "#0072B2", "neutral": "#666666", "adversary": "#D55E00"}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
# curves.png, a panel a row: title, label of the y axis, {key of the log: (label, style of the line)}. A key that was
# logged in epoch 0 only is drawn as a level. A key that no panel names gets a panel of its own.
PANELS = [
    ("curriculum factor $\\lambda$", "$\\lambda$ (+1 partner, $-$1 adversary)", {"lambda": ("", "k-")}),
    ("hardness of the learned masks", "loss, learned / random masks", {"hardness": ("", "C1o-")}),
    (
        "reconstruction loss",
        "mean squared error",
        {
            "loss": ("training, the run's masks", "C1-"),
            "loss_random": ("held out, random masks", "C0--"),
            "loss_trivial": ("predicting the patch mean", "k:"),
        },
    ),
    (
        "kNN accuracy of the features",
        "% of held-out images",
        {"knn": ("features", "C0o-"), "knn_pixels": ("raw pixels", "k:")},
    ),
    (
        "objects found by the masks",
        "area under the ROC curve",
        {"objects": ("learned masks", "C1o-"), "objects_contrast": ("contrast of a patch", "k:")},
    ),
]
UNSHOWN = {"epoch", "lr", "images_per_s", "diversity"}


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


def masks_by_epoch(record: dict, model: CLMAE, most: int) -> list[tuple[int, float, str, Tensor]]:
    """Epoch, lambda, what the masker is and its masks' probabilities (8, h, w), for at most `most` epochs."""
    log, result = record["log"], []
    for epoch in torch.linspace(0, len(log) - 1, min(most, len(log))).round().int().tolist():
        lam = log[epoch]["lambda"]
        role = "partner" if lam > 0.1 else "adversary" if lam < -0.1 else "neutral"
        probability = model.mask_probability(record["scores"][epoch]).reshape(-1, *model.config.grid)
        result.append((epoch, lam, role if epoch else "untrained", probability))
    return result


def draw_masks(record: dict, model: CLMAE, file: Path, rows: int = 6, columns: int = 9):
    """masks.png: held-out images down, epochs across."""
    images, ratio = record["images"][:rows], 1 - model.config.visible / model.config.patches
    masks = masks_by_epoch(record, model, columns)
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


def draw_gif(record: dict, model: CLMAE, file: Path, most: int = 40):
    """masks.gif: the same over time, a frame an epoch, at most `most` of them, two a second."""
    images, ratio = record["images"][:6], 1 - model.config.visible / model.config.patches
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

    FuncAnimation(fig, frame, masks_by_epoch(record, model, most)).save(file, PillowWriter(fps=2), dpi=80)


@torch.inference_mode()
def draw_reconstructions(record: dict, model: CLMAE, file: Path, rows: int = 4):
    """reconstructions.png: what the MAE sees and makes of it, under random and under learned masks."""
    c, raw = model.config, record["images"][:rows]
    images = model.standardise(raw)
    shown = patchify(raw.float(), c.patch_size)  # (N, L, p*p*3)

    columns = [("original", raw)]
    lams = {"random": 0.0} | ({"learned": record["log"][-1]["lambda"]} if model.masker else {})
    for name, lam in lams.items():
        output = model(images, lam, torch.Generator().manual_seed(0))  # the same noise for both
        mask = output.mask[..., None]  # (N, L, 1)
        pred = model.reconstruct(output.pred, images) * model.std + model.mean  # (N, 3, H, W)
        seen, filled = (shown * (1 - mask) + x * mask for x in (160, patchify(pred, c.patch_size)))  # 160: grey
        columns.append((f"{name} mask", unpatchify(seen, c.patch_size, c.grid)))
        columns.append(("reconstruction", unpatchify(filled, c.patch_size, c.grid)))
    size = (1.5 * len(columns), 1.5 * len(raw) + 0.6)
    fig, axes = plt.subplots(len(raw), len(columns), figsize=size, squeeze=False, layout="constrained")
    for column, (title, pictures) in zip(axes.T, columns, strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, picture in zip(column, pictures, strict=True):
            show(ax, picture)
    note = "Visible patches are the real pixels: the decoder is trained on the masked ones only."
    if c.norm_pix:
        note += "\nMasked patches take mean and contrast from the original (norm_pix predicts neither)."
    fig.supxlabel(note, fontsize=8)
    fig.savefig(file, dpi=110)


def draw_curves(record: dict, file: Path):
    """curves.png: the log, a panel for each of PANELS that it has something of."""
    log = record["log"]
    named = UNSHOWN.union(*(lines for _, _, lines in PANELS))
    new = [
        (key, "", {key: ("", "C0o-")}) for key in dict.fromkeys(k for entry in log for k in entry) if key not in named
    ]
    panels = [panel for panel in PANELS + new if any(key in entry for entry in log[1:] or log for key in panel[2])]
    fig, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(9, 2.8 * -(-len(panels) // 2)), layout="constrained")
    for ax, (title, unit, lines) in zip(axes.flat, panels, strict=False):
        for key, (label, style) in lines.items():
            points = [(entry["epoch"], entry[key]) for entry in log if key in entry]
            if style.endswith(":") and points:
                ax.axhline(points[0][1], color="grey", ls=":", label=label)
            elif points:
                ax.plot(*zip(*points, strict=True), style, ms=3, label=label)
        ax.set(title=title, ylabel=unit, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            ax.legend(fontsize=9)
        if "loss" in lines:  # the untrained loss is far above the others
            ax.set_ylim(0, 1.3 * max(entry[key] for entry in log[1:] or log for key in lines if key in entry))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    fig.savefig(file, dpi=110)


def draw(run: str | Path):
    """Draw all figures of a run folder."""
    model, record = load(run)
    run = Path(run)
    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=CYCLE)}):
        draw_masks(record, model, run / "masks.png")
        draw_gif(record, model, run / "masks.gif")
        draw_reconstructions(record, model, run / "reconstructions.png")
        draw_curves(record, run / "curves.png")
    plt.close("all")
    print(f"figures: {run / 'masks.png'}, masks.gif, reconstructions.png, curves.png")


def fail(message: str):
    """Stop with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors():
    """What a user can mend is told in one line, without a traceback, and with the place in the code that refused."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        fail(f"{' '.join(str(error).split())} ({Path(place.filename).name}:{place.lineno})")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        fail("out of memory: a smaller --batch-size needs less, and the learning rate follows by itself")


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder written by train.py")
    parser.error = fail
    with one_line_errors():
        draw(parser.parse_args(argv).run)


if __name__ == "__main__":
    main()

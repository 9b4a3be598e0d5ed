"""Draw a run of train.py into its folder: step.png, masks.png, masks.gif, reconstructions.png, curves.png.

python visualize.py runs/shapes
python visualize.py runs/random runs/curriculum  # several: only compare.png, into the first one's folder
"""

import argparse
import os
import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import PillowWriter
from torch import Tensor

from clmae import CLMAE, Output, gumbel_noise, load, patchify, unpatchify

plt.switch_backend("Agg")  # files only: works without a screen
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe, Ito: colour-blind safe
plt.rcParams |= {"axes.prop_cycle": plt.cycler(color=CYCLE), "figure.constrained_layout.use": True, "savefig.dpi": 110}
COLOURS = {"untrained": "black", "partner": "C0", "neutral": "#666666", "adversary": "C1"}
# By key of the log: title of its panel, its name there, its style. Dotted: a floor, logged in epoch 0 only.
PANELS = {
    "lambda": ("$\\lambda$: +1 partner, $-$1 adversary", "", "k-"),
    "hardness": ("hardness: loss, learned / random masks", "", "C1o-"),
    "loss": ("reconstruction loss", "training, the run's masks", "C1-"),
    "loss_random": ("reconstruction loss", "held out, random masks", "C0--"),
    "loss_trivial": ("reconstruction loss", "predicting the patch mean", "k:"),
    "knn": ("kNN accuracy, % of held-out images", "features", "C0o-"),
    "knn_pixels": ("kNN accuracy, % of held-out images", "raw pixels", "k:"),
    "objects": ("objects found: area under the ROC curve", "learned masks", "C1o-"),
    "objects_contrast": ("objects found: area under the ROC curve", "contrast of a patch", "k:"),
}
UNSHOWN = {"epoch", "lr", "images_per_s", "diversity"}  # in curves.png; any other key has a panel
COMPARED = ["hardness", "loss_random", "knn", "objects"]  # in compare.png, whose legend has no option of UNTOLD
UNTOLD = "seed out resume device overwrite knn_every compile evaluate finetune benchmark data_dir".split()


def show(ax: plt.Axes, image: Tensor, probability: Tensor | None = None, ratio: float = 0.0):
    """An image (3, H, W) of 0 to 255; or, on it, the chance (h, w) of being masked: red more, blue less than ratio."""
    ax.clear()  # of the frame before
    ax.axis("off")
    extent = (0, image.shape[2], image.shape[1], 0)  # in pixels, so that a grid of patches covers the image
    if probability is None:
        return ax.imshow(image.clamp(0, 255).byte().permute(1, 2, 0).numpy(), extent=extent)
    ax.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=-40, vmax=295, extent=extent)  # pale, under colours
    width = min(ratio, 1 - ratio)  # white at the ratio, full colour where the nearer of 0 and 1 is reached
    colours = {"cmap": "RdBu_r", "vmin": ratio - width, "vmax": ratio + width, "alpha": 0.6}
    return ax.imshow(probability.numpy(), extent=extent, **colours)


def show_values(ax: plt.Axes, values: Tensor, centre: float = 0.0, colours: str = "RdBu"):
    """A value for each patch, (h, w): white at the centre, grey where there is none, in figures if there is room."""
    ax.set(xticks=[], yticks=[], facecolor="0.85")
    width = 2 * (values - centre).square().nanmean().sqrt().item() or 1.0
    pale = {"cmap": colours, "vmin": centre - 1.4 * width, "vmax": centre + 1.4 * width}  # under black figures
    ax.imshow(values.clamp(centre - width, centre + width).numpy(), **pale)
    values = values.round(decimals=1) + 0  # which turns -0 into 0
    for row, column in values.isfinite().nonzero().tolist() if max(values.shape) <= 8 else []:
        ax.text(column, row, f"{values[row, column]:.1f}", fontsize=5.6, ha="center", va="center", in_layout=False)


def seen_and_filled(model: CLMAE, raw: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """What the MAE saw of raw images (N, 3, H, W), grey where masked, and what it made of them."""
    c, mask = model.config, output.mask.detach()[..., None]  # (N, L, 1)
    pred = model.reconstruct(output.pred.detach(), model.standardise(raw)) * model.std + model.mean  # (N, 3, H, W)
    shown, pred = patchify(raw.float(), c.patch_size), patchify(pred, c.patch_size)  # (N, L, p*p*3)
    return tuple(unpatchify(shown * (1 - mask) + x * mask, c.patch_size, c.grid) for x in (160, pred))


def draw_step(record: dict, model: CLMAE, file: Path):
    """step.png: the first held-out image taken through one training step, at three lambdas with the same noise."""
    grid, raw = model.config.grid, record["images"][:1]
    images = model.standardise(raw)
    a = model.masker(model.encoder.embed(images)).detach()  # (1, L)
    noise = gumbel_noise(a, torch.Generator().manual_seed(0))
    fig, axes = plt.subplots(3, 7, figsize=(11, 2 + 4.6 * grid[0] / grid[1]), layout="compressed")
    show(axes[0, 0], raw[0])
    show_values(axes[1, 0], a.reshape(grid))
    show_values(axes[2, 0], noise.reshape(grid))
    rows = [("+1", "partner", "high loss: up"), ("0", "neutral", "no push"), ("-1", "adversary", "high loss: down")]
    for ax, (lam, role, effect) in zip(axes[:, 1:], rows, strict=True):
        output = model(images, float(lam), torch.Generator().manual_seed(0))
        output.scores.retain_grad()
        output.loss.backward()
        s, visible = output.scores.detach(), output.mask == 0
        theta = (s + noise).topk(model.config.visible + 1).values[:, -2:].mean().item()  # y between visible and masked
        loss = output.patch_loss.detach().masked_fill(visible, torch.nan)
        show_values(ax[0], s.reshape(grid))
        show_values(ax[1], (s + noise).reshape(grid), theta)
        for column, picture in zip(ax[2:4], seen_and_filled(model, raw, output), strict=True):
            show(column, picture[0])
        show_values(ax[4], loss.reshape(grid), loss.nanmean().item(), "PuOr_r")
        push = -1000 * output.scores.grad.masked_fill(visible | (a > 0), torch.nan)  # the clamp stops it where a > 0
        show_values(ax[5], push.reshape(grid))
        ax[0].set_ylabel(f"$\\lambda$ = {lam}\n{role}", fontsize=14, color=COLOURS[role])
        ax[4].set_xlabel(f"mean {loss.nanmean():.2f}", fontsize=13)
        ax[5].set_xlabel(effect, fontsize=13, color=COLOURS[role])
    titles = ["image", "s =\n$\\kappa$ |$\\lambda$| min(a, 0)", "y =\ns + noise", "visible =\nK largest y"]
    titles += ["pred,\nif masked", "patch_loss,\nif masked", "push, a < 0:\n$-$1000 dL/ds"]
    titles += ["a (low = hide)", "Gumbel noise"]
    for ax, title in zip([*axes[0], *axes[1:, 0]], titles, strict=True):
        ax.set_title(title, fontsize=14)
    note = "Orange: a patch with a loss above the mean. The partner pushes its score up (blue),\n"
    fig.supxlabel(note + "to show it more often, the adversary down (red), to mask it more often.", fontsize=14)
    fig.savefig(file, dpi=130, bbox_inches="tight", pad_inches=0.05)


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
    """masks.png: the first held-out images down, epochs across."""
    images, ratio = record["images"][:rows], 1 - model.config.visible / model.config.patches
    masks = masks_by_epoch(record, model, columns)
    fig, axes = plt.subplots(len(images), 1 + len(masks), figsize=(1 + len(masks), len(images) + 1.2), squeeze=False)
    for ax, image in zip(axes[:, 0], images, strict=True):
        show(ax, image)
    for column, (epoch, lam, role, probability) in zip(axes.T[1:], masks, strict=True):
        for ax, image, p in zip(column, images, probability, strict=False):
            drawn = show(ax, image, p, ratio)
        column[0].set_title(f"epoch {epoch}\n$\\lambda$ = {lam:+.2f}\n{role}", fontsize=10, color=COLOURS[role])
    label = f"probability of being masked (blue: less than by a random mask, {ratio:.2f}; red: more)"
    fig.colorbar(drawn, ax=axes, location="bottom", fraction=0.03, aspect=60, label=label)
    fig.savefig(file, bbox_inches="tight", pad_inches=0.05)


def draw_gif(record: dict, model: CLMAE, file: Path, most: int = 40):
    """masks.gif: the same over time, a frame an epoch, at most `most` of them, two a second."""
    images, ratio = record["images"][:6], 1 - model.config.visible / model.config.patches
    fig, axes = plt.subplots(2, len(images), figsize=(1.2 * len(images), 2.8), squeeze=False)
    with (gif := PillowWriter(fps=2)).saving(fig, file, dpi=80):
        for epoch, lam, role, probability in masks_by_epoch(record, model, most):
            fig.suptitle(f"epoch {epoch}, $\\lambda$ = {lam:+.2f}, {role}", x=0.02, ha="left", color=COLOURS[role])
            for (above, below), image, p in zip(axes.T, images, probability, strict=False):
                show(above, image)
                show(below, image, p, ratio)
            gif.grab_frame()


def draw_reconstructions(record: dict, model: CLMAE, file: Path, rows: int = 4):
    """reconstructions.png: what the MAE sees and makes of it, under random and under learned masks."""
    raw = record["images"][:rows]
    columns = [("original", raw)]
    for name, lam in [("random", 0.0), ("learned", record["log"][-1]["lambda"])][: 2 if model.masker else 1]:
        output = model(model.standardise(raw), lam, torch.Generator().manual_seed(0))  # the same noise for both
        columns += zip((f"{name} mask", "reconstruction"), seen_and_filled(model, raw, output), strict=True)
    fig, axes = plt.subplots(len(raw), len(columns), figsize=(1.5 * len(columns), 1.5 * len(raw) + 0.6), squeeze=False)
    for column, (title, pictures) in zip(axes.T, columns, strict=True):
        for ax, picture in zip(column, pictures, strict=True):
            show(ax, picture)
        column[0].set_title(title, fontsize=9)
    fig.supxlabel("Visible patches: real pixels. Masked ones, with norm_pix: the real mean and contrast.", fontsize=8)
    fig.savefig(file)


def panels_by_epoch(n: int):
    """A figure with n panels, two a row, and these."""
    fig, axes = plt.subplots((n + 1) // 2, 2, figsize=(9, 2.8 * ((n + 1) // 2)), squeeze=False)
    for ax in axes.flat:
        ax.set_xlabel("epoch")
        ax.locator_params("x", integer=True)
    axes[-1, -1].set_visible(n % 2 == 0)
    return fig, axes.flat[:n]


def draw_curves(record: dict, file: Path):
    """curves.png: the log, a panel for each title of PANELS that it has something of."""
    log, panels = record["log"], {}
    for key in dict.fromkeys([*PANELS, *(key for entry in log for key in entry)]):
        title, label, style = PANELS.get(key, (key, "", "C0o-"))
        line = [(entry["epoch"], entry[key]) for entry in log if key in entry]
        if style == "k:" and line and title in panels:
            panels[title].append(([*line, (log[-1]["epoch"], line[0][1])], label, style))
        elif style != "k:" and line and key not in UNSHOWN:
            panels.setdefault(title, []).append((line, label, style))
    fig, axes = panels_by_epoch(len(panels))
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        for line, label, style in lines:
            ax.plot(*zip(*line, strict=True), style, ms=3, label=label)
        if len(lines) > 1:
            ax.legend(fontsize=9)
        if title == "reconstruction loss":  # the untrained loss is far above the others
            ax.set_ylim(0, 1.3 * max(value for line, _, _ in lines for epoch, value in line if epoch or len(log) < 2))
    fig.savefig(file)


def draw(run: str | Path):
    """Draw all figures of a run folder."""
    run, (model, record) = Path(run), load(run)
    if model.masker:
        draw_step(record, model, run / "step.png")
    draw_masks(record, model, run / "masks.png")
    draw_gif(record, model, run / "masks.gif")
    draw_reconstructions(record, model, run / "reconstructions.png")
    draw_curves(record, run / "curves.png")
    plt.close("all")
    print(f"figures in {run}")


def compare(runs: list[str]):
    """compare.png, in the first folder: runs by epoch. Of x-0, x-1, ..., alike but for the seed: the mean and range."""
    arms = {}  # (name, options): logs by run
    for run in map(Path, runs):
        record = load(run)[1]
        told = frozenset(f"{option} {value}" for option, value in record["options"].items() if option not in UNTOLD)
        arms.setdefault((re.sub(r"-\d+$", "", str(run)), told), {})[run] = record["log"]
    shared = frozenset.intersection(*(told for _, told in arms))
    known = {key for logs in arms.values() for log in logs.values() for entry in log for key in entry}
    keys = [key for key in COMPARED if key in known]
    fig, axes = panels_by_epoch(len(keys))
    for i, ((name, told), logs) in enumerate(arms.items()):
        name = f"{name} ({len(logs)} seeds)" if len(logs) > 1 else str(*logs)
        for ax, key in zip(axes, keys, strict=True):
            ax.set(title=PANELS[key][0], ylabel=PANELS[key][1])
            values = {}  # by epoch
            for entry in (entry for log in logs.values() for entry in log if key in entry):
                if entry["epoch"] or key != "loss_random":  # the untrained loss is far above the others
                    values.setdefault(entry["epoch"], []).append(entry[key])
            epochs = sorted(values)
            low, middle, high = ([f(values[epoch]) for epoch in epochs] for f in (min, mean, max))
            ax.plot(epochs, middle, "o-", ms=3, color=f"C{i}", label="; ".join([name, *sorted(told - shared)]))
            ax.fill_between(epochs, low, high, color=f"C{i}", alpha=0.2, lw=0)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", fontsize=9)
    fig.savefig(file := Path(runs[0], "compare.png"), bbox_inches="tight")
    print(f"figure: {file}")


def fail(message: str):
    """Stop with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors():
    """What a user can mend is told in one line, without a traceback, and with the place in the code that refused."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # if closed
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter of a path
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


def mend_streams():
    """Closed streams, and letters that a terminal lacks, stop no command."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by train.py")
    parser.error = fail
    with one_line_errors():
        runs = parser.parse_args(argv).runs
        draw(runs[0]) if len(runs) == 1 else compare(runs)


if __name__ == "__main__":
    main()

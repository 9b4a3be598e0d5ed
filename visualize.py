"""Draw a run of train.py into its folder: step.png, masks.png, masks.gif, reconstructions.png, curves.png.

python visualize.py runs/shapes
python visualize.py runs/random runs/curriculum  # several: only compare.png, into the first one's folder
"""

import argparse
import itertools
import re
from pathlib import Path
from statistics import mean

import matplotlib.style
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

from clmae import CLMAE, Output, gumbel_noise, load, load_record, unpatchify

STYLE = ["default", "tableau-colorblind10", {"savefig.dpi": 110, "font.size": 9}]
COLOURS = {"untrained": "black", "partner": "C0", "neutral": "#666666", "adversary": "C1"}
# By key of the log: title of its panel, its name there, its style. Dotted: a floor, logged in epoch 0 only.
PANELS = {
    "lambda": ("$\\lambda$: +1 partner, $-$1 adversary", "", "k-"),
    "hardness": ("hardness: loss, learned / random masks", "", "C1o-"),
    "loss": ("reconstruction loss", "training, the run's masks", "C1o-"),
    "loss_random": ("reconstruction loss", "held out, random masks", "C0o--"),
    "loss_trivial": ("reconstruction loss", "predicting the patch mean", "k:"),
    "knn": ("kNN, % of held-out images", "features", "C0o-"),
    "knn_pixels": ("kNN, % of held-out images", "raw pixels", "k:"),
    "linear_probe": ("linear probe, % of held-out images", "", "C0o-"),
    "objects": ("objects: 1 hidden, 0 shown, 0.5 chance", "", "C1o-"),
}
UNSHOWN = {"epoch", "lr", "images_per_s", "diversity"}  # in curves.png; any other key has a panel
COMPARED = ["hardness", "loss_random", "knn", "linear_probe", "objects"]  # in compare.png
MAY_DIFFER = {"seed", "out", "resume", "device", "compile", "data_dir", "evaluate_every"}  # in a line of it


def show(ax: matplotlib.axes.Axes, image: Tensor, probability: Tensor | None = None, ratio: float = 0.0):
    """An image (3, H, W) of 0 to 255; or, on it, the chance (h, w) of being masked: red more, blue less than ratio."""
    ax.set_axis_off()
    extent = (0, image.shape[2], image.shape[1], 0)  # in pixels, so that a grid of patches covers the image
    if probability is None:
        return ax.imshow(image.clamp(0, 255).byte().permute(1, 2, 0).numpy(), extent=extent)
    ax.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=-40, vmax=295, extent=extent)  # pale, under colours
    half = min(ratio, 1 - ratio)  # white at the ratio, full colour where the nearer of 0 and 1 is reached
    return ax.imshow(probability.numpy(), cmap="RdBu_r", vmin=ratio - half, vmax=ratio + half, alpha=0.6, extent=extent)


def show_values(ax: matplotlib.axes.Axes, title: str, values: Tensor, colours: str = "RdBu"):
    """A value for each patch, (h, w): white at 0, grey where there is none, in figures if there is room."""
    ax.set(title=title, xticks=[], yticks=[], facecolor="0.85")
    width = 2 * values.square().nanmean().sqrt().nan_to_num().clamp_min(1e-9).item()
    ax.imshow(values.clamp(-width, width).numpy(), cmap=colours, vmin=-1.4 * width, vmax=1.4 * width)  # pale
    for i, j in (values.isfinite() & (max(values.shape) <= 8)).nonzero().tolist():
        figure = f"{values[i, j]:.1f}".replace("-0.0", "0.0")
        ax.text(j, i, figure, fontsize=7, ha="center", va="center", in_layout=False)


def seen_and_filled(model: CLMAE, raw: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """What the MAE saw of raw images (N, 3, H, W), grey where masked, and what it made of them."""
    mask = unpatchify(output.mask[..., None].expand_as(output.pred), model.config.patch_size, model.config.grid)
    pred = model.reconstruct(output.pred.detach(), model.standardise(raw)) * model.std + model.mean  # (N, 3, H, W)
    return raw * (1 - mask) + 160 * mask, raw * (1 - mask) + pred * mask


@torch.enable_grad()
def draw_step(record: dict, model: CLMAE, file: Path):
    """step.png: the first held-out image taken through one training step, at lambda = +1 and -1 with the same noise."""
    grid, raw = model.config.grid, record["images"][:1]
    images = model.standardise(raw)
    outputs = [model(images, lam, torch.Generator().manual_seed(0)) for lam in (1.0, -1.0, 0.0)]
    partner = outputs[0]
    s = partner.scores.detach()  # (1, L)
    learned = partner.scores.requires_grad  # not so with masks of one's own
    a = model.masker(model.encoder.embed(images)).detach() if learned else torch.full_like(s, torch.nan)  # (1, L)
    y = s + gumbel_noise(s, torch.Generator().manual_seed(0))
    y = y - y.topk(model.config.visible + 1).values[:, -2:].mean()  # less theta, midway between visible and masked
    loss = partner.patch_loss.detach().masked_fill(partner.mask == 0, torch.nan)
    seen, filled = seen_and_filled(model, raw, partner)

    fig = Figure(figsize=(11, 1.5 + 3.5 * min(max(grid[0] / grid[1], 0.4), 2)), layout="constrained")
    same, pushed = fig.subfigures(1, 2, width_ratios=(2, 1))
    same.suptitle(f"One step, last masker (epoch {record['log'][-1]['epoch']}): the same at $\\lambda$ = +1 and $-$1")
    upper, lower = same.subplots(2, 4)
    show(upper[0], raw[0]).axes.set_title("image")
    show_values(upper[1], "a: the masker's score,\nlow = hide", a.reshape(grid))
    show_values(upper[2], "s = $\\kappa$ |$\\lambda$| min(a, 0)\nred: hide more often", s.reshape(grid))
    show_values(upper[3], "y $-$ $\\theta$, y = s + noise\nblue: the K largest", y.reshape(grid))
    show(lower[0], seen[0]).axes.set_title("visible: y > $\\theta$")
    show(lower[1], filled[0]).axes.set_title("pred, where masked")
    show_values(lower[2], f"patch_loss\nof masked, mean {loss.nanmean():.2f}", loss.reshape(grid), "PuOr_r")
    show_values(lower[3], "cost: patch_loss $-$ mean\norange: above 0", (loss - loss.nanmean()).reshape(grid), "PuOr_r")

    pushed.set_facecolor("0.95")
    pushed.suptitle("push = $-$1000 $\\partial$loss/$\\partial$s: where s moves")
    titles = "+1: partner", "$-$1: adversary", "0: s = 0, another\nmask, no push"
    for ax, title, output in zip(pushed.subplot_mosaic("AB;C.").values(), titles, outputs, strict=True):
        push = torch.full_like(s, torch.nan)
        if output.scores.requires_grad:
            (gradient,) = torch.autograd.grad(output.loss, output.scores, allow_unused=True, materialize_grads=True)
            push = (-1000 * gradient).masked_fill((output.mask == 0) | (output.scores == 0), torch.nan)
        show_values(ax, f"$\\lambda$ = {title}", push.reshape(grid))
    why = "Where cost > 0 (orange)\ns moves at +1 up (blue):\nshown more often,\nat -1 down (red):\nhidden more often."
    pushed.text(0.53, 0.1, why + "\n\nGrey: visible, or a > 0:\nnothing moves s.")
    fig.savefig(file, dpi=130)


def describe_masks(record: dict, model: CLMAE, epoch: int) -> tuple[list[str], str, Tensor]:
    """Of an epoch: words, their colour, and the chances (8, h, w) of each patch of 8 images to be masked."""
    figures = record["log"][epoch]
    lam = figures["lambda"]
    role = ("neutral", "partner", "adversary")[(lam > 0.1) - (lam < -0.1)] if epoch else "untrained"
    words = [f"epoch {epoch}", f"$\\lambda$ = {lam:+.2f}", role]
    if "objects" in figures and role != "neutral":  # which has no masks to speak of
        words.append(f"objects {figures['objects']:.2f}")
    return words, COLOURS[role], model.mask_probability(record["scores"][epoch]).reshape(-1, *model.config.grid)


def spread(n: int, most: int) -> list[int]:
    """At most so many of the numbers 0 to n - 1, evenly spread, first and last among them."""
    return torch.linspace(0, n - 1, min(most, n)).round().int().tolist()


def draw_masks(record: dict, model: CLMAE, file: Path):
    """masks.png: the first held-out images down, at most 9 epochs across."""
    images, ratio = record["images"][:6], 1 - model.config.visible / model.config.patches
    columns = [describe_masks(record, model, epoch) for epoch in spread(len(record["log"]), 9)]
    n = len(images)
    fig = Figure(figsize=(1.1 * max(6, 1 + len(columns)), 1.1 * n + 1.9), layout="constrained")
    axes = fig.subplots(n, 1 + len(columns), squeeze=False)
    for column, (words, colour, chances) in zip(axes.T, [([], "black", [None] * n), *columns], strict=True):
        column[0].set_title("\n".join(words), color=colour)
        for ax, image, chance in zip(column, images, chances, strict=False):
            drawn = show(ax, image, chance, ratio)
    caption = f"probability of being masked (white: random masks)\nRows: the first {n} held-out images, not selected."
    if "objects" in record["log"][-1]:
        caption += "\nobjects, of up to 500 images: 0.5 chance; above, masks hide the shapes; below, show them."
    fig.colorbar(drawn, ax=axes, location="bottom", label=caption, aspect=60, pad=0.01)
    fig.savefig(file)


def draw_film(record: dict, model: CLMAE, file: Path):
    """masks.gif: at most 40 epochs of five images, two a second."""
    images, ratio = record["images"][:5], 1 - model.config.visible / model.config.patches  # of more it grows too large
    frames = [describe_masks(record, model, epoch) for epoch in spread(len(record["log"]), 40)]
    n = len(images)
    fig = Figure(figsize=(1.1 * max(4, n), 2.5), layout="constrained")
    for axes, chances in zip(fig.subplots(2, n, squeeze=False), ([None] * n, frames[0][-1]), strict=True):
        drawn = [show(*cell, ratio) for cell in zip(axes, images, chances, strict=False)]
    gif = PillowWriter(fps=2)
    with gif.saving(fig, file, dpi=80):
        for words, colour, chances in frames:
            fig.suptitle(", ".join(words), x=0.01, ha="left", color=colour, fontsize=12)
            for picture, chance in zip(drawn, chances, strict=False):
                picture.set_data(chance.numpy())
            gif.grab_frame()


def draw_reconstructions(record: dict, model: CLMAE, file: Path):
    """reconstructions.png: what the MAE sees and makes of it, under random and under learned masks."""
    raw = record["images"][:4]
    columns = [("original", raw)]
    for lam in dict.fromkeys((0.0, record["log"][-1]["lambda"])):  # one, if the run's masks are random
        title = {0.0: "random mask"}.get(lam, f"learned mask,\n$\\lambda$ = {lam:+.2f}")
        output = model(model.standardise(raw), lam, torch.Generator().manual_seed(0))  # the same noise for both
        columns += zip((title, "reconstruction"), seen_and_filled(model, raw, output), strict=True)
    fig = Figure(figsize=(1.5 * len(columns), 1.5 * len(raw) + 0.7), layout="compressed")
    for column, (title, pictures) in zip(fig.subplots(len(raw), len(columns), squeeze=False).T, columns, strict=True):
        column[0].set_title(title)
        list(map(show, column, pictures))
    fig.supxlabel("Visible patches: real pixels. Masked ones, with norm_pix: the real mean and contrast.", wrap=True)
    fig.savefig(file)


def draw_panels(lines: list[tuple], file: Path, one_legend: bool = False):
    """A panel for each title of lines (title, label, style, key, logs): mean and range, where all logs have a value."""
    lines = [line for line in lines if any(line[3] in figures for figures in itertools.chain(*line[4]))]
    titles = list(dict.fromkeys(title for title, *_ in lines))
    rows = (len(titles) + 1) // 2
    fig = Figure(figsize=(9, 2.7 * rows), layout="constrained")
    axes = {title: fig.add_subplot(rows, 2, i, title=title, xlabel="epoch") for i, title in enumerate(titles, start=1)}
    for title, label, style, key, logs in lines:
        ax = axes[title]
        ax.locator_params("x", integer=True)
        ax.axhline({"hardness": 1.0, "objects": 0.5}.get(key, float("nan")), color="0.8", lw=0.8)  # as random masks
        runs = [{figures["epoch"]: figures[key] for figures in log if key in figures} for log in logs]
        if style == "k:":
            ax.axhline(runs[0][0], color="k", ls=":", label=label)
            continue
        epochs = sorted(set.intersection(*map(set, runs)))
        if key == "loss_random":
            epochs.remove(0)  # untrained it is far above the others
        values = [[run[epoch] for run in runs] for epoch in epochs]
        low, middle, high = ([f(value) for value in values] for f in (min, mean, max))
        ax.plot(epochs, middle, style, ms=3, label=label)
        ax.fill_between(epochs, low, high, color=ax.lines[-1].get_color(), alpha=0.2, lw=0)

    if one_legend:
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left")
    for ax in fig.axes:
        if len(ax.get_legend_handles_labels()[1]) > 1 and not one_legend:
            ax.legend()
    fig.savefig(file)


@matplotlib.style.context(STYLE)  # around drawing and saving: some settings are read late
def draw(run: str | Path):
    """Draw all figures of a run folder."""
    model, record = load(run)
    run, log = record["run"], record["log"]
    if model.masker is not None:
        draw_step(record, model, run / "step.png")
    draw_masks(record, model, run / "masks.png")
    draw_film(record, model, run / "masks.gif")
    draw_reconstructions(record, model, run / "reconstructions.png")
    keys = dict.fromkeys([*PANELS, *itertools.chain(*log)])
    lines = [(*PANELS.get(key, (key, "", "C0o-")), key, [log]) for key in keys if key not in UNSHOWN]
    draw_panels(lines, run / "curves.png")
    print(f"figures in {run}")


@matplotlib.style.context(STYLE)
def compare(*runs: str | Path):
    """compare.png, in the first folder: runs by epoch. Of x-0, x-1, ..., alike but for the seed: mean and range."""
    arms = {}  # by folder without its number, and options: names, logs
    records = [load_record(run) for run in runs]  # without their models: clmae.py may have been changed in between
    for record in records:
        folder = record["run"].resolve()
        kept = str(sorted((name, value) for name, value in record["options"].items() if name not in MAY_DIFFER))
        arms.setdefault((re.sub(r"-\d+$", "", str(folder)), kept), []).append((folder.name, record["log"]))

    lines = []
    for i, ((folder, _), members) in enumerate(arms.items()):
        names, logs = zip(*members, strict=True)
        label = f"{Path(folder).name}, {len(logs)} seeds: mean and range" if len(logs) > 1 else names[0]
        lines += [(", ".join(filter(None, PANELS[key][:2])), label, f"C{i}o-", key, logs) for key in COMPARED]
    draw_panels(lines, records[0]["run"] / "compare.png", one_legend=True)
    print(f"figure: {records[0]['run'] / 'compare.png'}")


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by train.py")
    runs = parser.parse_args(argv).runs
    try:
        draw(*runs) if len(runs) == 1 else compare(*runs)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

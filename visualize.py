"""Draw a run of train.py into its folder: step.png, masks.png, masks.gif, reconstructions.png, curves.png.

python visualize.py runs/shapes
python visualize.py runs/random runs/curriculum  # several: only compare.png, into the first one's folder
"""

import argparse
import itertools
import json
import re
from pathlib import Path
from statistics import mean

import matplotlib.style
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

from clmae import CLMAE, Output, gumbel_noise, load, load_record, unpatchify

COLOURS = matplotlib.cycler(color=["#0072b2", "#d55e00", "#009e73", "black", "#cc79a7", "#e69f00"])  # Okabe, Ito
STYLE = ["default", {"savefig.dpi": 110, "font.size": 9, "axes.prop_cycle": COLOURS}]
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


def show_values(ax: matplotlib.axes.Axes, values: Tensor, decimals: int, colours: str):
    """A value for each patch, (h, w): white at 0, plain grey where it is inf, hatched where it is nan."""
    ax.patch.set(hatch="////", edgecolor="0.7")
    ax.imshow(values.isinf().numpy(), cmap="Greys", vmin=0, vmax=4, alpha=values.isinf().float().numpy())
    values = values.masked_fill(values.isinf(), torch.nan)
    width = 2 * values.square().nanmean().sqrt().nan_to_num().clamp_min(1e-9).item()
    ax.imshow(values.clamp(-width, width).numpy(), cmap=colours, vmin=-1.4 * width, vmax=1.4 * width)  # pale
    for i, j in values.isfinite().nonzero().tolist():
        figure = f"{values[i, j] + 0:.{decimals}f}"  # -0.0 is below 0
        ax.text(j, i, figure, fontsize=min(11 - decimals, 45 / len(figure)), ha="center", va="center", in_layout=False)


def seen_and_filled(model: CLMAE, raw: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """What the MAE saw of raw images (N, 3, H, W), grey where masked, and what it made of them."""
    mask = unpatchify(output.mask[..., None].expand_as(output.pred), model.config.patch_size, model.config.grid)
    pred = model.reconstruct(output.pred.detach(), model.standardise(raw)) * model.std + model.mean  # (N, 3, H, W)
    return raw * (1 - mask) + 160 * mask, raw * (1 - mask) + pred * mask


@torch.enable_grad()
def draw_step(record: dict, model: CLMAE, file: Path):
    """step.png: an image's step at the run's last lambda, numbered as in CLMAE.forward; the PNG has its values."""
    c, raw_image, last = model.config, record["images"][:1], record["log"][-1]
    images = model.standardise(raw_image)
    out = model(images, last["lambda"], torch.Generator().manual_seed(0))
    visible, s = (out.mask == 0).reshape(c.grid), out.scores.detach().reshape(c.grid)  # (h, w) each, as what follows
    y = s + gumbel_noise(s, torch.Generator().manual_seed(0))
    above = y - y.flatten().topk(c.visible + 1).values[-2:].mean()  # y - theta
    patch_loss = out.patch_loss.detach().reshape(c.grid).masked_fill(visible, torch.nan)
    raw = push = torch.full_like(s, torch.nan)
    if out.scores.requires_grad:  # not so with masks of one's own
        raw = model.masker(model.encoder.embed(images)).detach().reshape(c.grid)
        push = -1000 * torch.autograd.grad(out.loss, out.scores)[0].reshape(c.grid)
        push = push.masked_fill(s == 0, torch.inf).masked_fill(visible, torch.nan)
    seen, filled = seen_and_filled(model, raw_image, out)
    panels = {
        "1. raw\nred: hide": (raw, 1, "RdBu"),
        "1. s\nred: hide": (s, 1, "RdBu"),
        "2. y $-$ $\\theta$\nblue: visible": (above, 1, "RdBu"),
        "2. visible\ngrey: hidden": (seen[0],),
        "3. pred\nand visible pixels": (filled[0],),
        "4. patch_loss\norange: high": (patch_loss, 1, "PuOr_r"),
        "5. cost\norange: above 0": (patch_loss - out.mae_loss.item(), 2, "PuOr_r"),
        "5. soft\nblue: high": (torch.sigmoid(above / c.tau), 2, "RdBu"),
        "6. push $\\times$ 1000\nred: hide more": (push, 2, "RdBu"),
    }

    # The frame: the 4 x 4 patches with the largest sum of |push|; in the middle, if there is none.
    h, w = (min(4, n) for n in c.grid)
    sums = push.nan_to_num(posinf=0).abs().unfold(0, h, 1).unfold(1, w, 1).sum((2, 3))  # by the upper left patch
    i, j = divmod(sums.argmax().item(), sums.shape[1]) if sums.any() else (n // 2 for n in sums.shape)

    fig, p = Figure(figsize=(8.3, 4.4), layout="constrained"), c.patch_size
    whole, *axes = fig.subplots(2, 5, subplot_kw={"xticks": [], "yticks": []}).flat
    show(whole, raw_image[0]).axes.set_title("image\nframe: what follows")
    whole.add_patch(matplotlib.patches.Rectangle((j * p, i * p), w * p, h * p, fill=False, edgecolor="red", lw=2))
    told = {"epoch": last["epoch"], "lambda": last["lambda"]}
    for ax, (title, (values, *how)) in zip(axes, panels.items(), strict=True):
        n = values.shape[-1] // c.grid[1]  # of a patch: 1 value, p pixels
        shown = values[..., i * n : (i + h) * n, j * n : (j + w) * n]
        show_values(ax, shown, *how) if how else show(ax, shown)
        ax.set_title(title)
        told[title.split()[1]] = shown.tolist() if how else None
    fig.savefig(file, dpi=200, metadata={"step": json.dumps(told)})


def describe_masks(record: dict, model: CLMAE, most: int) -> list[tuple[list[str], Tensor]]:
    """At most so many epochs, and that of the easiest masks: words, and the chances (8, h, w) of being masked."""
    log, described = record["log"], []
    easiest = min(range(len(log)), key=lambda epoch: log[epoch]["hardness"])
    for epoch in sorted({easiest, *torch.linspace(0, len(log) - 1, most).round().int().tolist()}):
        lam = log[epoch]["lambda"]
        role = ("neutral", "partner", "adversary")[(lam > 0.1) - (lam < -0.1)] if epoch else "untrained"
        chances = model.mask_probability(record["scores"][epoch]).reshape(-1, *model.config.grid)
        described.append(([f"epoch {epoch}", f"$\\lambda$ = {lam:+.2f}", role], chances))
    return described


def draw_masks(record: dict, model: CLMAE, file: Path):
    """masks.png: the first held-out images down, epochs across."""
    images, ratio = record["images"][:6], 1 - model.config.visible / model.config.patches
    n, columns = len(images), describe_masks(record, model, 7)
    fig = Figure(figsize=(1.1 * max(6, 1 + len(columns)), 1.1 * n + 1.6), layout="constrained")
    axes = fig.subplots(n, 1 + len(columns), squeeze=False)
    for column, (words, chances) in zip(axes.T, [([], [None] * n), *columns], strict=True):
        column[0].set_title("\n".join(words))
        for ax, image, chance in zip(column, images, chances, strict=False):
            drawn = show(ax, image, chance, ratio)
    caption = f"probability of being masked (white: random masks)\nRows: the first {n} held-out images, not selected."
    fig.colorbar(drawn, ax=axes, location="bottom", label=caption, aspect=60, pad=0.01)
    fig.savefig(file)


def draw_film(record: dict, model: CLMAE, file: Path):
    """masks.gif: five images, two epochs a second."""
    images, ratio = record["images"][:5], 1 - model.config.visible / model.config.patches  # of more it grows too large
    n, frames = len(images), describe_masks(record, model, 40)
    fig = Figure(figsize=(1.1 * max(4, n), 2.5), layout="constrained")
    for axes, chances in zip(fig.subplots(2, n, squeeze=False), ([None] * n, frames[0][-1]), strict=True):
        drawn = [show(*cell, ratio) for cell in zip(axes, images, chances, strict=False)]
    gif = PillowWriter(fps=2)
    with gif.saving(fig, file, dpi=80):
        for words, chances in frames:
            fig.suptitle(", ".join(words), x=0.01, ha="left", fontsize=12)
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
        ax.fill_between(epochs, low, high, color=ax.lines[-1].get_color(), alpha=0.12, lw=0)

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

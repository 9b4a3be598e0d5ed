"""Draw a run of train.py into its folder: step.png, masks.png, masks.gif, reconstructions.png, curves.png.

python visualize.py runs/shapes
python visualize.py runs/random runs/curriculum  # several: only compare.png, into the first one's folder
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from statistics import mean

import matplotlib.style
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

from clmae import CLMAE, Output, gumbel_noise, load, load_record, unpatchify

CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe, Ito: colour-blind safe
STYLE = {"axes.prop_cycle": matplotlib.cycler(color=CYCLE), "savefig.dpi": 110, "font.size": 9}
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
    "objects": ("objects: 1 hidden, 0 shown, 0.5 chance", "learned masks", "C1o-"),
    "objects_contrast": ("objects: 1 hidden, 0 shown, 0.5 chance", "high contrast hidden", "k:"),
}
UNSHOWN = {"epoch", "lr", "images_per_s", "diversity"}  # in curves.png; any other key has a panel
COMPARED = ["hardness", "loss_random", "knn", "linear_probe", "objects"]  # in compare.png, whose legend leaves out:
UNTOLD = "seed out resume device overwrite compile graph data_dir evaluate_every knn_every evaluate finetune benchmark"
LEARNED = ["lambda_start", "lambda_end", "kappa", "tau"]  # left out of random masks, which have none of them


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


def draw_masks(record: dict, model: CLMAE, run: Path):
    """masks.png: the first held-out images down, at most 9 epochs across; masks.gif: at most 40, two a second."""
    masks = []  # of each epoch: words, their colour, the chances (8, h, w) of being masked
    log = record["log"]
    for epoch in torch.linspace(0, len(log) - 1, min(40, len(log))).round().int().tolist():
        lam = log[epoch]["lambda"]
        role = "untrained"
        if epoch > 0:
            role = ("neutral", "partner", "adversary")[(lam > 0.1) - (lam < -0.1)]
        words = [f"epoch {epoch}", f"$\\lambda$ = {lam:+.2f}", role]
        if "objects" in log[epoch] and role != "neutral":  # which has no masks to speak of
            words.append(f"objects {log[epoch]['objects']:.2f}")
        chances = model.mask_probability(record["scores"][epoch]).reshape(-1, *model.config.grid)
        masks.append((words, COLOURS[role], chances))

    columns = [masks[i] for i in torch.linspace(0, len(masks) - 1, min(9, len(masks))).round().int().tolist()]
    images, ratio = record["images"][:6], 1 - model.config.visible / model.config.patches
    n = len(images)
    tall = 1.1 * n + 1.9  # inches, 1.9 of them for words
    place = {"left": 0.01, "right": 0.99, "wspace": 0.08, "hspace": 0.08, "bottom": 1.05 / tall, "top": 1 - 0.85 / tall}
    fig = Figure(figsize=(1.1 * max(6, 1 + len(columns)), tall))
    axes = fig.subplots(n, 1 + len(columns), squeeze=False, gridspec_kw=place)
    for column, (words, colour, chances) in zip(axes.T, [([], "black", [None] * n), *columns], strict=True):
        column[0].set_title("\n".join(words), color=colour)
        for ax, image, chance in zip(column, images, chances, strict=False):
            drawn = show(ax, image, chance, ratio)
    caption = f"probability of being masked (white: random masks)\nRows: the first {n} held-out images, not selected."
    if "objects" in log[-1]:
        caption += "\nobjects, of up to 500 images: 0.5 chance; above, masks hide the shapes; below, show them."
    bar = fig.add_axes((0.03, 0.82 / tall, 0.94, 0.15 / tall))
    fig.colorbar(drawn, cax=bar, orientation="horizontal", label=caption)
    fig.savefig(run / "masks.png")

    n = min(n, 5)  # all six would be a file of more than 400 kB
    fig = Figure(figsize=(1.1 * max(4, n), 2.5))
    rows = fig.subplots(2, n, squeeze=False, gridspec_kw=place | {"bottom": 0.01, "top": 0.89})
    for axes, chances in zip(rows, ([None] * n, masks[0][-1]), strict=True):
        drawn = [show(*cell, ratio) for cell in zip(axes, images, chances, strict=False)]
    gif = PillowWriter(fps=2)
    with gif.saving(fig, run / "masks.gif", dpi=80):
        for words, colour, chances in masks:
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
        for ax, picture in zip(column, pictures, strict=True):
            show(ax, picture)
    fig.supxlabel("Visible patches: real pixels. Masked ones, with norm_pix: the real mean and contrast.", wrap=True)
    fig.savefig(file)


def draw_panels(lines: list[tuple], file: Path, one_legend: bool = False):
    """A panel for each title of lines (title, label, style, key, logs); of several logs the mean and the range."""
    panels = {}  # by title: (label, style, (epoch, value) pairs)
    for title, label, style, key, logs in lines:
        entries = [entry for entry in itertools.chain(*logs) if key in entry]
        pairs = [(entry["epoch"], entry[key]) for entry in entries if entry["epoch"] or key != "loss_random"]
        pairs += [(logs[0][-1]["epoch"], floor) for _, floor in pairs[:1] if style == "k:"]
        if pairs and (style != "k:" or title in panels):
            panels.setdefault(title, []).append((label, style, pairs))

    rows = (len(panels) + 1) // 2
    fig = Figure(figsize=(9, 2.7 * rows), layout="constrained")
    for i, (title, curves) in enumerate(panels.items(), start=1):
        ax = fig.add_subplot(rows, 2, i, title=title, xlabel="epoch")
        ax.locator_params("x", integer=True)
        for label, style, pairs in curves:
            epochs = sorted({epoch for epoch, _ in pairs})
            several = [[value for at, value in pairs if at == epoch] for epoch in epochs]
            low, middle, high = ([f(values) for values in several] for f in (min, mean, max))
            ax.plot(epochs, middle, style, ms=3, label=label)
            ax.fill_between(epochs, low, high, color=ax.lines[-1].get_color(), alpha=0.2, lw=0)
        if len(curves) > 1 and not one_legend:
            ax.legend()
    if one_legend:
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left")
    fig.savefig(file)


@matplotlib.style.context(["default", STYLE])  # around drawing and saving: some settings are read late
def draw(run: str | Path):
    """Draw all figures of a run folder."""
    model, record = load(run)
    run = record["run"]
    (run / "step.png").unlink(missing_ok=True)  # of another run, if this one has no masker
    if model.masker is not None:
        draw_step(record, model, run / "step.png")
    draw_masks(record, model, run)
    draw_reconstructions(record, model, run / "reconstructions.png")
    keys = dict.fromkeys([*PANELS, *itertools.chain(*record["log"])])
    lines = [(*PANELS.get(key, (key, "", "C0o-")), key, [record["log"]]) for key in keys if key not in UNSHOWN]
    draw_panels(lines, run / "curves.png")
    print(f"figures in {run}")


@matplotlib.style.context(["default", STYLE])
def compare(*runs: str | Path):
    """compare.png, in the first folder: runs by epoch. Of x-0, x-1, ... (their seeds), alike else: mean and range."""
    arms = {}  # by folder without the seed's number, and options: logs
    records = [load_record(run) for run in runs]  # without their models: clmae.py may have been changed in between
    for record in records:
        given = record["options"] | {name: record["config"][name] for name in ("image_size", "patch_size")}
        untold = UNTOLD.split() + LEARNED * (given.get("masking") == "random")
        told = (f"{name} {value}".removesuffix(".0") for name, value in given.items() if name not in untold)
        folder = str(record["run"].resolve()).removesuffix(f"-{given['seed']}")
        arms.setdefault((folder, *told), []).append(record["log"])

    options = [told for _, *told in arms]
    names = [option.split()[0] for option in set(itertools.chain(*options))]  # as often as an option has values
    colours, others = {"masking random": "C0", "masking curriculum": "C1"}, itertools.count(2)
    lines = []
    for (folder, *told), logs in arms.items():
        words = [option.removeprefix("masking ") for option in told if names.count(option.split()[0]) > 1]
        if not words or options.count(told) > 1:
            words.insert(0, Path(folder).name)
        if len(logs) > 1:
            words.append(f"{len(logs)} seeds: mean and range")
        colour = next((colours.pop(option) for option in told if option in colours), None) or f"C{next(others)}"
        title = {key: ", ".join(filter(None, PANELS[key][:2])) for key in COMPARED}
        lines += [(title[key], ", ".join(words), f"{colour}o-", key, logs) for key in COMPARED]
    draw_panels(lines, records[0]["run"] / "compare.png", one_legend=True)
    print(f"figure: {records[0]['run'] / 'compare.png'}")


def mend_streams():
    """A closed stream, or a letter that a terminal lacks, stops no command."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None):
    """The command, with the words after its name."""
    mend_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by train.py")
    runs = parser.parse_args(argv).runs
    command = draw if len(runs) == 1 else compare
    try:
        command(*runs)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

"""Mean patch size against the threshold, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from bytelatent.report.pictures import format_of, write_picture


def write_threshold_figure(
    path: Path, thresholds: Sequence[float], patch_bytes: Sequence[float], chosen: tuple[float, float]
) -> None:
    """Draw the curve and mark the choice.

    Args:
        path: its ending says the format.
        thresholds: nats, rising.
        patch_bytes: mean bytes a patch at each.
        chosen: the threshold that was chosen, and its mean patch size.

    Raises:
        UserError: the ending is none that we draw, or the file cannot be written.
    """
    format_of(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(thresholds, patch_bytes, color="#2a6f97", linewidth=1.8)
    threshold, size = chosen
    axes.plot([threshold], [size], "o", color="#c1440e", markersize=7, zorder=3)
    for line in (axes.axvline(threshold), axes.axhline(size)):
        line.set(color="#c1440e", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{threshold:.3f} nats\n{size:.2f} bytes a patch",
        chosen,
        xytext=(8, -8),
        textcoords="offset points",
        va="top",
        color="#c1440e",
    )
    axes.set(xlabel="threshold (nats)", ylabel="mean bytes a patch", yscale="log")
    ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if tick <= max(patch_bytes) * 1.2]
    axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)

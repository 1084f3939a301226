"""Results of the long-context suite as a table and as a heat map."""
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.evaluation.longcontext.suite import AGGREGATION, RETRIEVAL, Cell


def _axes(cells: Sequence[Cell]) -> tuple[list[str], list[int], dict[tuple[str, int], Cell]]:
    """Return the task families and the lengths of the results, and the results by (family, length)."""
    return (list(dict.fromkeys(cell.family for cell in cells)), sorted({cell.length for cell in cells}),
            {(cell.family, cell.length): cell for cell in cells})


def mean_accuracy(cells: Sequence[Cell], group: Sequence[str], length: int) -> float | None:
    """Return the mean accuracy of a group of task families at one length, or None when none of them was run."""
    values = [cell.accuracy for cell in cells if cell.family in group and cell.length == length]
    return sum(values) / len(values) if values else None


def table(cells: Sequence[Cell]) -> str:
    """Return the results as a text table: accuracies in per cent with 95 % intervals, task families by lengths."""
    families, lengths, at = _axes(cells)
    lines = [f"{'accuracy, % [95 % interval]':28}" + "".join(f"{length:>18,}" for length in lengths)]
    for family in families:
        columns = []
        for length in lengths:
            cell = at[family, length]
            low, high = cell.interval
            columns.append(f"{100 * cell.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]")
        lines.append(f"{family.replace('_', ' '):28}" + "".join(f"{column:>18}" for column in columns))
    for name, group in (("mean of retrieval", RETRIEVAL), ("mean of aggregation", AGGREGATION)):
        means = [mean_accuracy(cells, group, length) for length in lengths]
        if None not in means:
            lines.append(f"{name:28}" + "".join(f"{100 * mean:>18.1f}" for mean in means))
    return "\n".join(lines)


def heat_map(cells: Sequence[Cell], picture: str | Path, title: str) -> None:
    """Draw the accuracy of every task family at every length as a heat map, to a PNG file."""
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    families, lengths, at = _axes(cells)
    values = [[100 * at[family, length].accuracy for length in lengths] for family in families]
    figure, axes = plt.subplots(figsize=(3.2 + 1.1 * len(lengths), 1.4 + 0.42 * len(families)), layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(families)), [family.replace("_", " ") for family in families])
    axes.set(xlabel="length (tokens)", title=title)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9)
    figure.colorbar(image, label="answers with every expected word (%)")
    figure.savefig(picture, dpi=110)
    plt.close(figure)

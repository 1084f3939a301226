"""Plot of a training run's loss and accuracy."""
import json
from pathlib import Path

LABELS = {"accuracy": "accuracy", "reason": "label and reason code"}


def plot_curves(metrics: str | Path, picture: str | Path) -> None:
    """Draw loss and accuracy over steps from a `metrics.jsonl` of `training.loop.fit` as a PNG.

    Accuracy is that on held-out examples if the run was evaluated, else that on the training tokens.
    """
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    training, held_out = ([line for line in lines if ("loss" in line) == is_training] for is_training in (True, False))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([x["step"] for x in training], [x["loss"] for x in training], lw=1)
    left.set(xlabel="step", ylabel="nats per token", yscale="log", title="training loss")
    if held_out:
        for name, style in (("accuracy", "-o"), ("reason", "--o")):
            points = [(x["step"], x[name]) for x in held_out if name in x]
            if points:
                right.plot(*zip(*points, strict=True), style, ms=3, label=LABELS[name])
        if "reason" in held_out[0]:
            right.axhline(.5, color="grey", lw=.8, ls=":", label="majority class")
        right.set(title="held-out accuracy")
        right.legend(loc="lower right")
    else:
        right.plot([x["step"] for x in training], [x["accuracy"] for x in training], lw=1)
        right.set(title="training tokens predicted right")
    right.set(xlabel="step", ylabel="fraction right", ylim=(0, 1.02))
    figure.savefig(picture, dpi=110)
    plt.close(figure)

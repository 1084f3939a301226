"""Pictures of a training run."""
import json
from pathlib import Path


def plot_curves(metrics: str | Path, picture: str | Path) -> None:
    """Loss and accuracy over steps from a `metrics.jsonl` of `training.loop.fit`, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "accuracy" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in ("loss", "answer_loss"):
        left.plot([x["step"] for x in training], [x[name] for x in training], label=name.replace("_", " "), lw=1)
    left.set(xlabel="step", ylabel="nats per token", yscale="log", title="training loss")
    left.legend()
    for name, line in (("accuracy", "-o"), ("reason", "--o")):
        right.plot([x["step"] for x in held_out], [x[name] for x in held_out], line, ms=3,
                   label={"accuracy": "label", "reason": "label and reason code"}[name])
    right.axhline(.5, color="grey", lw=.8, ls=":", label="majority class")
    right.set(xlabel="step", ylabel="fraction right", ylim=(0, 1.02), title="held-out accuracy")
    right.legend(loc="lower right")
    figure.savefig(picture, dpi=110)
    plt.close(figure)

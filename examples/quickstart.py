"""Trains a model on scikit-learn's digits in a task of its own, and streams what it prints."""

import sys

from dstack.api import Client, RunStatus, Task

TRAIN = """
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

images, digits = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(images / 16, digits, test_size=0.25, random_state=0)
print(f"{len(train_x)} images to learn from, {len(test_x)} to be tested on")

model = MLPClassifier(hidden_layer_sizes=(64,), learning_rate_init=0.01, random_state=0)
for epoch in range(1, 11):
    model.partial_fit(train_x, train_y, classes=range(10))
    print(f"epoch {epoch:2}: loss {model.loss_:.3f}, accuracy {model.score(test_x, test_y):.1%}")

assert model.score(test_x, test_y) > 0.9, "it has not learned to read"
"""


def main() -> int:
    """Submits the task, follows its output, and says with the exit code whether it succeeded."""
    task = Task(
        python=f"{sys.version_info.major}.{sys.version_info.minor}",  # a fresh environment of this version
        env={"TRAIN": TRAIN},
        commands=["pip install --quiet scikit-learn", 'python -c "$TRAIN"'],
    )
    run = Client.from_config().runs.submit(task)
    print(f"Submitted {run.name}", flush=True)
    try:
        for log in run.logs():
            sys.stdout.buffer.write(log)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        run.stop(abort=True)
        raise
    run.refresh()
    print(f"{run.name}: {run.status.value}")
    return 0 if run.status is RunStatus.DONE else 1


if __name__ == "__main__":
    sys.exit(main())

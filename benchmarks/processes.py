"""Training in several processes: seconds, and clean accuracy on a trusted set, for each number of processes.

    .venv/bin/python benchmarks/processes.py DATASET TRUSTED_SET --epochs 5 --processes 1,2

Both are data sets, such as `cbd ingest` writes. A row of one process uses as many threads as all processes of the others together.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    from cbd.config import Deconfounded, Gate, Model, Params, Training
    from cbd.dataset import load_samples
    from cbd.evaluate import clean_accuracy, predictions
    from cbd.models import load_model
    from components.train_undefended import train_undefended

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("trusted_set", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--processes", default="1,2")
    asked = parser.parse_args()
    print("| processes | seconds | clean accuracy |\n|---|---|---|")
    for number in map(int, asked.processes.split(",")):
        sections = {"model": Model(image_size=asked.image_size), "deconfounded": Deconfounded(epochs=asked.epochs, noise=0)}
        params = Params(gate=Gate(min_clean_accuracy=0), training=Training(processes=number), **sections)
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            train_undefended(asked.dataset, Path(folder) / "model", params=params, checkpoints=Path(folder) / "checkpoints")
            seconds = time.monotonic() - started
            model, _ = load_model(Path(folder) / "model")
        samples = load_samples(asked.trusted_set, image_size=params.model.image_size)
        accuracy = clean_accuracy(predictions(model, samples.images), samples.labels)
        print(f"| {number} | {seconds:.1f} | {accuracy['k']} of {accuracy['n']} |", flush=True)


if __name__ == "__main__":
    main()

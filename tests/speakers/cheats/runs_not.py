"""Needs what it may not have."""

from speaker import Path, np, os


def read_model():
    return np.load(Path(os.environ["DATA_PATH"]) / "weights.npy")

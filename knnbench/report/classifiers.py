"""What the classifiers do on images, computed when it is asked for: accuracy by k, losses, neighbours as images."""

import base64
import struct
import zlib
from typing import Any

import numpy as np

from knnbench import datasets
from knnbench.dtypes import Array

__all__ = ["classifier_facts"]

METRICS = ("cityblock", "euclidean", "cosine")
NEIGHBOURS = (1, 3, 5, 7, 9, 11, 15, 21)
SEEDS = 4
ITERATIONS = 400

# Test images whose neighbours are shown: the first that are classified rightly, and the first that are not.
SHOWN_RIGHT, SHOWN_WRONG, SHOWN_K = 4, 8, 5

# Test images at the most.
MOST_QUERIES = 10_000


def classifier_facts(name: str = "", n_queries: int = MOST_QUERIES) -> dict[str, Any]:
    """Return what the page shows of the classifiers.

    Parameters
    ----------
    name : str
        The data set, of images; default MNIST where it is, else digits.
    n_queries : int
        Test images at the most.

    Returns
    -------
    dict
        ``lead`` (what was computed), ``accuracy_by_k`` (``metric``, ``k``, ``accuracy``), ``loss_curves`` (``seed``,
        ``iteration``, ``loss``), ``neighbours_title`` and ``neighbours`` (images with their labels).
    """
    from knnbench.classifiers import KNNClassifier, RandomSearchClassifier

    name = name or datasets.best_available()
    data = datasets.load(name)
    X_test, y_test = data.X_test[:n_queries], data.y_test[:n_queries]
    by_k: list[dict[str, Any]] = []
    for metric in METRICS:
        classifier = KNNClassifier(SHOWN_K, metric).fit(data.X_train, data.y_train)
        scores = classifier.score_k(X_test, y_test, list(NEIGHBOURS))
        by_k += [{"metric": metric, "k": k, "accuracy": float(scores[k])} for k in NEIGHBOURS]
        if metric == METRICS[1]:
            shown = _neighbours(classifier, data, X_test, y_test)
    curves: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        search = RandomSearchClassifier(max_iter=ITERATIONS, patience=ITERATIONS, random_state=seed)
        search.fit(data.X_train, data.y_train)
        steps = zip(search.accepted_iterations_.tolist(), search.loss_curve_.tolist(), strict=True)
        curves += [{"seed": f"seed {seed}", "iteration": step, "loss": loss} for step, loss in steps]
    lead = (
        f"Computed for this page on {name}: {len(data.X_train):,} training and {len(X_test):,} test images; the random "
        f"search for {ITERATIONS} iterations with {SEEDS} seeds, without early stop."
    )
    return {
        "lead": lead,
        "accuracy_by_k": by_k,
        "loss_curves": curves,
        "neighbours_title": f"Neighbours, {METRICS[1]}, k = {SHOWN_K}: the first wrong and the first right ones",
        "neighbours": shown,
    }


def _neighbours(classifier: Any, data: datasets.Dataset, X_test: Array, y_test: Array) -> list[dict[str, Any]]:
    distances, indices = classifier.kneighbors(X_test)
    predicted = classifier.predict(X_test)
    is_right = predicted == y_test
    wrong, right = np.flatnonzero(~is_right)[:SHOWN_WRONG], np.flatnonzero(is_right)[:SHOWN_RIGHT]
    return [
        {
            "src": image_url(X_test[i]),
            "label": str(y_test[i]),
            "predicted": str(predicted[i]),
            "is_right": bool(is_right[i]),
            "nearest": [
                {"src": image_url(data.X_train[j]), "label": str(data.y_train[j]), "distance": float(distance)}
                for j, distance in zip(indices[i].tolist(), distances[i].tolist(), strict=True)
            ],
        }
        for i in (*wrong.tolist(), *right.tolist())
    ]


def image_url(pixels: Array) -> str:
    """Return a square image as a URL that holds it, a PNG of 8 grey bits.

    Parameters
    ----------
    pixels : (side * side,) array
        The largest value is white.

    Examples
    --------
    >>> image_url(np.array([0, 255, 255, 0], np.uint8))[:30]
    'data:image/png;base64,iVBORw0K'
    """
    side = int(len(pixels) ** 0.5)
    top = max(1, int(pixels.max()))
    grey = (pixels.reshape(side, side).astype(np.float64) * (255 / top)).round().astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in grey)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()

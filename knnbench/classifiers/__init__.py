"""scikit-learn classifiers on the backends of knnbench; importing this package imports scikit-learn."""

from .knn import KNNClassifier
from .random_search import RandomSearchClassifier

__all__ = ["KNNClassifier", "RandomSearchClassifier"]

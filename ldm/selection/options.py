"""Names that options of selection allow; imports nothing heavy."""

STRATEGIES = ("centroid", "confidence", "knn", "coverage", "random")
CONFIDENCES = ("judge", "manifest")

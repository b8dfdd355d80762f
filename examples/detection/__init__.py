"""Factor Transfer for Faster R-CNN: ``python -m examples.detection --help``."""

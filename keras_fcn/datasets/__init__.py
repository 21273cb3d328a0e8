"""Data sets: image, label map with void 255, one module each."""

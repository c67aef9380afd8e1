"""Models as they are passed on: bundles, ONNX, int8, a page."""

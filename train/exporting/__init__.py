"""What leaves the project: a student as ONNX, in float32 and int8, its card, and a page."""

"""From PyTorch to a checked ONNX file."""

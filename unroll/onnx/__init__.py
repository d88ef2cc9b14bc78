"""Recurrent layers of ONNX models, and of PyTorch models on their way to ONNX."""

"""Recurrent nodes of ONNX models."""

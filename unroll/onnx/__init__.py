"""ONNX models: recurrent nodes read, and plain operators written in their place."""

from unroll.onnx.passes import UnrollPass as UnrollPass

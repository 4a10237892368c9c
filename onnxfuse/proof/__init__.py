"""ONNX Runtime: running models, measuring drift, refusing what does not hold."""

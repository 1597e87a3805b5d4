"""Detectors as files that run without torch: ONNX, and a script that needs onnxruntime, numpy and Pillow alone."""

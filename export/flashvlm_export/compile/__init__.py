"""Bundle to TensorRT engines."""

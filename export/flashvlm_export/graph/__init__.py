"""The nn.Modules of a bundle's graphs, and how they become ONNX."""

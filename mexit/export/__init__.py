"""Export a trained network as ONNX segments with counted MACs."""

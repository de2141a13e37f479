"""Export: a trained network becomes a bundle of ONNX segments with counted costs."""

//! Encoder graphs: configuration and weights to ONNX. Knows no executor and no device.

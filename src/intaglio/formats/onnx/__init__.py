"""ONNX files for ONNX Runtime and Transformers.js, and the web page around them.

`layout` is shared by writers and readers.
"""

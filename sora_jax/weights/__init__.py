"""Published weights: which tensor of a safetensors file is which of our params."""

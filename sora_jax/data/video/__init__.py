"""Videos and images as uint8 RGB arrays [T, H, W, 3]: `reader.read`, `writer.write`.

An image is a video of one frame.
"""

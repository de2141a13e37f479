"""Readers, stored splits and THE image preparation: numpy, Pillow where an image must be decoded or resized.

Usable on a device without torch: calibration, server and camera prepare images as training did.
"""

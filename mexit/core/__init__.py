"""Types and files that every stage shares; numpy and the standard library only.

Axes of arrays: E exits, N samples of a data set, B samples of a batch, C classes, H and W pixels.

Exits count from 1. 1 MAC = 1 multiply-add. Pixels are in [0, 1]. Scores are float64; a larger score is more confident.
"""

#!/usr/bin/env bash
# The pipeline on one screen: MNIST in the folder that MEXIT_DATA names, NEO-KD, every artifact named.
set -euo pipefail
mexit train --data mnist --model small-cnn --method neo-kd --epochs 6 --out runs/mnist
mexit export runs/mnist --out bundles/mnist            # ONNX segments, checked against torch, calibrated
mexit calibrate bundles/mnist --budget night=30%       # the same again with one more budget
mexit evaluate bundles/mnist --samples 1000            # the test split: per exit and per budget, clean and attacked
mexit serve bundles/mnist --budget low

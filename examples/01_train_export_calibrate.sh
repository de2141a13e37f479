#!/usr/bin/env bash
# The whole pipeline on MNIST with NEO-KD; MEXIT_DATA names the folder of the data sets.
set -euo pipefail
mexit train --data mnist --model small-cnn --method neo-kd --epochs 6 --out runs/mnist
mexit export runs/mnist --out bundles/mnist            # ONNX segments, compared with torch, calibrated
mexit calibrate bundles/mnist --budget night=30%       # calibrated again, with one more budget
mexit evaluate bundles/mnist --samples 1000            # test split: per exit and per budget, clean and attacked
mexit serve bundles/mnist --budget low

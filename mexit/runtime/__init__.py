"""Inference: `Runtime` opens a bundle and answers images within a budget. Imports neither torch nor onnx.

An image passes these files from the call to its `Prediction`:

    runtime.py          `Runtime.__call__` and `Runtime.run`; `mexit.data.preprocess` makes the input tensor
    request.py          options, tokens and state of the request
    engine.py           runs segment after segment, and lets rows exit
    backends/ort.py     one segment in ONNX Runtime (`bound_runner.py` keeps the buffers of a single image)
    core/scores.py      probabilities and scores; `core/exit_policy.py` compares them with the thresholds
    prediction.py       the answer

Beside them, `policy_selection.py` selects the policy of a budget, `rate_limiter.py` bounds the MACs, `stats.py` counts,
`drift.py` compares early answers with the full network's, `batching.py` lets requests share runs, `explanation.py`
shows what every exit answers for one image, and `reference.py` computes the same answers without optimisations.
"""

from mexit.runtime.prediction import Prediction
from mexit.runtime.runtime import Runtime

__all__ = ["Prediction", "Runtime"]

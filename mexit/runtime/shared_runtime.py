"""A runtime for several threads that call it at the same time: their images share batches (see `batching`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mexit.core.resource_limits import read_limits
from mexit.errors import Overloaded
from mexit.runtime.batching import ContinuousBatcher
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import RequestOptions
from mexit.runtime.runtime import Runtime

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SharedRuntime:
    """Answers images like its runtime. Thread-safe.

    Attributes:
        runtime: the opened bundle.
    """

    def __init__(self, runtime: Runtime, callers: int) -> None:
        """Measure batches, unless there is one caller.

        Args:
            runtime: the opened bundle.
            callers: number of threads that call; one caller needs no batches.
        """
        self.runtime = runtime
        self._closed = threading.Event()
        self._executor: ThreadPoolExecutor | None = None
        self._batcher: ContinuousBatcher | None = None
        if callers > 1:
            workers = max(1, min(callers, read_limits().threads // runtime.threads))
            self._executor = ThreadPoolExecutor(workers, thread_name_prefix="mexit-engine")
            self._batcher = ContinuousBatcher(runtime, self._executor.submit, workers)

    def __call__(
        self, images: NDArray[Any] | Sequence[Any] | bytes, **options: Unpack[RequestOptions]
    ) -> list[Prediction]:
        """Answer images; arguments and errors as for a call of the runtime.

        Raises:
            DeadlineExceeded: the deadline is before exit 1 could answer.
            Overloaded: also if the runtime is closed meanwhile.
        """
        request = self.runtime.begin(self.runtime.prepare(images), **options)
        while not request.done:
            if (wait_s := request.acquire_tokens()) > 0:
                if self._closed.wait(wait_s):
                    raise Overloaded("the runtime is closed")
            elif self._batcher is not None:
                self._batcher.submit(request).result()
            else:
                self.runtime.run(request)
        return request.predictions

    def close(self) -> None:
        """End the calls that wait, with `Overloaded`."""
        self._closed.set()
        if self._batcher is not None and self._executor is not None:
            self._batcher.close()
            self._executor.shutdown(wait=False)

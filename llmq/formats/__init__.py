"""On-disk layouts: each file is one layout, pure functions between `QuantizedWeight` and named tensors.

A format never sees a method, a model or a file. `FORMATS` holds the modules; what a format must offer is checked by the
contract tests over it: `NAME`, `BITS`, `specs`, `encode`, `decode`, `config`, `parse`.
"""

from types import ModuleType

from llmq.formats import compressed_tensors

FORMATS: tuple[ModuleType, ...] = (compressed_tensors,)

"""Declares two torchvision operators before torchvision is imported.

The wheel on the index is a CUDA build whose extension cannot load next to a CPU torch; torchvision
then registers meta kernels for operators nobody declared, and fails. Two schemas are enough.
"""

from __future__ import annotations

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Finds nothing; sees the first import of torchvision and steps out of the way."""

    def find_spec(self, fullname, path=None, target=None):  # noqa: ANN001, ANN201, ARG002
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                self.library.define(schema)
            sys.torchvision_schemas = self.library  # keeps the registration alive


sys.meta_path.insert(0, TorchvisionSchemas())

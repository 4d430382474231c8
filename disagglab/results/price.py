"""What a node or a GPU costs in an hour, and so what a way does."""

from __future__ import annotations

import re
from dataclasses import dataclass

from disagglab.config.price import PriceSection
from disagglab.results.footprint import Footprint

TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{3})\s*/\s*(node|gpu)-?\s*hour", re.IGNORECASE)


@dataclass(frozen=True)
class Price:
    """``per_hour`` in ``currency``, of each ``node`` or ``gpu`` of a way, busy or not."""

    per_hour: float
    unit: str
    currency: str

    @classmethod
    def of_section(cls, section: PriceSection | None) -> Price | None:
        """The price of a lab file; None without one."""
        if section is None:
            return None
        if section.per_gpu_hour is not None:
            return cls(section.per_gpu_hour, "gpu", section.currency)
        assert section.per_node_hour is not None  # one of the two: PriceSection
        return cls(section.per_node_hour, "node", section.currency)

    @classmethod
    def parse(cls, text: str) -> Price | None:
        """A price as ``2.5 EUR/gpu-hour`` or ``8 USD/node-hour``; None if it is no such text, or 0."""
        found = TEXT.fullmatch(text.strip())
        if found is None or float(found[1]) == 0:
            return None
        return cls(float(found[1]), found[3].lower(), found[2].upper())

    def of(self, place: Footprint) -> float | None:
        """Of a way in an hour; None for GPUs of a way that has none."""
        count = place.gpus if self.unit == "gpu" else place.nodes
        return self.per_hour * count if count else None

    def __str__(self) -> str:
        return f"{self.per_hour:g} {self.currency}/{self.unit}-hour"

"""The section of a lab file that says what the lab costs."""

from __future__ import annotations

from pydantic import Field, model_validator

from disagglab.config.head import Section


class PriceSection(Section):
    """What the lab costs, for the cost of tokens in a frontier; one of the two prices."""

    per_node_hour: float | None = Field(None, gt=0, description="of a node in an hour, busy or not")
    per_gpu_hour: float | None = Field(None, gt=0, description="of a GPU in an hour, busy or not")
    currency: str = Field(pattern=r"^[A-Z]{3}$", description="its code, such as EUR")

    @model_validator(mode="after")
    def _one_price(self) -> PriceSection:
        if (self.per_node_hour is None) == (self.per_gpu_hour is None):
            raise ValueError("give either per_node_hour or per_gpu_hour")
        return self

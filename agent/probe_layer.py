"""Which layer of the student the hand-off score is read off: apart from the score, since predictions depend on the one and not on the other."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import InputError


class HandoffScoreParams(BaseModel):
    """`handoff_score`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    layer: int = Field(ge=1, description="the probe reads what enters this layer, counted from 0")


def check_layer(layer: int, model: Any) -> None:
    """Refuse a layer that is not there.

    Raises:
        InputError: there is no such layer.
    """
    if layer >= (layers := model.config.get_text_config().num_hidden_layers):
        raise InputError(f"handoff_score.layer is {layer}, and the student has layers 0 to {layers - 1}", "lower it in params.yaml")

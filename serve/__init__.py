"""From an artifact to a picture: drawing masks and the differences between them."""

from bpkd_sdk.serve.overlay import draw_difference, draw_overlay, label_boundaries

__all__ = ["draw_difference", "draw_overlay", "label_boundaries"]

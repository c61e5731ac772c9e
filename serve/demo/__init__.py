"""The page that people look at: teacher and student side by side, on an image, on many, on a video (Gradio)."""

from bpkd_sdk.serve.demo.page import build_demo, page_options

__all__ = ["build_demo", "page_options"]

"""The web demo (Gradio): teacher and student side by side on an image, on many images and on a video."""

from bpkd_sdk.serve.demo.page import build_demo, page_options

__all__ = ["build_demo", "page_options"]

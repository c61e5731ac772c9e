"""Export of a static web site that segments images in the browser."""

from bpkd_sdk.export.web.package import ONNXRUNTIME_WEB, onnxruntime_web
from bpkd_sdk.export.web.site import WebReport, to_web

__all__ = ["ONNXRUNTIME_WEB", "WebReport", "onnxruntime_web", "to_web"]

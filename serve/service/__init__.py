"""HTTP service: FastAPI application, request security, admission control, batching and metrics."""

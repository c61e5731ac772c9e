"""HTTP service: FastAPI application, request security, size limits, batching and metrics."""

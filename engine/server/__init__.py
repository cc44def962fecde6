"""The OpenAI-compatible server: ``python -m engine serve`` (FastAPI and uvicorn, the extra ``server``)."""

"""Steering in front of vLLM's HTTP server: middleware and routes."""

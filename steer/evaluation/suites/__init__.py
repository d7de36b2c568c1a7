"""Suites: what an evaluation measures, and which items are for development and which for the test."""

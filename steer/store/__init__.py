"""Versions of compositions: what git gives code, for the behaviour of a model, in an OCI image layout."""

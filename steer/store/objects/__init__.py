"""The objects of a store: compositions and commits, as OCI manifests."""

"""What a behaviour is, as data: steering vectors, compositions, the artifact file, model references, errors."""

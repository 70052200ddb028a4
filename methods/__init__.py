"""The erasure methods, one module each; ``erasure.registry.methods`` knows their names."""

"""Words that filter rules look for."""

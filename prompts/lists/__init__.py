"""Our own lists of prompts."""

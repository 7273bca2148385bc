"""The `hf-paged` command."""

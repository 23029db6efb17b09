"""Corpora: from files of bytes to segments. Import from the modules directly."""

"""Text to token ids to `Conditioning`."""

"""Networks only: arrays in, arrays out. No files, no schedules, no adapters."""

"""Code that every package shares: errors, records, files, secrets and hash chains."""

"""Programs that ask one question each; LOG.md keeps what was predicted and what came out."""

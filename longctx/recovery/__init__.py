"""Recovery without checkpoints: every rank's state lives in a peer's memory too; docs/recovery.md."""
